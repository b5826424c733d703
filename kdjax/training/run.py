"""A run from its config to its results, top to bottom: checks, training loop, results."""

import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from kdjax import data, files, remote, sharding
from kdjax.data.shards import Shards
from kdjax.errors import UserError, interruptible, prefix
from kdjax.machine import keep_freed_memory
from kdjax.report import preview
from kdjax.report.run import verdict
from kdjax.training import (
    agreement,
    auto_weight,
    checks,
    cluster,
    compiling,
    memory,
    mirror,
    optim,
    outputs,
    provenance,
    replay,
    trackers,
)
from kdjax.training.ahead import Ahead
from kdjax.training.checkpoint import Checkpoints, Keep
from kdjax.training.config import AUTO, Config
from kdjax.training.goodput import Clock
from kdjax.training.join import Alone, join
from kdjax.training.live import Live
from kdjax.training.log import Log
from kdjax.training.models import load_detector
from kdjax.training.schedule import schedule
from kdjax.training.setup import (
    Setup,
    placed,
    prepare,
    prepare_process,
    resume,
    run_fingerprint,
    train_batches,
    with_host,
)
from kdjax.training.step import TrainState
from kdjax.training.teachers import unlabelled_rows
from kdjax.training.updates import Updates


class Stopped(Exception):
    """The process was asked to stop, and the state of the run is saved."""


class Loop(NamedTuple):
    """What the training loop has gathered for the next line of the log; checkpoints keep it."""

    metrics: Sequence[dict[str, float]] = ()  # of the good steps since the last line
    seconds: float = 0.0  # since then, without evaluations
    waited: float = 0.0  # s, of these for batches
    decoded: int = 0  # images
    dropped: Sequence[dict[str, Any]] = ()  # all bad steps of the run, as for `Updates`


