"""The updates of a run, one after the other, with their log, checkpoints and evaluations on the way."""

import collections
import contextlib
import signal
import time
from concurrent import futures

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from kdjax import data
from kdjax.training import optim, sharding
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.checks import check_programs
from kdjax.training.log import Log
from kdjax.training.outputs import ema, evaluate
from kdjax.training.setup import Setup, run_fingerprint
from kdjax.training.step import Teacher, TrainState


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


def train(setup: Setup, start: int, checkpoints: Checkpoints, log: Log) -> dict[str, TrainState]:
    """All updates from `start` to the end; returns the final states."""
    config, states = setup.config, dict(setup.states)
    rate = optim.learning_rate(config)
    batches = data.train_batches(
        setup.dataset,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        shard=(jax.process_index(), jax.process_count()),
    )

    def save(step):
        checkpoints.save(step, states, {"next_batch": step, "run": mine, "category_ids": ids})

    mine, ids = run_fingerprint(setup), list(setup.dataset.category_ids)
    pending, window = collections.deque(), []
    waited, since, decoded = 0.0, time.perf_counter(), 0
    bar = tqdm(total=config.steps, initial=start, desc="train", unit="step", disable=jax.process_index() > 0)
    with contextlib.closing(batches), contextlib.closing(bar), Signals() as signals:
        for step in range(start + 1, config.steps + 1):
            before = time.perf_counter()
            batch = sharding.shard_batch(setup.mesh, next(batches))
            waited += time.perf_counter() - before
            metrics = {}
            if step == start + 1:
                compile_steps(setup, states, batch)
            for role in states:
                states[role], of_role = setup.steps[role](states[role], teacher_of(setup, role), batch)
                metrics |= {f"{role}/{name}": value for name, value in of_role.items()}
            pending.append((step, metrics))
            last = step == config.steps or stop_requested(signals.stop, step, config.log_every)
            logs, saves = last or step % config.log_every == 0, last or step % config.checkpoint.every == 0
            # One step behind, so that the device always has its next step before the host waits for metrics; but what
            # is written has been looked at.
            while len(pending) > (0 if logs or saves else 1):
                window.append(check_finite(*pending.popleft()))
            bar.update()
            if logs:
                seconds, images = time.perf_counter() - since, len(window) * config.batch_size
                row = {name: float(np.mean([m[name] for m in window])) for name in window[0]}
                row = {name: value for name, value in row.items() if not name.endswith("/finite")}
                weights = setup.distiller.weights(step - 1) if setup.distiller else {}
                row |= {f"weight/{name}": float(w) for name, w in weights.items()}
                row |= {
                    "lr": float(rate(step - 1)),
                    "seconds": seconds,
                    "images_per_s": images / seconds,
                    "wait_share": waited / seconds,
                    "decoded_per_image": (batches.decoded - decoded) * jax.process_count() / images,
                }
                log.write(step, "train", row)
                bar.set_postfix({role: f"{row[f'{role}/total']:.3g}" for role in states})
                window, waited, since, decoded = [], 0.0, time.perf_counter(), batches.decoded
                check_programs(setup)
            if saves:
                save(step)
            if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                begun = time.perf_counter()
                for role, state in states.items():
                    measured = evaluate(setup, role, ema(state), limit=config.eval.limit).metrics
                    log.write(step, "eval", {f"{role}/{name}": value for name, value in measured.items()})
                since += time.perf_counter() - begun
            if last and step < config.steps:
                checkpoints.close()
                raise Stopped(f"stopped at step {step} of {config.steps}, saved; the same command goes on from there")
    return states


def teacher_of(setup: Setup, role: str) -> Teacher | None:
    """The frozen side, which only the student has."""
    return setup.variables if role == "student" else None


def compile_steps(setup: Setup, states: dict[str, TrainState], batch: dict) -> None:
    """Compiles the roles' updates side by side, each on a core of its own; their first calls find them compiled."""
    with futures.ThreadPoolExecutor(len(states)) as pool:
        compiling = [
            pool.submit(setup.steps[role].lower(states[role], teacher_of(setup, role), batch).compile)
            for role in states
        ]
        for each in compiling:
            each.result()


def check_finite(step: int, metrics: dict) -> dict:
    """The metrics of a step on the host.

    Raises:
      FloatingPointError: names the first figure that is not finite.
    """
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if any(value == 0 for name, value in metrics.items() if name.endswith("/finite")):
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        losses = [name for name in bad if not name.endswith(("/total", "/grad_norm"))]
        raise FloatingPointError(
            f"{(losses or bad)[0]} is not finite at step {step}: training cannot go on; checkpoints of earlier steps "
            "are sound. A lower learning rate or weight of that term usually helps"
        )
    return metrics


def stop_requested(stop: bool, step: int, every: int) -> bool:
    """Whether to stop at this step. Several hosts ask each other every so many steps: all must leave at one."""
    if jax.process_count() == 1:
        return stop
    return step % every == 0 and bool(multihost_utils.process_allgather(np.array(stop)).any())


class Signals:
    """Turns SIGTERM and SIGINT into a flag while training runs, so that the state is saved; a second Ctrl-C ends it."""

    def __enter__(self):
        self.stop = False
        self.before = {}
        with contextlib.suppress(ValueError):  # handlers can be set in the main thread alone
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.stop and number == signal.SIGINT:  # asked twice: not even the state is wanted
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
