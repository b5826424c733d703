"""`kdjax latency`: a table of the size and the speed of models."""

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kdjax import weights
from kdjax.commands import arguments
from kdjax.errors import UserError
from kdjax.evals import complexity
from kdjax.export import graphs, litert, metadata, ncnn, onnx, openvino, packages
from kdjax.files import write_json
from kdjax.inference import onnx_file
from kdjax.inference.model import Model

WARM_UP = 20  # runs


def run(*, models: list[str], threads: int | None, runs: int, out: str | None) -> int:
    """Times the network, from the normalisation to the head's maps, one image at a time.

    Args:
      models: each as for `kdjax.inference.load`, or an exported file (a suffix of `READERS`), which is timed as it is,
        or a folder of such files.
      threads: number of cores; None: all that this process may use.
      runs: number of timed runs.
      out: a json file to write, or None.

    Returns:
      Exit code 0.

    Raises:
      UserError: there is no such model, or a number is out of range.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if runs < 1:
        raise UserError(f"--runs must be >= 1, not {runs}")
    if threads is not None and not 1 <= threads <= cores:
        raise UserError(f"--threads must be in 1 .. {cores}, not {threads}")
    threads = threads or cores
    paths = [path for model in models for path in expanded(model)]
    read = [str(part) for path in paths for part in (path, *parts_of(Path(path)), metadata.place(Path(path)))]
    target = arguments.output_file(out, inputs=read) if out else None
    if target and target.exists() and not _is_own(target):
        raise UserError(f"--out: {out} is there, and `kdjax latency` did not write it: choose another name")
    with only(threads):  # before the first array: XLA starts its threads then
        files = {path: None if path.endswith(tuple(READERS)) else arguments.load_model(path) for path in paths}
        for path, loaded in files.items():
            if loaded is None:
                exported_file(Path(path))
        rows = [row for path, loaded in files.items() for row in measure(path, loaded, threads=threads, runs=runs)]
    if target:
        write_json(target, {"threads": threads, "runs": runs, "warm_up": WARM_UP, "rows": rows})
    print(table(rows))
    print(
        f"\nTimes of one image, a batch's divided by its images; {threads} {'thread' if threads == 1 else 'threads'}, "
        f"{runs} runs after {WARM_UP} to warm up. "
        "Models in folders are timed without decoding (with it if they have two stages or queries), exported files "
        "as they are."
    )
    if any(files.values()) and (missing := packages.missing()):
        print(f"onnxruntime timings skipped (missing: {', '.join(missing)}): pip install 'kdjax[export]'")
    return 0


def expanded(path: str) -> list[str]:
    """A model's folder, if there is a model in it, and the exported files in it; anything else as it is.

    Raises:
      UserError: it is a file of another kind.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.name != weights.WEIGHTS and folder.suffix not in READERS:
        raise UserError(f"--model={path}: files that are timed end with {', '.join(READERS)}")
    found = sorted(str(file) for file in folder.iterdir() if file.suffix in READERS) if folder.is_dir() else []
    models = (weights.WEIGHTS, "student", "checkpoints")
    loads = not found or any((folder / name).exists() for name in models)
    return [path] * loads + found


