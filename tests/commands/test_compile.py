"""`kdjax compile`: the programs of a run are on the disk before it starts."""

import os
import re
import subprocess
import sys

import pytest

from tests.shared import ROOT
from tests.support.models import refused

SMALL = (
    "--config=quickstart:cwd",
    "--config.batch_size=8",
    "--config.data.image_size=(64,64)",
    "--config.data.scenes_train=12",
    "--config.data.scenes_val=6",
    "--config.eval.batch_size=4",
    "--config.optimizer.warmup=1",
    "--config.steps=2",
)


@pytest.mark.user_input(
    "Config and flags", "`kdjax compile` without a cache, or with one that cannot be written", "refused: what to set"
)
def test_a_cache_that_cannot_be_used_is_refused(capsys, tmp_path):
    assert "config.compile_cache is off" in refused(capsys, "compile", *SMALL, "--config.compile_cache=off")
    (tmp_path / "file").write_text("")
    told = refused(capsys, "compile", *SMALL, f"--config.compile_cache={tmp_path / 'file' / 'cache'}")
    assert "config.compile_cache: " in told and "cannot be created" in told


@pytest.mark.slow
def test_a_run_after_it_compiles_nothing(tmp_path):
    """With teacher and twin, in processes of their own; JAX writes a file for each program that it compiles."""
    environment = os.environ | {"KDJAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def kdjax(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "kdjax", *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def files():
        return {path.name for path in (tmp_path / "jax").iterdir() if path.name.endswith("-cache")}

    first = kdjax("compile", *SMALL)
    names = ["the teacher", "the check of the terms", "the twin's gradients", "the student's gradients"]
    names += ["the twin's update", "the student's update", "the student's prediction", "the teacher's prediction"]
    rows = re.findall(r"^(the .*?)  +\d+\.\d s  +(compiled|was in the cache)$", first, re.MULTILINE)
    assert rows == [(name, "compiled") for name in names]
    assert f"{tmp_path / 'jax'}: 8 of 8 programs compiled, for 1 x cpu" in first
    there = files()
    assert "all 8 programs were in the cache" in kdjax("compile", *SMALL) and files() == there
    kdjax("train", *SMALL, f"--workdir={tmp_path / 'run'}")
    assert files() == there and not (tmp_path / "student").exists()
