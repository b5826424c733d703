"""What does an automatic weight cost? The time of a measurement of the gradient's shares relative to a training step.

    python benchmarks/auto_weight.py --student=rtmdet_micro --teacher=rtmdet_tiny --size=320 --batch=8

Three programs run in turn, as a run with `config.methods.NAME.weight=auto` has them, so that other load on the machine
affects all of them: the teacher's forward pass, the measurement (`kdjax/training/auto_weight.py`), and the student's
update. A step is the first and the last together.

`relative` is the time of a measurement over that of a step, the median over the rounds with the quartiles; `overhead`
is `relative` over `config.auto_weight.every` (its default, or --every), what the measurements add to the time of a long
run; `first` is that of the first 1,000 steps, which have more of them at the start. Several methods at once are joined
by +; all of them have weights of their own.

Images, boxes and weights are random: the time does not depend on them. The last lines are a table and one JSON object;
`--log FILE` appends both, with the versions, to a Markdown file.
"""

import argparse
import functools
import gc
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
from method_cost import WARM, compiled, made_up_batch, pair_parser, timed

from kdjax import detectors
from kdjax import methods as zoo
from kdjax.distill import Distiller
from kdjax.distill.teachers import RECORDED
from kdjax.report import study
from kdjax.training import auto_weight, optim, provenance, setup
from kdjax.training import config as settings
from kdjax.training.step import TeacherVariables, init_state, make_step

STEPS = 1000  # of the run whose start `first` counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = pair_parser(__doc__)
    parser.add_argument("--methods", default="mkd,cwd,pkd,ssim,rtmdet_cwd,mkd+cwd+pkd", help="separated by commas")
    parser.add_argument("--every", type=int, default=settings.base().auto_weight.every)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)
    choices = args.methods.split(",")
    for name in (name for choice in choices for name in choice.split("+")):
        if name not in zoo.names():
            parser.error(f"there is no method {name!r}; the methods are: {', '.join(zoo.names())}")
    setup.prepare_process("")
    rows = []
    for choice in choices:
        rows.append(measure(choice, args))
        print(f"{choice}: {rows[-1]['relative']:.3f}", flush=True)
        jax.clear_caches()
        gc.collect()
    study.publish(
        f"python benchmarks/auto_weight.py --student={args.student} --teacher={args.teacher} --size={args.size} "
        f"--batch={args.batch} --every={args.every}",
        [table(rows), f"{study.facts(provenance.environment())}; {args.rounds} rounds, {args.classes} classes"],
        {"rows": rows},
        args.log,
    )


def measure(choice: str, args: argparse.Namespace) -> dict:
    """The row of some methods at once."""
    names = choice.split("+")
    config = settings.base()
    config.batch_size, config.steps = args.batch, 100_000
    with config.unlocked():
        config.methods = {name: {"weight": auto_weight.AUTO} for name in names}
    student, teacher = (detectors.build(name, args.classes) for name in (args.student, args.teacher))
    batch = made_up_batch(args.batch, args.size, args.classes, masks=bool(student.masks))
    batch = jax.tree.map(jax.numpy.asarray, batch)
    key = jax.random.PRNGKey(0)
    variables = TeacherVariables(*teacher.init(jax.random.PRNGKey(1)))
    distiller = Distiller(student, teacher, [zoo.build(name) for name in names])
    optimizer = optim.optimizer(config, lambda params: jax.tree.map(lambda leaf: leaf.ndim <= 1, params))
    adapters, weights = distiller.init(key, (args.size, args.size)), auto_weight.initial(config, names)
    state = init_state(student, key, None, adapters, optimizer, weights)
    observe = compiled(lambda variables, batch: distiller.observe(batch, tuple(variables)), variables, batch)
    seen = batch | {RECORDED: observe(variables, batch)}
    shares = compiled(auto_weight.make_measure(student, distiller, config), state, variables, seen)
    step = make_step(student, optimizer, functools.partial(optim.ema_rate, config), distiller=distiller)
    step = compiled(step, state, variables, seen, donate=True)
    rounds = []
    for _ in range(WARM + args.rounds):
        ahead, found = timed(observe, variables, batch)
        seen = batch | {RECORDED: found}
        measured, weights = timed(shares, state, variables, seen)
        updated, (state, _) = timed(step, state._replace(weights=weights), variables, seen)
        rounds.append((measured, ahead, updated))
    return summarize(choice, rounds[WARM:], args.every)


def summarize(choice: str, rounds: list[tuple[float, float, float]], every: int) -> dict:
    """Medians of rounds (measurement, teacher, update; in seconds): ratios, and the milliseconds behind them."""
    relative = [measured / (ahead + updated) for measured, ahead, updated in rounds]
    low, middle, high = statistics.quantiles(relative, n=4) if len(relative) > 1 else relative * 3
    due = sum(auto_weight.is_due(step, every) for step in range(STEPS))
    found = {"relative": middle, "low": low, "high": high, "overhead": middle / every, "first": middle * due / STEPS}
    measured = statistics.median(one[0] for one in rounds)
    step = statistics.median(ahead + updated for _, ahead, updated in rounds)
    found = {name: round(value, 4) for name, value in found.items()}
    return {"methods": choice} | found | {"measured_ms": round(1000 * measured, 1), "step_ms": round(1000 * step, 1)}


def table(rows: list[dict]) -> str:
    """A row for each choice of methods, in the order in which they were measured."""
    lines = [
        [
            row["methods"],
            f"{row['relative']:.3f}",
            f"{row['low']:.3f} … {row['high']:.3f}",
            *(f"{row[name]:.1f}" for name in ("measured_ms", "step_ms")),
            *(f"{row[name]:.1%}" for name in ("overhead", "first")),
        ]
        for row in rows
    ]
    return study.table(["methods", "relative", "quartiles", "measurement ms", "step ms", "overhead", "first"], lines)


if __name__ == "__main__":
    main()
