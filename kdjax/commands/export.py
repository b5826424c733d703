"""`kdjax export`: a model as ONNX, OpenVINO, NCNN, LiteRT or StableHLO, compared with the JAX model."""

import contextlib
import dataclasses
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kdjax.commands import arguments
from kdjax.data import records, scenes
from kdjax.errors import UserError, prefix
from kdjax.export import graphs, litert, metadata, ncnn, onnx, openvino, packages, stablehlo, targets, verify
from kdjax.files import write_json
from kdjax.inference.model import BATCH, Model
from kdjax.inference.predict import Program

SAMPLES = 8  # images on which outputs are compared
CALIBRATION = 64  # images that int8 is calibrated on
BUDGET = {"float32": 0.1, "float16": 0.1, "int8": 1.0}  # points of AP
DTYPES = {  # of each format
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "int8"),
    "ncnn": ("float32", "float16"),
    "litert": ("float32", "int8"),
    "stablehlo": ("float32",),
}
PACKAGES = {
    "onnx": packages.ONNX,
    "openvino": (*packages.OPENVINO, *packages.ONNX),
    "ncnn": (*packages.NCNN, *packages.ONNX),
    "litert": packages.LITERT,
    "stablehlo": (),
}
WEIGHTS = {"openvino": ".bin", "ncnn": ".bin"}  # a second file, beside the first
SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "ncnn": ".param",
    "litert": ".tflite",
    "stablehlo": ".stablehlo",
}
BATCHES = (1, 2, 5)  # images, in which a file for any number of them is compared


class _Form(NamedTuple):
    """What is written."""

    format: str
    dtype: str
    raw: bool  # the head's maps
    batch: int  # images; 0: any


@dataclasses.dataclass
class _Source:
    """A model and the images on which its files are compared and measured, all of it read when it is first used."""

    model: str
    data: str | None
    split: str
    annotations: str
    images: str
    limit: int
    exif: str | None
    classes: str
    before: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # AP in JAX in points, by precision

    @functools.cached_property
    def loaded(self) -> Model:
        return arguments.load_model(self.model)

    @functools.cached_property
    def orientation(self) -> str:
        return self.exif or self.loaded.exif_orientation

    @functools.cached_property
    def opened(self) -> arguments.Data | None:
        if not self.data:
            return None
        where = (self.data, self.split, self.annotations, self.images, self.limit, self.orientation)
        return arguments.open_data(*where, classes=self.classes)

    def read(self) -> None:
        """Reads both now, so that a mistake in them is not told for each file."""
        _ = self.loaded, self.opened


def run(
    *,
    model: str,
    format: str | None,
    out: str,
    data: str | None,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    exif: str | None,
    classes: str = "",
    dtype: str | None = None,
    raw: bool,
    max_ap_loss: float | None,
    batch: str | None = None,
    target: str | None = None,
) -> int:
    """Exports a model; a file appears only if it passes the comparison.

    Args:
      model: see `kdjax.inference.load`.
      format: a key of `DTYPES`; None: that of the target.
      out: the file; with the target "all", the folder.
      data: to compare and measure on, as for `kdjax evaluate`; None compares on generated images.
      split: of the data.
      annotations: the json, where it is not at its usual place.
      images: the images, where they are not at their usual place.
      limit: only the first images; 0 takes all.
      classes: see `arguments.open_data`.
      exif: see `arguments.open_data`; None: as the model was trained.
      dtype: one of `DTYPES`; None: that of the target, else float32. int8 of a model that was trained for it has its
        scales; of any other it is calibrated on images of the split train, if the data has one.
      raw: the head's maps instead of detections.
      max_ap_loss: largest loss in points of AP; None is `BUDGET`.
      batch: number of images, or "dynamic" (ONNX and OpenVINO); None: that of the target, else 1.
      target: a key of `kdjax.export.targets.TARGETS`, whose settings hold where others are None, or "all" of them.

    Returns:
      Exit code: 0; 1 if, of all targets, one could not be written.

    Raises:
      UserError: something is missing, or the exported model differs too much: in its outputs or in AP.
    """
    if max_ap_loss is not None and not data:
        raise UserError("--max-ap-loss needs --data=DIR, on which AP is measured")
    if max_ap_loss is not None and not 0 <= max_ap_loss < math.inf:
        raise UserError(f"--max-ap-loss must be a number of points of AP >= 0, not {max_ap_loss}")
    if not data:
        arguments.refuse_without(
            "--data", split=split, annotations=annotations, images=images, limit=limit, classes=classes
        )
        if exif:
            raise UserError("--exif is for the data of --data, which is not given")
    source = _Source(model, data, split, annotations, images, limit, exif, classes)
    if target == targets.ALL:
        own = {"--format": format, "--dtype": dtype, "--raw": raw, "--batch": batch}
        if given := [flag for flag, value in own.items() if value]:
            raise UserError(f"{given[0]}: with --target={targets.ALL} each target has its own: leave it out")
        return _all(source, out, max_ap_loss)
    form = _form(format, dtype, raw, batch, target)
    size, told, facts = _export(source, form, out, max_ap_loss)
    print(*told, sep="\n")
    print(f"{out}: {size:,} bytes, {facts['input']}")
    return 0


