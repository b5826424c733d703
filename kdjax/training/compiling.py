"""The programs of a run, compiled side by side before they are needed."""

import collections
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from kdjax import sharding
from kdjax.inference import predict
from kdjax.training.setup import Setup, given, model, onnx_of, with_host
from kdjax.training.step import SOUND, UNLABELLED, Step
from kdjax.training.teachers import attached, read_by_teacher, recorded

_HIT = "/jax/compilation_cache/cache_hits"  # JAX's event, in the thread that compiles
_EVERY = 1.0  # s between two lines of the bar
_this_thread = threading.local()


class Program(NamedTuple):
    """A program that is to be compiled."""

    name: str  # in words
    network: str  # whose network it contains
    lower: Callable[[], jax.stages.Lowered]


class Compiled(NamedTuple):
    """A program that is compiled."""

    name: str
    seconds: float  # of tracing, lowering and compiling
    cached: bool  # it was read from the cache on disk


def of_training(
    setup: Setup, batch: Mapping[str, Any], *, check: bool = True, stored: Container[str] = ()
) -> list[Program]:
    """The programs of the training loop, in the order in which they must be lowered.

    Args:
      setup: of the run.
      batch: of the loader, the rows of this host; its shapes are those of all batches.
      check: whether the terms are checked before training (`checks.check_terms`), which asks every teacher.
      stored: names of the teachers that the loop does not ask, because their output is in a cache.
    """
    spec: dict[str, Any] = sharding.spec_of_batch(setup.mesh, with_host(setup, batch))
    programs, said = [], recorded(spec, setup.teachers)
    for teacher in setup.teachers:
        if teacher.observer is not None and teacher.name not in said:
            run: Any = teacher.observer.program
            lower = functools.partial(run.lower, teacher.variables, read_by_teacher(spec))
            if check or teacher.name not in stored:
                programs.append(Program(f"the {teacher.role}", teacher.role, lower))
            said[teacher.name] = sharding.spec_of_rows(setup.mesh, teacher.observer.output)
    spec |= attached(said)
    if check and setup.probe is not None:
        labelled = {name: value for name, value in spec.items() if name != UNLABELLED}
        lower = functools.partial(setup.probe.lower, setup.states["student"], setup.variables, labelled)
        programs.append(Program("the check of the terms", "student", lower))
    if setup.unlabelled is not None:
        programs.append(Program("the images without labels", "teacher", functools.partial(_unlabelled, setup, spec)))
    if setup.measure is not None:
        measure: Any = setup.measure

        def shares() -> jax.stages.Lowered:
            return measure.lower(setup.states["student"], *given(setup, "student", spec))

        programs.append(Program("the shares of the gradient", "student", shares))

    flag = sharding.spec_of_flag(setup.mesh)

    def gradients(role: str) -> jax.stages.Lowered:
        variables, batch = given(setup, role, spec)
        run: Any = setup.steps[role].gradients
        return run.lower(Step.read(setup.states[role]), variables, batch | {SOUND: flag})

    def update(role: str) -> jax.stages.Lowered:
        run, state = setup.steps[role].update, setup.states[role]
        return run.lower(Step.changed(state), state.params, state.stats, flag)

    roles = [*setup.states][::-1]  # the twin's contains a part of the student's
    programs += [Program(f"the {role}'s gradients", "student", functools.partial(gradients, role)) for role in roles]
    return programs + [Program(f"the {role}'s update", "student", functools.partial(update, role)) for role in roles]


def _unlabelled(setup: Setup, spec: dict[str, Any]) -> jax.stages.Lowered:
    """Lowers the program of the images without labels, and puts the shapes of what it returns into the batch."""
    assert setup.unlabelled is not None
    variables = {teacher.name: teacher.variables for teacher in setup.teachers}
    lowered = setup.unlabelled.lower(variables, spec[UNLABELLED])
    spec[UNLABELLED] = sharding.spec_of_rows(setup.mesh, lowered.out_info)
    return lowered


def of_evaluation(setup: Setup, roles: Sequence[str]) -> list[Program]:
    """The programs that evaluate models; equal detectors share one.

    Args:
      setup: of the run.
      roles: as for `outputs.evaluate`.
    """
    config, programs = setup.config, {}
    for role in roles:
        if onnx_of(setup, role):
            continue
        detector, variables = model(setup, role)
        lower = functools.partial(
            predict.lower, detector, variables, tuple(config.data.image_size), config.eval.batch_size
        )
        network = "student" if role in setup.states else role
        programs.setdefault(detector, Program(f"the {role}'s prediction", network, lower))
    return list(programs.values())


def compile_all(programs: Iterable[Program]) -> list[Compiled]:
    """Compiles programs, while a bar says which and since when; their next calls find them compiled.

    They are lowered one after the other, and compiled by XLA in threads side by side. On a GPU the programs of one
    network follow each other, because what XLA tunes for the first is then known for the next ones.

    Args:
      programs: in the order in which they must be lowered.

    Returns:
      What was compiled, in that order.
    """
    programs = list(programs)
    _listen()
    shared = futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1))
    tuned = collections.defaultdict(lambda: futures.ThreadPoolExecutor(1))
    gpu, running, lowering = jax.default_backend() == "gpu", {}, []
    with _bar(len(programs)) as bar:
        try:
            for program in programs:
                _show(bar, running, f"tracing {program.name}")
                since = time.perf_counter()
                lowered = program.lower()
                lowering.append(time.perf_counter() - since)
                pool = tuned[program.network] if gpu else shared
                running[pool.submit(_compile, lowered)] = program.name
            waiting = set(running)
            while waiting:
                _show(bar, running)
                _, waiting = futures.wait(waiting, timeout=_EVERY)
            return [
                Compiled(name, before + future.result()[0], future.result()[1])
                for (future, name), before in zip(running.items(), lowering, strict=True)
            ]
        finally:
            for pool in (shared, *tuned.values()):
                pool.shutdown(wait=False, cancel_futures=True)


def _compile(lowered: jax.stages.Lowered) -> tuple[float, bool]:
    """Seconds of the compilation, and whether the program was in the cache."""
    _this_thread.hit, since = False, time.perf_counter()
    lowered.compile()
    return time.perf_counter() - since, _this_thread.hit


@functools.cache
def _listen() -> None:
    def heard(event: str, **_: object) -> None:
        if event == _HIT:
            _this_thread.hit = True

    jax.monitoring.register_event_listener(heard)


def _bar(count: int) -> "tqdm[Any]":
    return tqdm(
        total=count,
        desc="compile",
        bar_format="{desc}: {n_fmt} of {total_fmt} programs, {elapsed}{postfix}",
        leave=False,
        disable=jax.process_index() > 0,
    )


def _show(bar: "tqdm[Any]", running: Mapping[futures.Future[Any], str], first: str = "") -> None:
    """What is being compiled now."""
    bar.n = sum(future.done() for future in running)
    now = [first] if first else []
    now += [name for future, name in running.items() if not future.done()]
    told = "; ".join(now)
    if told != _told(bar) or sys.stderr.isatty():  # in a file, a line for each change
        bar.set_postfix_str(told)


def _told(bar: "tqdm[Any]") -> str:
    """What the bar says; a bar that is not shown, as on the second host, says nothing."""
    return (getattr(bar, "postfix", None) or "").removeprefix(", ")
