"""`kdjax export`: a model as ONNX (float32, int8), LiteRT or StableHLO, compared with the JAX model."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kdjax.commands import arguments
from kdjax.data import records, scenes
from kdjax.errors import UserError
from kdjax.export import graphs, litert, metadata, onnx, packages, stablehlo, verify
from kdjax.files import write_json
from kdjax.inference.model import BATCH, Model
from kdjax.inference.predict import Program

SAMPLES = 8  # images on which outputs are compared
CALIBRATION = 64  # images that int8 is calibrated on
BUDGET = {"float32": 0.1, "int8": 1.0}  # points of AP


def run(
    *,
    model: str,
    format: str,
    out: str,
    data: str | None,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    exif: str | None,
    classes: str = "",
    dtype: str,
    raw: bool,
    max_ap_loss: float | None,
) -> int:
    """Exports a model; the file appears only if it passes the comparison.

    Args:
      model: see `kdjax.inference.load`.
      format: "onnx", "litert" or "stablehlo".
      out: the file.
      data: to compare and measure on, as for `kdjax evaluate`; None compares on generated images.
      split: of the data.
      annotations: the json, where it is not at its usual place.
      images: the images, where they are not at their usual place.
      limit: only the first images; 0 takes all.
      classes: see `arguments.open_data`.
      exif: see `arguments.open_data`; None: as the model was trained.
      dtype: "float32", or "int8" (ONNX; calibrated on images of the split train, if the data has one).
      raw: the head's maps instead of detections.
      max_ap_loss: largest loss in points of AP; None is `BUDGET`.

    Returns:
      Exit code 0.

    Raises:
      UserError: something is missing, or the exported model differs too much: in its outputs or in AP.
    """
    if dtype == "int8" and (format != "onnx" or not data):
        raise UserError("--dtype=int8 needs --format=onnx and --data=DIR, for calibration and AP")
    if max_ap_loss is not None and not data:
        raise UserError("--max-ap-loss needs --data=DIR, on which AP is measured")
    target = arguments.output_file(out)
    if format != "onnx":
        arguments.output_file(f"{out}.json")  # its metadata
    if format in ("onnx", "litert"):
        packages.check_installed(packages.ONNX if format == "onnx" else packages.LITERT)
    loaded = arguments.load_model(model)
    graphs.check(loaded, raw=raw, nms=format != "litert")
    exif = exif or loaded.exif_orientation
    opened = arguments.open_data(data, split, annotations, images, limit, exif, classes=classes) if data else None
    if opened:
        loaded = arguments.match_classes(loaded, opened)
        samples = [image for _, image in itertools.islice(opened.stream(), SAMPLES)]
    else:
        samples = _generated("val", SAMPLES)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        made = Path(folder) / target.name
        call = _write(loaded, made, format, raw=raw)
        agreement = verify.check(loaded, call, samples, raw=raw)
        worst = f"{agreement.difference:.2g}"
        told = [f"outputs: largest difference from the JAX model {worst} (float32, {len(samples)} images)"]
        facts = metadata.describe(loaded, raw=raw, nms=format != "litert")
        facts["largest difference from JAX, float32"] = worst
        if loaded.detector.masks and not raw:
            told.append(f"masks: smallest IoU with those of the JAX model {agreement.mask_iou:.4f}")
            facts["smallest IoU of masks with JAX, float32"] = f"{agreement.mask_iou:.4f}"
        if dtype == "int8":
            calibration, source = _calibration(data or "", split, exif, classes, opened)
            told += source
            onnx.quantise(made, loaded, calibration)
            call = onnx.runner(made)
        if opened:
            budget = BUDGET[dtype] if max_ap_loss is None else max_ap_loss
            measured, lines = _measure(loaded, call, opened, raw=raw, dtype=dtype, budget=budget)
            facts |= measured
            told += lines
            facts["AP measured on"] = f"{opened.name}, {split}, {opened.split.size} images"
        facts["dtype"] = dtype
        if format == "onnx":
            onnx.add_metadata(made, facts)
        else:
            write_json(target.with_name(target.name + ".json"), facts)
        made.replace(target)
    print(*told, sep="\n")
    print(f"{out}: {target.stat().st_size:,} bytes, {facts['input']}")
    return 0


def _write(model: Model, path: Path, format: str, *, raw: bool) -> verify.Call:
    """Writes the file, and returns the function that runs it."""
    if format == "litert":
        litert.write(model, path, raw=raw)
        return litert.runner(path, model, raw=raw)
    if format == "onnx":
        onnx.write(model, path, raw=raw)
        return onnx.runner(path)
    stablehlo.write(model, path, raw=raw)
    return stablehlo.runner(path, raw=raw)


def _measure(
    model: Model, call: verify.Call, opened: arguments.Data, *, raw: bool, dtype: str, budget: float
) -> tuple[dict[str, str], list[str]]:
    """AP of boxes and masks before and after, in points, for the metadata and as lines."""

    def average_precision(what: str, run: Program | None) -> dict[str, float]:
        with contextlib.closing(opened.batches(model, batch_size=BATCH)) as batches:
            bar = tqdm(batches, total=-(-opened.split.size // BATCH), desc=what, unit="batch")
            found = verify.average_precision(model, opened.truth, bar, run=run)
        return {name: 100 * value for name, value in found.items()}

    jax_model = average_precision("JAX", None)
    exported = average_precision("exported", verify.as_program(model, call, raw=raw))
    facts, lines = {}, []
    for name, before in jax_model.items():
        after = exported[name]
        if before - after > budget:
            raise UserError(
                f"{dtype} loses {before - after:.2f} points of {name} ({before:.2f} to {after:.2f}), more than "
                f"--max-ap-loss={budget:g}: nothing was written"
            )
        facts |= {f"{name} of JAX": f"{before:.2f}", f"{name} of this file, {dtype}": f"{after:.2f}"}
        lines.append(f"{name}: {before:.2f} in JAX, {after:.2f} in the file ({round(after - before, 2) + 0.0:+.2f})")
    return facts, lines


def _generated(split: str, count: int) -> list[np.ndarray]:
    """The first generated images of a split."""
    images = (records.decode(encoded) for _, encoded in scenes.stream(split, count))
    return [image for image in images if image is not None]


def _calibration(
    data: str, split: str, exif: str, classes: str, opened: arguments.Data | None
) -> tuple[Iterator[np.ndarray], list[str]]:
    """Images for calibration: of the training split or, if the data has none, of the split that AP is measured on.

    Returns:
      The images, and a line that tells the second case.
    """
    told = []
    if data == "scenes":
        return iter(_generated("train", CALIBRATION)), told
    try:
        train = arguments.open_data(data, "train", "", "", CALIBRATION, exif, classes=classes)
    except (UserError, FileNotFoundError):
        if opened is None:
            raise
        train = opened
        told.append(f"calibrated on the split {split}, on which AP is measured too: {data} has no usable split train")
    return (image for _, image in itertools.islice(train.stream(), CALIBRATION)), told