def main(
    *,
    config: Config,
    workdir: str | None,
    multihost: bool,
    coordinator: str = "",
    bind: str = "",
    hosts: int | None = None,
    host: int | None = None,
    host_timeout: float | None = None,
) -> int:
    """What `kdjax train` runs.

    Args:
      config: the settings.
      workdir: the folder of the run; only a dry run (`config.data.check`) needs none.
      multihost: several hosts run the same command (jax.distributed).
      coordinator, bind, hosts, host, host_timeout: of several hosts, as for `join`.

    Returns:
      Exit code: 0; 143 if the run was stopped and its state saved, 130 after Ctrl-C; 75 (`cluster.RESTART`) if not all
      hosts have come. A host that leaves because another one is lost ends its process with 75.

    Raises:
      UserError: before any training, for a setting, file or model that cannot be used; later only if prepared data
        cannot be read any more.
      FloatingPointError: a loss or gradient is not finite.
    """
    logging.set_verbosity(logging.WARNING)  # the progress messages of the libraries; kdjax shows a bar
    if not (workdir or config.data.check):
        raise UserError("--workdir is missing, as in --workdir=runs/quickstart")
    given_flags = [f"--{name}" for name, value in (("coordinator", coordinator), ("bind", bind)) if value]
    numbers = (("hosts", hosts), ("host", host), ("host-timeout", host_timeout))
    given_flags += [f"--{name}" for name, value in numbers if value is not None]
    if given_flags and not multihost:
        raise UserError(f"{given_flags[0]} has no effect without --multihost: add it")
    timeout = cluster.TIMEOUT if host_timeout is None else host_timeout
    try:
        if multihost:
            join(coordinator=coordinator, bind=bind, hosts=hosts, host=host, timeout=timeout)
        with cluster.watching(timeout, together=Stopped), interruptible():
            run(config, workdir)
    except Alone as error:
        print(f"kdjax train: {error}", file=sys.stderr)
        return cluster.RESTART
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("kdjax train: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(config: Config, workdir: str | Path | None) -> dict[str, Any] | None:
    """Trains, evaluates and reports; the same call resumes an interrupted run.

    Args:
      config: the settings; `kdjax.training.config.base` lists them.
      workdir: the folder for config.json, metrics.jsonl, tensorboard/, checkpoints/, student/, twin/, detections/,
        per_class.json, results.json, time.json, report.html (also at each evaluation during training) and, after a bad
        step, blackbox/; may be None for a dry run. Or the address of one in an object store, gs:// or s3://, with one
        host.

    Returns:
      The content of results.json; None after a dry run (`config.data.check`).

    Raises:
      UserError: a setting, file or model cannot be used; raised before any training, or when prepared data becomes
        unreadable.
      FloatingPointError: a loss or gradient is not finite, or above its bound; the message names it. With
        `config.on_bad_step`, if that has not helped.
      Stopped: the process received SIGTERM or SIGINT; the state is saved.
    """
    keep_freed_memory()
    clock = Clock()
    auto = config.batch_size == AUTO and not config.data.check
    config = memory.with_size(config, memory.sizes(config)[0]) if auto else config
    checks.check_settings(config)
    if config.data.check:
        checks.check_detectors(config)
        dry_run(config, None if remote.is_url(workdir) else workdir)
        return None
    checks.check_models(config)
    if remote.is_url(workdir) and jax.process_count() > 1:
        raise UserError(
            f"workdir: {workdir}: several hosts need a folder that all see: mount the store on each of them"
        )
    with mirror.opened(workdir) as (place, uploads):
        if auto and (size := memory.of_run(place)):
            config, auto = memory.with_size(config, size), False
            checks.check_settings(config)
        folder = checks.check_workdir(config, place)
        with only_writer(folder):
            if uploads:
                uploads.claim()
            return _run(config, folder, clock, uploads.start if uploads else None, auto=auto)


def _run(config: Config, folder: Path, clock: Clock, after: Callable[[], None] | None, *, auto: bool) -> dict[str, Any]:
    """A run in a folder that belongs to this process.

    Args:
      config: the settings.
      folder: the workdir.
      clock: of the run.
      after: called when a checkpoint is written.
      auto: whether the batch size is still to be found; that of `config` is the smallest.
    """
    if not jax.process_index():
        files.remove_temporary(folder)
    with prefix("config.data"):
        dataset = data.open_dataset(config.data)
    agreement.check(config, dataset, folder)
    cluster.at("prepares", 0)
    prepare_process(config.compile_cache)
    if not jax.process_index():
        print("\n".join(line for role in dataset.splits for line in data.counted(dataset, role, config.data)))
        with prefix("config.data"):
            print(data.kept_line(dataset, config.data))
        images = dataset.splits["train"].size
        if not auto and config.batch_size > images:
            print(f"note: a batch of {config.batch_size} has some of the {images} training images more than once")
    checks.check_truth(dataset, config.data)
    if auto:
        with clock.during("compile"):
            config = memory.fill(config, dataset)
    setup = prepare(config, dataset)
    if dataset.unlabelled and not jax.process_index():
        print(outputs.without_labels(setup))
    stay = config.checkpoint
    rules = Keep(stay.keep, best=stay.keep_best, every=stay.keep_every, hours=stay.keep_hours)
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep=rules, after=after)) as checkpoints:
        start, setup, told = resume(setup, checkpoints)
        loop = Loop(**told)
        cluster.at("prepares", start)
        clock.open(folder, start)
        if start and not jax.process_index():
            done = "all steps are done: evaluating again" if start == config.steps else f"continuing at step {start}"
            print(f"{folder}: {done}")
        with trackers.opened(config, folder, stops=(Stopped, KeyboardInterrupt)) as tracked:
            stored = replay.ready(setup) if start < config.steps else {}
            if start < config.steps:
                batch = checks.first_batch_with_objects(setup)
                with clock.during("compile"):
                    compiling.compile_all(compiling.of_training(setup, batch, check=start == 0, stored=stored))
                if start == 0:
                    checks.check_terms(setup, batch)
            provenance.write_config(config, folder, dataset.fingerprint)
            lines, board = (checkpoints.note() or {}).get("lines", 0), "tensorboard" in config.log.to
            with Log(folder, start, lines, board=board, trackers=tracked) as log:
                updates = Updates(setup, checkpoints, folder, loop.dropped)
                with Live(setup, folder, clock, start) as live:
                    states = train(setup, start, updates, log, stored, loop, clock, live)
                clock.switch("evaluate")
                results = outputs.finish(setup._replace(states=states), folder, log, clock)
        with clock.during("save"):
            checkpoints.wait()
    if not jax.process_index():
        clock.write(config.steps)
        print(f"{clock.told()}\n{verdict(results)}\n{folder / 'report.html'}")
    return results


