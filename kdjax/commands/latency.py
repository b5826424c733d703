"""`kdjax latency`: how big and how fast models are, one table."""

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kdjax import weights
from kdjax.commands import export
from kdjax.evals import complexity
from kdjax.files import write_json
from kdjax.inference import model as loading

WARM_UP = 20  # runs


def run(*, models: list[str], threads: int | None, runs: int, out: str | None) -> int:
    """Times the network, from the normalisation to the head's maps, on one image at a time.

    Args:
      models: each as `kdjax.inference.model.load` takes it, or an ONNX or LiteRT file, which is timed as it is.
      threads: cores that are used; None: all that this process may use.
      runs: that are timed.
      out: a json file to write, or None.

    Returns:
      Exit code 0.

    Raises:
      ValueError: no such model, or a number that cannot be.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if runs < 1 or not 1 <= (cores if threads is None else threads) <= cores:
        raise ValueError(f"--runs={runs} must be at least 1, and --threads={threads} in 1 .. {cores}.")
    threads, target = threads or cores, Path(out).expanduser() if out else None
    if target and target.is_dir():
        raise ValueError(f"--out={out} is a folder, but names the file to write.")
    if target:
        loading.check_out(str(target.parent))
    with only(threads):  # before the first array: XLA starts its threads then
        files = {path: None if path.endswith((".onnx", ".tflite")) else loading.load(path) for path in models}
        for path, loaded in files.items():
            if loaded is None:
                file_of_others(Path(path))
        rows = [row for path, loaded in files.items() for row in measure(path, loaded, threads=threads, runs=runs)]
    print(table(rows))
    print(
        f"\nOne image, {threads} {'thread' if threads == 1 else 'threads'}, {runs} runs after {WARM_UP} to warm up; "
        "a folder's network without decoding, files as they are."
    )
    if missing := export.missing():
        print(f"Without onnxruntime's times, for want of {', '.join(missing)}: pip install 'kdjax[export]'.")
    if target:
        write_json(target, {"threads": threads, "runs": runs, "warm_up": WARM_UP, "rows": rows})
    return 0


def measure(path: str, model: loading.Model | None, *, threads: int, runs: int) -> Iterator[dict]:
    """The rows of a model: model, runtime, height, width, params, flops, bytes, and milliseconds median, p25, p75.

    Args:
      path: its name in the table; an ONNX or LiteRT file if `model` is None.
      model: what is timed in XLA, and, where the converter is there, in onnxruntime.
      threads: of onnxruntime; XLA takes the cores that the process has.
      runs: that are timed.
    """
    if model is None:
        runtime, call, shape, facts = file_of_others(Path(path), threads=threads)
        yield {
            "model": path,
            "runtime": runtime,
            "image_size": shape[2:] if shape[1] == 3 else shape[1:3],  # channels last as in ours, or first
            "params": int(facts["parameters"]) if "parameters" in facts else None,
            "flops": int(facts["flops"]) if "flops" in facts else None,
            "bytes": Path(path).stat().st_size,
        } | clock(call, runs, path)
        return
    image = np.full((1, *model.image_size, 3), 100, np.uint8)
    row = {"model": path, "image_size": list(model.image_size), "params": complexity.parameters(model.variables[0])}
    row["flops"] = complexity.flops(model.detector, model.image_size)
    network = jax.jit(functools.partial(export.maps, model))
    held = jnp.asarray(image)
    file = model.folder / weights.WEIGHTS  # which an unfinished run has yet to write
    stored = file.stat().st_size if file.exists() else sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables))
    yield row | {"runtime": "XLA", "bytes": stored} | clock(lambda: jax.block_until_ready(network(held)), runs, path)
    if export.missing():
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export.write_onnx(model, file, raw=True)
        session = export.session(file, threads=threads)
        times = clock(lambda: session.run(None, {"image": image}), runs, path)
        yield row | {"runtime": "onnxruntime", "bytes": file.stat().st_size} | times


def clock(call: Callable, runs: int, name: str) -> dict[str, float]:
    """Milliseconds of a call: median and quartiles over `runs`, after some that are not timed."""
    times = []
    for i in tqdm(range(-WARM_UP, runs), desc=name, unit="run", leave=False):
        begun = time.perf_counter()
        call()
        if i >= 0:
            times.append(1e3 * (time.perf_counter() - begun))
    p25, median, p75 = np.percentile(times, (25, 50, 75)).tolist()
    return {"median": median, "p25": p25, "p75": p75}


def table(rows: list[dict]) -> str:
    """The rows of `measure` as text for a terminal."""
    text = [["model", "runtime", "canvas", "params M", "FLOPs G", "file MB", "median ms", "quartiles ms"]]
    for row in rows:
        height, width = row["image_size"]
        counts = [
            "–" if row[key] is None else f"{row[key] / unit:.3f}" for key, unit in (("params", 1e6), ("flops", 1e9))
        ]
        times = [f"{row['median']:.2f}", f"{row['p25']:.2f} .. {row['p75']:.2f}"]
        text.append([row["model"], row["runtime"], f"{height}x{width}", *counts, f"{row['bytes'] / 1e6:.2f}", *times])
    return loading.aligned(text)


@contextlib.contextmanager
def only(threads: int) -> Iterator[None]:
    """Keeps this process on so many of its cores: XLA takes as many threads when it starts."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def file_of_others(path: Path, *, threads: int = 1) -> tuple[str, Callable, list[int], dict]:
    """An ONNX or LiteRT file, which has been run once.

    Args:
      path: the file; the first extent of an input is the batch, 1 where it is free.
      threads: that compute an operator.

    Returns:
      (runtime, call, shape of the image, facts that `kdjax export` wrote).

    Raises:
      ValueError: the file cannot be read, takes no image, leaves its size free, or does not run.
    """
    runtime, load = ("LiteRT", _litert) if path.suffix == ".tflite" else ("onnxruntime", _onnx)
    inputs, run, facts = load(path, threads)
    shapes = {name: shape for name, (shape, _) in inputs.items()}
    if not any(len(shape) == 4 for shape in shapes.values()):
        raise ValueError(f"--model={path} takes no image: none of its inputs has four extents ({shapes}).")
    if free := [name for name, shape in shapes.items() if not all(isinstance(side, int) for side in shape[1:])]:
        what = f"the size of {free[0]} free ({shapes[free[0]]})"
        raise ValueError(f"--model={path} leaves {what}: export it with a fixed one.")
    shapes = {name: [side if isinstance(side, int) else 1 for side in shape] for name, shape in shapes.items()}
    call = functools.partial(run, {name: np.full(shape, 100, inputs[name][1]) for name, shape in shapes.items()})
    try:
        call()
    except Exception as error:  # whatever its bindings raise
        raise ValueError(f"--model={path} does not run: {str(error).splitlines()[0]}") from error
    return runtime, call, next(shape for shape in shapes.values() if len(shape) == 4), facts


def _onnx(path: Path, threads: int) -> tuple[dict, Callable, dict]:
    """{input: (shape, dtype)}, a function of {input: array}, and the facts."""
    export.check_installed(("onnxruntime",))
    session = export.session(path, threads=threads)
    kinds = {"tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
    inputs = {entry.name: (list(entry.shape), kinds.get(entry.type, np.float32)) for entry in session.get_inputs()}
    return inputs, functools.partial(session.run, None), session.get_modelmeta().custom_metadata_map


def _litert(path: Path, threads: int) -> tuple[dict, Callable, dict]:
    """As `_onnx`; the facts lie beside the file."""
    export.check_installed(("ai_edge_litert",))
    interpreter = export.interpreter(path, threads=threads)
    inputs = {entry["name"]: entry for entry in interpreter.get_input_details()}

    def run(feed: dict) -> None:
        for name, value in feed.items():
            interpreter.set_tensor(inputs[name]["index"], value)
        interpreter.invoke()

    beside = path.with_name(f"{path.name}.json")
    shapes = {name: (entry["shape"].tolist(), entry["dtype"]) for name, entry in inputs.items()}
    return shapes, run, json.loads(beside.read_text()) if beside.exists() else {}
