"""Several hosts, as two processes of this machine that find each other through `jax.distributed`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kdjax import weights
from kdjax.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "batch_size": 4,
    "steps": 40,
    "log_every": 2,
    "data.scenes_train": 16,
    "data.scenes_val": 12,  # three batches: the first host has two of them
    "data.image_size": (64, 64),
    "optimizer.name": "sgd",
    "optimizer.lr": 0.001,
    "optimizer.warmup": 4,
    "eval.every": 0,
    "eval.batch_size": 4,
    "checkpoint.every": 1000,
    "compile_cache": str(ROOT / ".cache" / "jax"),
}


def hosts(workdir: Path, count: int, kind: str = "replicated") -> list[subprocess.Popen]:
    """Two devices in all, on `count` hosts; `kind` is config.sharding.

    What Slurm would say tells `jax.distributed` which host is which.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "train.py", "--config=configs/supervised/scenes.py:rtmdet_pico", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in (SETTINGS | {"sharding": kind}).items()]
    command += ["--multihost"] * (count > 1)
    common = dict(os.environ, KDJAX_CACHE=str(workdir.parent / "cache"), JAX_PLATFORMS="cpu")
    common |= dict(XLA_FLAGS=f"--xla_force_host_platform_device_count={2 // count}")
    common |= dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost")
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=common | dict(SLURM_NTASKS=str(count), SLURM_PROCID=str(host), SLURM_LOCALID=str(host)),
        )
        for host in range(count)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and last line of each."""
    errors = [process.communicate(timeout=900)[1] for process in processes]
    return [(p.returncode, (e.strip().splitlines() or [""])[-1]) for p, e in zip(processes, errors, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_two_hosts_stop_together_go_on_and_agree_with_one(tmp_path, kind):
    running, log = hosts(tmp_path / "two", 2, kind), tmp_path / "two" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert all(process.poll() is None for process in running), ended(running)
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)  # a scheduler need not tell all hosts
    (first, said), (second, _) = ended(running)
    assert first == second == 143, said
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert step < SETTINGS["steps"] and f"stopped at step {step} of 40; the state is saved" in said
    assert [code for code, _ in ended(hosts(tmp_path / "two", 2, kind))] == [0, 0]
    assert [code for code, _ in ended(hosts(tmp_path / "one", 1))] == [0]
    two, one = (checkpoint.flat(weights.load(tmp_path / name / "student")[1:3], copy=False) for name in ("two", "one"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)
    results = [json.loads((tmp_path / name / "results.json").read_text())["student"]["AP"] for name in ("two", "one")]
    assert results[0] == pytest.approx(results[1], abs=1e-3)
    found = [json.loads((tmp_path / name / "detections" / "student.json").read_text()) for name in ("two", "one")]
    ids, others = ([row["image_id"] for row in rows] for rows in found)
    assert ids == others and len(set(ids)) == SETTINGS["data.scenes_val"]
    scores, others = ([row["score"] for row in rows] for rows in found)
    np.testing.assert_allclose(scores, others, rtol=1e-4)