def _is_own(file: Path) -> bool:
    """Whether a file was written by this command."""
    try:
        return {"threads", "runs", "warm_up", "rows"} <= set(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        return False


def measure(path: str, model: Model | None, *, threads: int, runs: int) -> Iterator[dict[str, Any]]:
    """The rows of a model: model, runtime, batch, image_size, params, flops, bytes, and median, p25, p75.

    These are milliseconds of one image: those of a batch divided by its images.

    Args:
      path: its name in the table; an exported file if `model` is None.
      model: is timed in XLA, and in onnxruntime if the packages of ONNX are installed.
      threads: number of threads of onnxruntime; XLA uses the cores that the process has.
      runs: number of timed runs.
    """
    if model is None:
        runtime, call, shape, facts = exported_file(Path(path), threads=threads)
        yield {
            "model": path,
            "runtime": runtime,
            "batch": shape[0],
            "image_size": shape[2:] if shape[1] in (1, 3) else shape[1:3],  # kdjax's exports have channels last
            "params": int(facts["parameters"]) if "kdjax" in facts else None,
            "flops": int(facts["flops"]) if "kdjax" in facts else None,
            "bytes": sum(file.stat().st_size for file in (Path(path), *parts_of(Path(path)))),
        } | {key: value / shape[0] for key, value in clock(call, runs, path).items()}
        return
    image = np.full((1, *model.image_size, 3), 100, np.uint8)
    row: dict[str, Any] = {"model": path, "batch": 1, "image_size": list(model.image_size)}
    row["params"] = complexity.parameters(model.variables[0])
    row["flops"] = complexity.flops(model.detector, model.image_size)
    raw = model.detector.head is not None
    network = jax.jit(functools.partial(graphs.maps if raw else graphs.detections, model))
    feed = {"image": image} if raw else {"image": image, "image_size": np.array([model.image_size], np.int32)}
    held = [jnp.asarray(value) for value in feed.values()]
    file = model.path / weights.WEIGHTS  # a run that is not finished has none yet
    stored = file.stat().st_size if file.exists() else sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables))
    yield row | {"runtime": "XLA", "bytes": stored} | clock(lambda: jax.block_until_ready(network(*held)), runs, path)
    if packages.missing():
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.write(model, file, raw=raw)
        session = onnx.session(file, threads=threads)
        times = clock(lambda: session.run(None, feed), runs, path)
        yield row | {"runtime": "onnxruntime", "bytes": file.stat().st_size} | times


