"""`python train.py` in a process of its own: the quickstart with small images and few steps."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kdjax import weights
from kdjax.detectors import build
from tests.shared import ROOT, SHARED


def train(*flags: str, quick: bool = False) -> subprocess.CompletedProcess:
    """One device, as a user has, and not the eight of these tests; `quick`: code that is compiled faster."""
    flags = (*flags, f"--config.compile_cache={ROOT / '.cache' / 'jax'}")
    less = " ".join(re.findall(r"--xla_cpu\S+", os.environ["XLA_FLAGS"])) if quick else ""  # those of tests/conftest.py
    env = os.environ | {"XLA_FLAGS": less, "JAX_DISABLE_MOST_OPTIMIZATIONS": str(quick)}
    command = [sys.executable, "train.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=env)


def test_a_shortened_quickstart(tmp_path):
    flags = (
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.steps=4",
        "--config.batch_size=8",
        "--config.data.image_size=(64, 64)",
        f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.scenes_train=16",
        "--config.data.scenes_val=8",
        "--config.optimizer.warmup=1",
        "--config.eval.every=2",
        "--config.eval.batch_size=8",
        "--config.log_every=2",
        "--config.checkpoint.every=2",
        "--config.twin=False",  # a program less to compile; the quickstart as it stands has one, below
    )
    done = train(*flags, quick=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step" in done.stderr and "it/s" not in done.stderr.splitlines()[-1], "a progress bar"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["params"] > 2 * results["student"]["params"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<img") >= 4 and not re.search(r"""(src|href)=["']?https?:""", page)


def test_the_dry_run_prints_and_trains_nothing(tmp_path):
    done = train("--config=configs/quickstart.py", "--config.data.check=True", f"--config.data.cache={tmp_path}",
                 "--config.data.scenes_train=16", "--config.data.scenes_val=8")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "disc" in done.stdout and "16" in done.stdout
    [sheet] = re.findall(r"training images of batch 0: (.*\.png)", done.stdout)
    assert Path(sheet).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_quickstart_as_it_stands(tmp_path):
    done = train("--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["AP"] > results["student"]["AP"] > results["twin"]["AP"] > 0.05
    assert results["teacher"]["AP"] - results["twin"]["AP"] > 0.05
    assert max(results[role]["AP"] for role in ("teacher", "twin", "student")) < 0.95


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="the shared data is not here")
@pytest.mark.parametrize("name", ["coco_mini", "bccd"])
def test_the_recipe_on_real_images(name, tmp_path):
    """MKD's recipe, Mosaic and MixUp and then large-scale jitter, a few steps of each on a small canvas."""
    root = SHARED / "data" / name
    truth = json.loads((root / "annotations" / "instances_train.json").read_text())
    classes = [category["name"] for category in truth["categories"]]
    teacher = build("rtmdet_micro", len(classes))
    start = teacher.init(jax.random.key(0))
    weights.save(tmp_path / "teacher", teacher, *start, classes=classes, image_size=(96, 96))
    done = train(
        "--config=configs/distill/mkd_rtmdet.py:pico,micro",
        f"--workdir={tmp_path / 'run'}",
        f"--config.teacher.weights={tmp_path / 'teacher'}",
        "--config.data.source=coco_folder",
        f"--config.data.root={root}",
        f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.val_split=val",
        "--config.data.image_size=(96, 96)",
        "--config.batch_size=4",
        "--config.steps=6",
        "--config.data.stage2.start=4",
        "--config.optimizer.warmup=2",
        "--config.log_every=1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = [line["student/mkd/feature"] for line in lines if line["kind"] == "train"]
    assert len(terms) == 6 and all(0 < term < 10 for term in terms)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) >= {"student", "twin", "teacher"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this option")
def test_freed_memory_stays_with_the_process(tmp_path):
    """Blocks above 64 MB too, which glibc keeps only for the main thread; and of steps that are asked for ahead."""
    code = f"""
import resource, statistics
from kdjax.cli import main
few = ["--config.data.scenes_train=16", "--config.data.scenes_val=8", "--config.data.cache={tmp_path}"]
assert main(["train", "--config=quickstart", "--config.data.check=True", "--workdir={tmp_path / "run"}", *few]) == 0
import jax, jax.numpy as jnp
sums = jax.jit(lambda x: jnp.sin(x @ x.T) @ x)  # 108 MB of temporaries
x = jnp.ones((5200, 64))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(sums(sums(x)))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[6:])))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) < 1000, "pages of 4 kB; by default some 50,000"


def test_mistakes_get_one_line_and_an_exit_code():
    done = train("--config=quickstart", "--workdir=/nowhere/x", "--config.data.source=coco_folder")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("kdjax: ")]
    assert "config.data: root" in line