def _all(source: _Source, out: str, max_ap_loss: float | None) -> int:
    """Exports for each target into a folder, and prints a table of them; returns the exit code."""
    if not source.data:
        raise UserError(f"--target={targets.ALL} needs --data=DIR, on which AP is measured")
    names = {name: f"{name}{SUFFIXES[one.format]}" for name, one in targets.TARGETS.items()}
    folder = arguments.make_folder(out, outputs=[*names.values()])
    for name, file in names.items():
        _refuse_foreign(folder / file, targets.TARGETS[name].format)
    source.read()
    rows, refused = [["target", "file", "precision", "AP", "AP in JAX", "MB", "s"]], {}
    for name, file in names.items():
        begun, form = time.perf_counter(), _form(None, None, False, None, name)
        print(f"{name}:", flush=True)
        try:
            size, told, facts = _export(source, form, str(folder / file), max_ap_loss)
        except OSError:
            raise  # the disk is full, for instance
        except Exception as error:  # converters raise many kinds of errors; the other targets do not need this one
            first = next(iter(str(error).splitlines()), "")
            refused[name] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
            if (folder / file).exists():
                refused[name] += f"; {folder / file} is of an earlier export"
            print(f"not written: {refused[name]}")
            continue
        print(*told, sep="\n")
        scores = [facts[f"AP of this file, {form.dtype}"], facts["AP of JAX"]]
        rows.append([name, file, form.dtype, *scores, f"{size / 1e6:.2f}", f"{time.perf_counter() - begun:.0f}"])
    print("", arguments.aligned(rows), "", sep="\n")
    for name, why in refused.items():
        print(f"{name}: not written: {why}")
    return 1 if refused else 0


