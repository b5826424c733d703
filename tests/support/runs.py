"""Tiny runs for tests of the trainer and the doctor."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import data, detectors, sharding, weights
from kdjax.training import config as settings
from kdjax.training import run as training
from tests.faults.config import DETECTOR, OPTIONS
from tests.shared import ROOT

STEPS = 20


def tiny_config(folder: Path, *, teacher: Path | str | None, method: str = "mkd", **changes: object) -> ConfigDict:
    """A run of a few steps on small scenes, of a detector that is compiled three times as fast as the smallest RTMDet.

    Args:
      folder: for the cache of prepared data.
      teacher: a folder of weights; None: no teacher, method and twin.
      method: of the run with a teacher.
      **changes: "data__augment__flip" is config.data.augment.flip.
    """
    config = settings.base()
    config.update(dict(batch_size=8, steps=STEPS, log_every=5, compile_cache=str(ROOT / ".cache" / "jax")))
    config.student.update(dict(detector=DETECTOR, options={} if "student__detector" in changes else OPTIONS))
    config.data.update(dict(cache=str(folder / "cache"), scenes_train=24, scenes_val=10, image_size=(64, 64)))
    config.data.augment.update(dict(mosaic=True, mixup=0.5, cache=8))
    config.data.stage2.start = STEPS // 2
    config.optimizer.update(dict(warmup=4, lr=0.002))
    config.eval.batch_size = 8
    config.checkpoint.every = 5
    if teacher is not None:
        config.teacher.weights = str(teacher)
        config.methods = settings.methods(method)
        config.twin = True
    with config.unlocked():
        for name, value in changes.items():
            *parents, leaf = name.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            node[leaf] = value
    return config


def random_teacher(folder: Path, name: str = DETECTOR, config: ConfigDict | None = None, **options: object) -> Path:
    """Writes a teacher with random weights and the classes of a run's data (the scenes) to `folder`/teacher."""
    classes = data.open_dataset((config or tiny_config(folder, teacher=None)).data).classes
    options = OPTIONS if name == DETECTOR and not options else options
    detector = detectors.build(name, len(classes), **options)
    params, stats = detector.init(jax.random.PRNGKey(99))
    weights.save(folder / "teacher", detector, params, stats, classes=list(classes), image_size=(64, 64))
    return folder / "teacher"


@contextmanager
def one_device() -> Iterator[None]:
    """Runs use one of the fake devices: programs for eight take twice as long to compile."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda *_: Mesh(np.array(jax.devices()[:1]), ("data",)))
        yield


@contextmanager
def stopped_in_step(step: int) -> Iterator[None]:
    """A run inside gets SIGTERM in one of its steps, and must stop there."""
    shard_batch, calls = sharding.shard_batch, iter(range(10**6))

    def stopping(*args: object) -> object:
        if next(calls) == step:  # the first call is for the check of the terms
            signal.raise_signal(signal.SIGTERM)
        return shard_batch(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "shard_batch", stopping)
        with pytest.raises(training.Stopped, match=f"step {step} of "):
            yield


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """A run inside ends right after its checkpoint of a step, and saves nothing more."""
    save = training.Checkpoints.save

    def killing(self: training.Checkpoints, at: int, *rest: object) -> None:
        save(self, at, *rest)
        if at == step:
            self.wait()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.Checkpoints, "save", killing)
        with pytest.raises(KeyboardInterrupt):
            yield