def only_writer(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of a workdir; the first host of a run holds it.

    Raises:
      UserError: another process trains in the folder.
    """
    if jax.process_index():
        return contextlib.nullcontext()
    busy = f"workdir: another process trains in {folder}: wait until it ends, or choose another folder"
    return files.lock(folder / ".lock", busy)


def train(
    setup: Setup,
    start: int,
    updates: Updates,
    log: Log,
    stored: Mapping[str, Shards],
    loop: Loop,
    clock: Clock,
    live: Live,
) -> dict[str, TrainState]:
    """Runs all updates from `start` to the end.

    Args:
      setup: of the run, with the states after `start` updates.
      start: number of updates so far.
      updates: of the setup.
      log: for the metrics.
      stored: the caches that stand for teachers, by name; the others run.
      loop: what the checkpoint of `start` says of the loop.
      clock: of the run.
      live: the page of the run while it goes on.

    Returns:
      The final states by role.

    Raises:
      FloatingPointError: a loss or gradient is not finite.
      Stopped: the process received SIGTERM or SIGINT; the state is saved.
    """
    config, states, checkpoints = setup.config, updates.states, updates.checkpoints
    rate = optim.learning_rate(config)
    host = jax.process_index(), jax.process_count()
    batches = train_batches(setup, start_step=start, shard=host, attach=replay.attach(setup, stored))
    if any(teacher.on_host and (teacher.name not in stored or setup.unlabelled) for teacher in setup.teachers):
        batches = Ahead(batches, functools.partial(with_host, setup))

    fingerprint, category_ids = run_fingerprint(setup), list(setup.dataset.category_ids)

    note = {"run": fingerprint, "category_ids": category_ids, "config": json.loads(config.to_json())}

    def save(step: int) -> None:
        with clock.during("save"):
            now = {"next_batch": step, "lines": log.lines, "loop": state_of_loop()._asdict()}
            checkpoints.save(step, states, note | now)
        clock.mark(step)

    def evaluate(step: int) -> None:
        measured = outputs.evaluate(setup._replace(states=states), [*states], clock, limit=config.eval.limit)
        # One line for all roles: `log.has` must not find a part of them after a kill.
        values = {f"{role}/{name}": value for role, one in measured.items() for name, value in one.metrics.items()}
        log.write(step, "eval", values)
        log.image(step, lambda: outputs.sheet(setup, measured["student"].examples))
        if config.checkpoint.keep_best and measured["student"].metrics["AP"] >= 0:
            checkpoints.score(step, measured["student"].metrics["AP"])
        live.write(step, measured)

    def is_evaluated(step: int) -> bool:
        return bool(config.eval.every) and step % config.eval.every == 0 and 0 < step < config.steps

    if is_evaluated(start) and not log.has(start, "eval"):  # it was killed between checkpoint and evaluation
        with clock.during("evaluate"):
            evaluate(start)
    window = list(loop.metrics)
    waited, since, decoded = loop.waited, time.perf_counter() - loop.seconds, -loop.decoded

    def state_of_loop() -> Loop:
        # Copies: a note is written while the loop goes on.
        seconds, seen = time.perf_counter() - since, batches.decoded - decoded
        return Loop([*window], seconds, waited, seen, [*updates.dropped])

    bar = tqdm(total=config.steps, initial=start, desc="train", unit="step", disable=jax.process_index() > 0)
    with contextlib.closing(batches), contextlib.closing(bar), Signals() as signals, clock.during("step"):
        for step in range(start + 1, config.steps + 1):
            before = time.perf_counter()
            cluster.at(cluster.READS, step)
            with clock.during("data"):
                batch = placed(setup, next(batches))
            waited += time.perf_counter() - before
            cluster.at(cluster.COMPUTES)
            updates.start(step, batch)
            checkpoints.check()
            last = step == config.steps or stop_requested(signals.stop, step, config.log_every)
            logs = step == config.steps or step % config.log_every == 0
            scored = config.checkpoint.keep_best and is_evaluated(step)
            saves = last or scored or step % config.checkpoint.every == 0
            # Metrics are read one step late, so that the device has its next step before the host waits. Before
            # anything is written, all of them have been checked.
            window += updates.checked(0 if logs or saves or is_evaluated(step) else 1)
            bar.update()
            if logs:
                seconds = time.perf_counter() - since
                images = max(len(window), 1) * (config.batch_size + unlabelled_rows(config))
                row = {name: float(np.mean([m[name] for m in window])) for name in (window[0] if window else ())}
                row = {name: value for name, value in row.items() if not name.endswith("/finite")}
                measured = jax.device_get(states["student"].weights)
                for kind in ("share", "conflict") if measured else ():
                    row |= {f"{kind}/{name}": float(value) for name, value in measured[kind].items()}
                with sharding.on_host():
                    weights = setup.distiller.weights(step - 1) if setup.distiller else {}
                    weights = auto_weight.scaled(weights, measured)
                    row |= {f"weight/{name}": float(w) for name, w in weights.items()}
                    row["lr"] = float(np.asarray(rate(step - 1)))
                row |= {
                    "seconds": seconds,
                    "images_per_s": images / seconds,
                    "wait_share": waited / seconds,
                    "decoded_per_image": (batches.decoded - decoded) * jax.process_count() / images,
                }
                row |= {"bad_steps": len(updates.dropped)} if updates.dropped else {}
                log.write(step, "train", row)
                if window:
                    bar.set_postfix({role: f"{row[f'{role}/total']:.3g}" for role in states})
                window, waited, since, decoded = [], 0.0, time.perf_counter(), batches.decoded
                checks.check_programs(setup)
            if saves:
                cluster.at("saves")
                save(step)
            if (logs or saves) and not jax.process_index():
                clock.write(step)
            if is_evaluated(step):
                begun = time.perf_counter()
                with clock.during("evaluate"):
                    evaluate(step)
                since += time.perf_counter() - begun
            live.at(step)
            if last and step < config.steps:
                with clock.during("save"):
                    checkpoints.wait()
                raise Stopped(
                    f"stopped at step {step} of {config.steps}; the state is saved: run the same command to continue"
                )
    return states


def stop_requested(stop: bool, step: int, every: int) -> bool:
    """Whether all hosts stop at this step.

    Args:
      stop: whether this host was asked to stop.
      step: number of the update.
      every: with several hosts that keep no watch (`cluster`), they exchange `stop` at multiples of this step only.
    """
    if jax.process_count() == 1:
        return stop
    agreed = cluster.is_last(stop, step)
    if agreed is not None:
        return agreed
    return step % every == 0 and bool(multihost_utils.process_allgather(np.array(stop)).any())


class Signals:
    """A context in which SIGTERM and SIGINT set `stop`, so that the state can be saved; a second Ctrl-C interrupts."""

    def __enter__(self) -> "Signals":
        self.stop = False
        self.before = {}
        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self.stop and number == signal.SIGINT:  # second Ctrl-C: exit without saving
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def dry_run(config: Config, workdir: str | Path | None) -> None:
    """Prints a summary of the data, and draws training batches and the schedule.

    Args:
      config: the settings.
      workdir: the folder for the images; None: a folder of the cache.

    Raises:
      UserError: the data cannot be used, or a split has no objects.
    """
    with prefix("config.data"):
        dataset = data.open_dataset(config.data)
        print(data.summary(dataset, config.data))
    checks.check_truth(dataset, config.data)
    student, _ = load_detector("student", config.student, dataset, jax.random.PRNGKey(config.seed))
    for description, file in preview.save(dataset, config, schedule(config), workdir, student.fit).items():
        print(f"{description}: {file}")