def _export(source: _Source, form: _Form, out: str, max_ap_loss: float | None) -> tuple[int, list[str], dict[str, str]]:
    """Writes one file, if it passes the comparison; its bytes, lines for the terminal, and its metadata."""
    if form.dtype == "float16" and not source.data:
        raise UserError(f"a file in {form.dtype} needs --data=DIR, on which AP is measured")
    file = _output(source.model, out, form)
    if needed := PACKAGES[form.format]:
        packages.check_installed(needed)
    _refuse_foreign(file, form.format)
    loaded = source.loaded
    trained = bool(loaded.detector.options.get("int8"))
    as_trained = trained and form.dtype == "int8"
    if as_trained and form.batch != 1:
        raise UserError(
            f"--batch={form.batch or 'dynamic'}: {source.model} was trained for int8, and its files in int8 take one "
            "image: --batch=1"
        )
    if form.dtype == "int8" and not trained:
        if not source.data:
            raise UserError(
                f"a file in int8 needs --data=DIR, on which AP is measured: {source.model} was not trained for int8"
            )
        if form.format == "litert":
            packages.check_installed(packages.LITERT_INT8)
    if form.format == "onnx" and form.dtype == "float16" and loaded.detector.masks == "box":
        raise UserError(
            f"{source.model}: {loaded.detector.name} has convolutions behind its NMS, which ONNX computes in "
            "float32 only: export it with --dtype=float32"
        )
    if form.format == "ncnn":
        ncnn.check(loaded)
    graphs.check(loaded, raw=form.raw, nms=form.format != "litert", batch=form.batch)
    if trained:
        loaded = graphs.in_dtype(loaded, "int8" if as_trained else "float32")
    opened = source.opened
    if opened:
        loaded = arguments.match_classes(loaded, opened)
        samples = [image for _, image in itertools.islice(opened.stream(), SAMPLES)]
    else:
        samples = _generated("val", SAMPLES)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder:
        made = Path(folder) / file.name
        call = _write(loaded, made, form)
        told, facts = (_compare_int8 if as_trained else _compare)(loaded, call, samples, form)
        if trained and not as_trained:
            told.append(f"trained for int8, written in {form.dtype}: its AP is another than in training")
        if form.dtype != "float32" and not as_trained:
            calibration, lines = [], []
            if form.dtype == "int8" and form.format != "litert":
                calibration, lines = _calibration(source)
            told += lines
            call = _smaller(loaded, made, form, calibration)
        if opened:
            precision = "int8" if as_trained else "float32"
            if precision not in source.before:
                source.before[precision] = _average_precision("JAX", loaded, opened, None)
            program = verify.as_program(loaded, call, raw=form.raw, batch=form.batch)
            after = _average_precision("exported", loaded, opened, program)
            budget = BUDGET[form.dtype] if max_ap_loss is None else max_ap_loss
            measured, lines = _judged(source.before[precision], after, form.dtype, budget)
            facts |= measured
            told += lines
            facts["AP measured on"] = f"{opened.name}, {source.split}, {opened.split.size} images"
        facts["dtype"] = form.dtype
        return _finish(made, file, form, facts), told, facts


def _form(format: str | None, dtype: str | None, raw: bool, batch: str | None, target: str | None) -> _Form:
    """What is to be written, of a target and the settings that say otherwise."""
    chosen = targets.TARGETS[target] if target else None
    format = format or (chosen.format if chosen else None)
    if format is None:
        raise UserError(f"--format or --target is missing: formats are {', '.join(DTYPES)}")
    if chosen and chosen.format != format:
        raise UserError(f"--target={target} is for --format={chosen.format}, not {format}: leave one of the two out")
    dtype = dtype or (chosen.dtype if chosen else "float32")
    batch = batch or (chosen.batch if chosen else "1")
    if dtype not in DTYPES[format]:
        able = [name for name, dtypes in DTYPES.items() if dtype in dtypes]
        raise UserError(
            f"--dtype={dtype} is for --format={' and '.join(able)}, not {format}: {format} is written in "
            f"{' and '.join(DTYPES[format])}"
        )
    count = 0 if batch == "dynamic" else int(batch) if batch.isdecimal() else -1
    if count < (0 if batch == "dynamic" else 1):
        raise UserError(f"--batch must be a number of images >= 1, or dynamic, not {batch!r}")
    if count != 1 and format not in ("onnx", "openvino"):
        raise UserError(f"--batch={batch} is for ONNX and OpenVINO: {format} files take one image")
    return _Form(format, dtype, raw or format == "ncnn", count)


def _output(model: str, out: str, form: _Form) -> Path:
    """The file to write, where it and those beside it can be written."""
    file = arguments.output_file(out, inputs=[model])
    suffix = SUFFIXES[form.format]
    if file.suffix != suffix:  # its runtime or `kdjax latency` would not read it
        raise UserError(f"--out={out}: the name of a file for {form.format} must end with {suffix}")
    if form.format not in ("onnx", "openvino"):
        arguments.output_file(str(metadata.place(file)))
    if form.format in WEIGHTS:
        beside = arguments.output_file(str(Path(out).with_suffix(WEIGHTS[form.format])))
        another = f"take another name, such as {file.stem}.{form.format}{suffix}"
        for suffix_of_other in {SUFFIXES[format] for format in WEIGHTS} - {suffix}:
            if (other := file.with_suffix(suffix_of_other)).exists():
                told = f"its weights, {beside.name}, would be those of {other.name}: {another}"
                raise UserError(f"--out={out}: {told}")
        if beside.exists() and not file.exists():
            raise UserError(f"--out={out}: its weights would replace {beside.name}: {another}")
    return file


