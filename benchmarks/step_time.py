"""How long is a training step? One detector alone, or distilled from a teacher by a method; images are random.

    python benchmarks/step_time.py --detector=rtmdet_tiny --batch=8 --size=320
    python benchmarks/step_time.py --detector=rtmdet_tiny --teacher=rtmdet_s --method=cwd --dtype=bfloat16

It times the update with the teacher inside of it (a run has it ahead: teacher_cache.py), after compilation and two
warm-up steps, and prints a line of text; the last line is one JSON object with the median, the quartiles and the least
time in seconds, images/s at the median, the seconds of compilation (few if the program is in the cache), the compiler's
estimate of the step's memory, and the largest memory of the process.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from method_cost import BOXES, WARM, compiled, made_up_batch, megabytes, timed

from kdjax import detectors
from kdjax import methods as zoo
from kdjax.distill import Distiller
from kdjax.structs import Array
from kdjax.training import config as settings
from kdjax.training import models, optim, provenance, setup
from kdjax.training.step import TeacherVariables, init_state, make_step


class Built(NamedTuple):
    """A compiled step and what it is called with."""

    program: object
    state: object
    variables: object
    batch: dict
    student: object
    teacher: object
    compile_s: float = 0.0  # seconds of tracing, lowering and compiling


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    args = parse(parser, arguments)
    setup.prepare_process("")
    built = build(args)
    seconds = [taken for taken, _ in steps(built, args.steps)]
    low, middle, high = statistics.quantiles(seconds, n=4)
    found = {
        "median_s": round(middle, 5),
        "quartiles_s": [round(low, 5), round(high, 5)],
        "least_s": round(min(seconds), 5),
        "images_per_s": round(args.batch / middle, 2),
        "compile_s": round(built.compile_s, 1),
        "memory_mb": round(megabytes(built.program), 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }
    print(f"{title(args)}: {1000 * middle:.0f} ms a step, {found['images_per_s']:.1f} images/s")
    print(json.dumps(vars(args) | found | provenance.environment()))


def parser_of(text: str) -> argparse.ArgumentParser:
    """What a step is described by."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="rtmdet_tiny", choices=detectors.names())
    parser.add_argument("--teacher", default="", choices=["", *detectors.names()])
    parser.add_argument("--method", default="", choices=["", *zoo.names()])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=BOXES, help="ground-truth boxes per image, padding included")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    if bool(args.teacher) != bool(args.method):
        parser.error("a distillation step needs both --teacher and --method")
    return args


def title(args: argparse.Namespace) -> str:
    """The step in words."""
    what = f"{args.detector} {args.dtype}, batch {args.batch}, {args.size} px"
    return what + (f", {args.method} from {args.teacher}" if args.method else "")


def build(args: argparse.Namespace) -> Built:
    """The update of the student, with random weights and images."""
    student = detectors.build(args.detector, args.classes)
    teacher = detectors.build(args.teacher, args.classes) if args.teacher else None
    key, adapters, variables = jax.random.PRNGKey(0), {}, None
    methods = [zoo.build(args.method)] if args.method else []
    if teacher:
        adapters = Distiller(student, teacher, methods).init(key, (args.size, args.size))
        variables = TeacherVariables(*teacher.init(jax.random.PRNGKey(1)))
    config = settings.base()
    config.steps = 100_000
    optimizer = optim.optimizer(config, lambda params: jax.tree.map(lambda leaf: leaf.ndim <= 1, params))
    state = init_state(student, key, None, adapters, optimizer)
    student = models.in_precision(student, args.dtype)
    teacher = models.in_precision(teacher, args.dtype) if teacher else None
    distiller = Distiller(student, teacher, methods) if teacher else None
    step = make_step(student, optimizer, lambda at: optim.ema_rate(config, at), distiller=distiller)
    masks = bool(student.masks)
    batch = made_up_batch(args.batch, args.size, args.classes, args.boxes, masks=masks)
    batch = jax.tree.map(jax.numpy.asarray, batch)
    since = time.perf_counter()
    program = compiled(step, state, variables, batch, donate=True)
    return Built(program, state, variables, batch, student, teacher, time.perf_counter() - since)


def steps(built: Built, count: int) -> Iterator[tuple[float, dict[str, Array]]]:
    """Seconds and metrics of each step, after two that warm up."""
    state = built.state
    for i in range(-WARM, count):
        taken, (state, metrics) = timed(built.program, state, built.variables, built.batch)
        if i >= 0:
            yield taken, metrics


if __name__ == "__main__":
    main()
