r"""One table a card: training step, distillation step of every method, forward, decode, loader, compilation, memory.

    python benchmarks/gpu.py                        # RTMDet-tiny from RTMDet-s, batch 32, 640 px
    python benchmarks/gpu.py --peer=PEER/bin/python --bench=BENCH     # beside mmdetection's RTMDet
    python benchmarks/gpu.py --detector=rtmdet_pico --teacher=rtmdet_micro --batch=2 --size=64 --methods=cwd --steps=3

Images, boxes and weights are random, so every score passes the threshold of NMS, which is its worst case. Each program
is compiled, called twice without being timed, and timed `--steps` times with the device synchronised: the median. The
distillation step has the teacher inside of it. The compile cache is empty at first (`--cache=DIR` takes a folder that
may be full) and shared by the programs, as by those of a run: later ones find what XLA has tuned for earlier ones, so
that the seconds of the first row are those of a cold start.

Memory: `planned` is the compiler's for the program alone; `peak` what the device has had in use at most so far, of all
programs up to this row. The loader makes batches of the embedded scenes, or of a folder in COCO layout (`--root`), with
Mosaic and MixUp, in a worker for each core.

The peer is mmdetection in the Python of `--peer`, with `oracle_common.py` in the folder `--bench` (peer_step_time.py):
its training step and its network alone, eager and under torch.compile, in turn with nothing else. Where it cannot be
imported, a line says so. It runs on any of JAX's platforms. `--log FILE` appends the table, with the versions, to a
Markdown file.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import loader
import numpy as np
import step_time
from method_cost import WARM, compiled, made_up_batch, megabytes, timed

from kdjax import detectors
from kdjax import methods as zoo
from kdjax.detectors.api import Detector, Tree
from kdjax.report import study
from kdjax.structs import Array, DetectorOutput, PyTree
from kdjax.training import config as settings
from kdjax.training import models, provenance, setup

HEADER = ["what", "precision", "ms", "images/s", "compiled in s", "planned MB", "peak MB"]
PARTS = ("step", "methods", "inference", "loader", "peer")
PEER = {
    "step": "mmdetection: training step",
    "forward": "mmdetection: forward, eager",
    "compiled": "mmdetection: forward, torch.compile",
}


def words(text: str) -> list[str]:
    """Splits at commas: "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="rtmdet_tiny", choices=detectors.names())
    parser.add_argument("--teacher", default="rtmdet_s", choices=detectors.names())
    parser.add_argument("--methods", type=words, default=zoo.names(), help="names, separated by commas; all by default")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=640, help="side of the images in pixels")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"], help="of step and forward")
    parser.add_argument("--dtype", default="", help="of the methods (bfloat16; on the CPU float32)")
    parser.add_argument("--parts", type=words, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--root", default="", help="a folder in COCO layout, for the loader")
    parser.add_argument("--cache", default="", help="folder of compiled programs")
    parser.add_argument("--peer", default=sys.executable, help="a Python that has mmdet")
    parser.add_argument("--bench", default="", help="the folder with oracle_common.py")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for given, known in ((args.methods, zoo.names()), (args.parts, PARTS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is unknown: choose among {', '.join(known)}")
    parts = {"step": steps, "methods": distilled, "inference": inference, "loader": loading, "peer": peer}
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        setup.prepare_process(args.cache or folder)
        for part in args.parts:
            for found in parts[part](args):
                if isinstance(found, str):
                    notes.append(found)
                else:
                    rows.append(found)
                print(found if isinstance(found, str) else study.table(HEADER, [cells(found)]), flush=True)
                jax.clear_caches()
                gc.collect()
    device = jax.devices()[0].device_kind
    study.publish(
        " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)]),
        [
            f"{device}: {args.detector}, teacher {args.teacher}, batch {args.batch}, {args.size} px, {args.classes} "
            f"classes, median of {args.steps}",
            study.table(HEADER, [cells(row) for row in rows]),
            *notes,
            study.facts(provenance.environment()),
        ],
        {"device": device, "rows": rows, "notes": notes},
        args.log,
    )


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; what is unknown is a dash."""
    numbers = ((row["ms"], ".2f"), (row["images_per_s"], ".0f"), (row.get("compile_s"), ".1f"))
    numbers += ((row.get("planned_mb"), ".0f"), (row.get("peak_mb"), ".0f"))
    return [row["what"], row["dtype"], *("-" if value is None else format(value, how) for value, how in numbers)]


def row_of(args: argparse.Namespace, what: str, dtype: str, seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    """What is known of one program, its median from its seconds."""
    median = statistics.median(seconds)
    known = {"what": what, "dtype": dtype, "ms": round(1000 * median, 3), "images_per_s": round(args.batch / median, 1)}
    return known | more


def on_device(
    args: argparse.Namespace, what: str, dtype: str, program: jax.stages.Compiled, seconds: Sequence[float], took: float
) -> dict[str, Any]:
    """`row_of` a compiled program of the device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    more = {"compile_s": round(took, 1), "planned_mb": round(megabytes(program), 1)}
    return row_of(args, what, dtype, seconds, **more, peak_mb=peak and round(peak / 1e6, 1))


def steps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Training steps of the student alone."""
    for dtype in args.dtypes:
        yield of_step(args, "training step", dtype)


def distilled(args: argparse.Namespace) -> Iterator[dict[str, Any] | str]:
    """Distillation steps, of each method that can compare the two."""
    student, teacher = (detectors.build(name, args.classes) for name in (args.detector, args.teacher))
    for name in args.methods:
        if why := zoo.refusal(name, student, teacher, (args.size, args.size)):
            yield f"Not on these detectors: {name} ({why})"
        else:
            yield of_step(args, f"distilled by {name}", args.dtype, teacher=args.teacher, method=name)


def of_step(args: argparse.Namespace, what: str, dtype: str, *, teacher: str = "", method: str = "") -> dict[str, Any]:
    """The row of a step that `step_time` builds."""
    kept = {name: getattr(args, name) for name in ("detector", "batch", "size", "classes")}
    step = argparse.Namespace(**kept, teacher=teacher, method=method, dtype=dtype, boxes=step_time.BOXES)
    built = step_time.build(step)
    seconds = [taken for taken, _ in step_time.steps(built, args.steps)]
    return on_device(args, what, dtype, built.program, seconds, built.compile_s)


def inference(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The network alone, from pixels to maps, in each precision; then decoding with NMS of what it returns."""
    plain = detectors.build(args.detector, args.classes)
    params, stats = plain.init(jax.random.PRNGKey(0))
    batch = made_up_batch(args.batch, args.size, args.classes)
    image, image_size = (jax.device_put(batch[name]) for name in ("image", "image_size"))
    for dtype in args.dtypes:
        detector = models.in_precision(plain, dtype)

        def forward(params: Tree, stats: Tree, image: Array, detector: Detector = detector) -> DetectorOutput:
            return detector.apply(params, stats, detector.preprocess(image), train=False)[0]

        row, output = of_program(args, "forward", dtype, forward, params, stats, image)
        yield row
    yield of_program(args, "decode with NMS", args.dtypes[-1], plain.decode, output, image_size)[0]


def of_program(
    args: argparse.Namespace, what: str, dtype: str, function: Callable[..., Any], *given: PyTree
) -> tuple[dict[str, Any], Any]:
    """The row of a function of arrays, and what it returns."""
    since = time.perf_counter()
    program = compiled(function, *given)
    compile_s, seconds = time.perf_counter() - since, []
    for _ in range(WARM + args.steps):
        taken, result = timed(program, *given)
        seconds.append(taken)
    return on_device(args, what, dtype, program, seconds[WARM:], compile_s), result


def loading(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches of the loader with Mosaic and MixUp."""
    config = settings.base().data
    config.image_size, config.workers = (args.size, args.size), os.cpu_count() or 1
    config.augment = settings.augment(**loader.MIXED)
    if args.root:
        config.update(dict(source="coco_folder", root=args.root))
    with tempfile.TemporaryDirectory() as config.cache:
        taken, _ = loader.measure(config, args.batch, args.steps, True)
    yield row_of(args, f"loader, {config.workers} workers", "uint8", [taken / args.steps])


def peer(args: argparse.Namespace) -> Iterator[dict[str, Any] | str]:
    """Mmdetection's step and network, each in a process of its own; a sentence where it cannot be run."""
    imported = subprocess.run([args.peer, "-c", "import mmdet"], capture_output=True, text=True)
    if imported.returncode or not args.bench:
        why = "--bench is not given" if not imported.returncode else f"mmdet cannot be imported in {args.peer}"
        yield f"mmdetection is not in the table: {why}"
        return
    cuda = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "batch.npz"
        np.savez(data, **made_up_batch(args.batch, args.size, args.classes))
        script = str(Path(__file__).with_name("peer_step_time.py"))
        for mode, what in PEER.items():
            for dtype in args.dtypes:
                flags = [f"--bench={args.bench}", f"--data={data}", f"--device={cuda}", f"--mode={mode}"]
                flags += [f"--dtype={dtype}", f"--detector={args.detector}", f"--batch={args.batch}"]
                flags += [f"--size={args.size}", f"--steps={args.steps}", f"--threads={os.cpu_count()}"]
                done = subprocess.run([args.peer, script, *flags], capture_output=True, text=True)
                if done.returncode:
                    yield f"{what}, {dtype}: it failed: {done.stderr.strip().splitlines()[-1]}"
                    continue
                yield row_of(args, what, dtype, [json.loads(done.stdout.splitlines()[-1])["median_s"]])


if __name__ == "__main__":
    main()