def _refuse_foreign(file: Path, format: str) -> None:
    """Refuses to replace a file that no export has written, or what is not the metadata of one.

    Raises:
      UserError: there is one at this place.
    """
    places = [file] if format in ("onnx", "openvino") else [file, metadata.place(file)]
    there = next((place for place in places if place.exists()), None)
    if there is None or packages.missing(PACKAGES[format]):  # without them nothing is written
        return
    try:
        if format == "onnx":
            facts = onnx.metadata(file)
        elif format == "openvino":
            facts = openvino.metadata(file)
        else:
            facts = metadata.beside(file)
    except UserError:
        facts = {}
    if "kdjax" not in facts:
        raise UserError(f"--out: {there} is there, and `kdjax export` did not write it: choose another name")


def _finish(made: Path, file: Path, form: _Form, facts: dict[str, str]) -> int:
    """Adds the metadata, moves the files to their places, and returns their bytes."""
    if form.format == "onnx":
        onnx.add_metadata(made, facts)
    elif form.format == "openvino":
        openvino.add_metadata(made, facts)
    else:
        write_json(metadata.place(file), facts)
    parts = [file] + ([file.with_suffix(WEIGHTS[form.format])] if form.format in WEIGHTS else [])
    for part in reversed(parts):
        (made.parent / part.name).replace(part)
    return sum(part.stat().st_size for part in parts)


def _source(path: Path) -> Path:
    """The ONNX file that another format is made from, beside it."""
    return path.with_name("source.onnx")


def _write(model: Model, path: Path, form: _Form) -> verify.Call:
    """Writes the file, in float32 or, of a model whose values are rounded, int8; returns the function that runs it."""
    if form.format == "litert":
        litert.write(model, path, raw=form.raw)
    elif form.format == "stablehlo":
        stablehlo.write(model, path, raw=form.raw)
    elif form.format == "onnx":
        onnx.write(model, path, raw=form.raw, batch=form.batch)
    else:
        onnx.write(model, _source(path), raw=form.raw, batch=form.batch, signed=True)
        with prefix(f"{model.path}: {model.detector.name}"):
            openvino.write(_source(path), path) if form.format == "openvino" else ncnn.write(_source(path), path)
    return _runner(model, path, form)


def _runner(model: Model, path: Path, form: _Form) -> verify.Call:
    if form.format == "litert":
        return litert.runner(path, model, raw=form.raw)
    if form.format == "stablehlo":
        return stablehlo.runner(path, raw=form.raw)
    if form.format == "ncnn":
        return ncnn.runner(path, model)
    return openvino.runner(path) if form.format == "openvino" else onnx.runner(path)


def _smaller(model: Model, path: Path, form: _Form, calibration: Iterable[np.ndarray]) -> verify.Call:
    """Makes the file float16 or int8, in place, and returns the function that runs it."""
    half, source = form.dtype == "float16", path if form.format == "onnx" else _source(path)
    if form.format == "litert":
        litert.quantise(path)
    elif form.dtype == "int8":
        onnx.quantise(source, model, calibration, batch=max(form.batch, 1))
    elif form.format == "onnx":
        onnx.halve(path)
    if form.format == "openvino":
        openvino.write(source, path, half=half)
    elif form.format == "ncnn":
        ncnn.write(source, path, half=half)
    return _runner(model, path, form)