def clock(call: Callable[[], object], runs: int, name: str) -> dict[str, float]:
    """Median and quartiles of the time of a call in milliseconds, over `runs` after `WARM_UP` that are not timed."""
    times = []
    for i in tqdm(range(-WARM_UP, runs), desc=name, unit="run", leave=False):
        begun = time.perf_counter()
        call()
        if i >= 0:
            times.append(1e3 * (time.perf_counter() - begun))
    p25, median, p75 = np.percentile(times, (25, 50, 75)).tolist()
    return {"median": median, "p25": p25, "p75": p75}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure` as text for a terminal."""
    text = [["model", "runtime", "batch", "canvas", "params M", "FLOPs G", "file MB", "median ms", "quartiles ms"]]
    for row in rows:
        height, width = row["image_size"]
        counts = [
            "–" if row[key] is None else f"{row[key] / unit:.3f}" for key, unit in (("params", 1e6), ("flops", 1e9))
        ]
        times = [f"{row['median']:.2f}", f"{row['p25']:.2f} .. {row['p75']:.2f}"]
        shape = [str(row["batch"]), f"{height}x{width}"]
        text.append([row["model"], row["runtime"], *shape, *counts, f"{row['bytes'] / 1e6:.2f}", *times])
    return arguments.aligned(text)


@contextlib.contextmanager
def only(threads: int) -> Iterator[None]:
    """Restricts this process to `threads` of its cores: XLA starts one thread for each core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def exported_file(path: Path, *, threads: int = 1) -> tuple[str, Callable[[], object], list[int], dict[str, str]]:
    """An exported file, which is run once to check it.

    Args:
      path: the file; the first dimension of an input is the batch, 1 where it is not fixed.
      threads: number of threads that compute an operator.

    Returns:
      (runtime, function that runs it, shape of the image, metadata that `kdjax export` wrote).

    Raises:
      UserError: the file cannot be read, takes no image, does not fix its size, or does not run.
    """
    if not path.is_file():
        raise UserError(f"--model={path}: there is no such file")
    runtime, load = READERS[path.suffix]
    inputs, run, facts = load(path, threads)
    shapes = {name: shape for name, (shape, _) in inputs.items()}
    if not any(len(shape) == 4 for shape in shapes.values()):
        raise UserError(f"--model={path}: it takes no image: none of its inputs has four dimensions ({shapes})")
    if free := [name for name, shape in shapes.items() if not all(isinstance(side, int) for side in shape[1:])]:
        what = f"the size of {free[0]} is not fixed ({shapes[free[0]]})"
        raise UserError(f"--model={path}: {what}: export it with a fixed one")
    shapes = {name: [side if isinstance(side, int) else 1 for side in shape] for name, shape in shapes.items()}
    call = functools.partial(run, {name: np.full(shape, 100, inputs[name][1]) for name, shape in shapes.items()})
    try:
        call()
    except Exception as error:  # the bindings raise many kinds of errors
        raise UserError(f"--model={path}: it does not run: {str(error).splitlines()[0]}") from error
    return runtime, call, next(shape for shape in shapes.values() if len(shape) == 4), facts


Inputs = dict[str, tuple[list[Any], Any]]  # (shape, dtype) by name


def _onnx(path: Path, threads: int) -> tuple[Inputs, Callable[[dict[str, Any]], object], dict[str, str]]:
    """The inputs, a function of {input: array}, and the metadata."""
    packages.check_installed(("onnxruntime",))
    session = onnx.session(path, threads=threads)
    inputs = {}
    for entry in session.get_inputs():
        if entry.type not in onnx_file.DTYPES:
            kinds = ", ".join(onnx_file.DTYPES)
            raise UserError(
                f"--model={path}: its input {entry.name!r} is of {entry.type}: those that can be timed are {kinds}"
            )
        inputs[entry.name] = list(entry.shape), onnx_file.DTYPES[entry.type]
    return inputs, functools.partial(session.run, None), session.get_modelmeta().custom_metadata_map


def _litert(path: Path, threads: int) -> tuple[Inputs, Callable[[dict[str, Any]], object], dict[str, str]]:
    """As `_onnx`; the metadata is in a json beside the file."""
    packages.check_installed(("ai_edge_litert",))
    interpreter = litert.interpreter(path, threads=threads)
    inputs = {entry["name"]: entry for entry in interpreter.get_input_details()}

    def run(feed: dict[str, Any]) -> None:
        for name, value in feed.items():
            interpreter.set_tensor(inputs[name]["index"], value)
        interpreter.invoke()

    shapes = {name: (entry["shape"].tolist(), entry["dtype"]) for name, entry in inputs.items()}
    return shapes, run, metadata.beside(path)


def _openvino(path: Path, threads: int) -> tuple[Inputs, Callable[[dict[str, Any]], object], dict[str, str]]:
    """As `_onnx`."""
    packages.check_installed(packages.OPENVINO)
    network = openvino.compiled(path, threads=threads)
    inputs = {}
    for entry in network.inputs:
        sides = [side.get_length() if side.is_static else None for side in entry.get_partial_shape()]
        inputs[entry.get_any_name()] = (sides, entry.get_element_type().to_dtype())
    return inputs, network, openvino.metadata(path)


def _ncnn(path: Path, threads: int) -> tuple[Inputs, Callable[[dict[str, Any]], object], dict[str, str]]:
    """As `_onnx`; sizes and names are in the json beside the file."""
    packages.check_installed(("ncnn",))
    network = ncnn.network(path, threads=threads)
    facts = metadata.beside(path)
    if "kdjax" not in facts:
        told = f"{metadata.place(path).name}, which `kdjax export` writes, does not lie beside it"
        raise UserError(f"--model={path}: {told}")
    names = facts["output"].partition(":")[0].split(", ")
    shape: list[Any] = [1, *json.loads(facts["image_size"]), 3]

    def run(feed: dict[str, Any]) -> None:
        ncnn.outputs(network, feed["image"], names)

    return {"image": (shape, np.uint8)}, run, facts


def parts_of(path: Path) -> list[Path]:
    """The other files of an exported one, with its weights; most formats have none."""
    if path.suffix in (".xml", ".param"):
        found = [path.with_suffix(".bin")]
    else:
        found = onnx_file.parts_of(path) if path.suffix == ".onnx" else []
    return [part for part in found if part.is_file()]


READERS: dict[str, tuple[str, Callable[..., Any]]] = {
    ".onnx": ("onnxruntime", _onnx),
    ".xml": ("OpenVINO", _openvino),
    ".param": ("NCNN", _ncnn),
    ".tflite": ("LiteRT", _litert),
}