def _compare_int8(
    model: Model, call: verify.Call, samples: list[np.ndarray], form: _Form
) -> tuple[list[str], dict[str, str]]:
    """The share of detections that a model trained for int8 and its file have in common, as lines and metadata."""
    share, count = verify.check_int8(model, call, samples, raw=form.raw)
    same = f"{share:.1%} of {count}"
    told = [f"detections with a score of at least {verify.SURE:g} shared with the JAX model in int8: {same}"]
    return told, metadata.describe(model, form.format, raw=form.raw, batch=form.batch) | {
        "detections shared with JAX, int8": same
    }


def _compare(
    model: Model, call: verify.Call, samples: list[np.ndarray], form: _Form
) -> tuple[list[str], dict[str, str]]:
    """The largest difference from the JAX model, as lines and metadata."""
    facts = metadata.describe(model, form.format, raw=form.raw, batch=form.batch)
    sizes = (form.batch,) if form.batch else BATCHES
    found, tolerance = [], verify.STAGED if model.detector.head is None else verify.TOLERANCE
    if form.format == "ncnn":
        tolerance = ncnn.TOLERANCE
    for size in sizes:
        one = call if form.batch == 1 else verify.in_batches(call, size, raw=form.raw)
        found.append(verify.check(model, one, samples, raw=form.raw, tolerance=tolerance))
    worst = f"{max(one.difference for one in found):.2g}"
    batches = "" if form.batch == 1 else f", batches of {', '.join(map(str, sizes))}"
    told = [f"outputs: largest difference from the JAX model {worst} (float32, {len(samples)} images{batches})"]
    facts["largest difference from JAX, float32"] = worst
    if model.detector.masks and not form.raw:
        overlap = f"{min(one.mask_iou for one in found):.4f}"
        told.append(f"masks: smallest IoU with those of the JAX model {overlap}")
        facts["smallest IoU of masks with JAX, float32"] = overlap
    return told, facts


def _average_precision(what: str, model: Model, opened: arguments.Data, run: Program | None) -> dict[str, float]:
    """AP of boxes and masks in points; `what` is the bar's name, `run` as for `verify.average_precision`."""
    with contextlib.closing(opened.batches(model, batch_size=BATCH)) as batches:
        bar = tqdm(batches, total=-(-opened.split.size // BATCH), desc=what, unit="batch")
        found = verify.average_precision(model, opened.truth, bar, run=run)
    return {name: 100 * value for name, value in found.items()}


def _judged(
    before: dict[str, float], after: dict[str, float], dtype: str, budget: float
) -> tuple[dict[str, str], list[str]]:
    """AP in JAX and of the file, in points, for the metadata and as lines.

    Raises:
      UserError: the file loses more than the budget.
    """
    facts, lines = {}, []
    for name, value in before.items():
        if value - after[name] > budget:
            raise UserError(
                f"{dtype} loses {value - after[name]:.2f} points of {name} ({value:.2f} to {after[name]:.2f}), more "
                f"than --max-ap-loss={budget:g}: nothing was written"
            )
        facts |= {f"{name} of JAX": f"{value:.2f}", f"{name} of this file, {dtype}": f"{after[name]:.2f}"}
        change = round(after[name] - value, 2) + 0.0
        lines.append(f"{name}: {value:.2f} in JAX, {after[name]:.2f} in the file ({change:+.2f})")
    return facts, lines


def _generated(split: str, count: int) -> list[np.ndarray]:
    """The first generated images of a split."""
    images = (records.decode(encoded) for _, encoded in scenes.stream(split, count))
    return [image for image in images if image is not None]


def _calibration(source: _Source) -> tuple[Iterator[np.ndarray], list[str]]:
    """Images for calibration: of the training split or, if the data has none, of the split that AP is measured on.

    Returns:
      The images, and a line that tells the second case.
    """
    told, data = [], source.data or ""
    if data == "scenes":
        return iter(_generated("train", CALIBRATION)), told
    try:
        train = arguments.open_data(data, "train", "", "", CALIBRATION, source.orientation, classes=source.classes)
    except (UserError, FileNotFoundError) as error:
        if source.opened is None:
            raise
        train = source.opened
        told.append(f"calibrated on the split {source.split}, on which AP is measured too; the split train: {error}")
    return (image for _, image in itertools.islice(train.stream(), CALIBRATION)), told
