"""Worker processes: the same batches for any number of them, and a clean end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.data import settings, small_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return settings(folder / "cache", root=small_folder(folder / "set", count=11), image_size=(48, 64))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    root = small_folder(folder / "set", count=11, masks=True)
    return settings(folder / "cache", root=root, image_size=(48, 64), masks=True)


def test_workers_and_a_clean_end(cfg, masked, tmp_path):
    # In a process of its own, to see its exit and its imports.
    code = """
import hashlib, sys, warnings
warnings.simplefilter("error")
from ml_collections import ConfigDict
from kdjax import data

def main():
    plain, masked = ((cfg, data.open_dataset(cfg)) for cfg in (ConfigDict(eval(text)) for text in sys.argv[1:]))
    runs = [(*plain, False, 0), (*plain, False, 1), (*plain, False, 2), (*plain, True, 0), (*plain, True, 2)]
    for cfg, dataset, mixed, workers in (*runs, (*masked, True, 0), (*masked, True, 2)):
        cfg.workers = workers
        cfg.augment.update(mosaic=mixed, mixup=0.7 * mixed, cache=5)
        batches = data.train_batches(dataset, cfg, batch_size=10, seed=7, start_step=2)
        digest = hashlib.sha256()
        for _ in range(5):
            for name, array in sorted(next(batches).items()):
                digest.update(name.encode() + array.tobytes())
        assert batches.decoded >= 11, batches.decoded
        assert ("masks" in next(batches)) == cfg.masks
        batches.close()
        print(digest.hexdigest(), flush=True)
    for workers in (0, 1):
        cfg.workers = workers
        digest = hashlib.sha256()
        for batch in data.eval_batches(dataset, "val", cfg, batch_size=2):
            digest.update(batch["image"].tobytes() + batch["image_id"].tobytes())
        print(digest.hexdigest(), flush=True)
    print("tensorflow" in sys.modules)

if __name__ == "__main__":
    main()
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), repr(cfg.to_dict()), repr(masked.to_dict())],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    *hashes, tensorflow = done.stdout.split()
    assert len(hashes) == 9 and tensorflow == "False"
    alike = (hashes[:3], hashes[3:5], hashes[5:7], hashes[7:])
    assert all(len(set(part)) == 1 for part in alike) and len(set(hashes)) == 4
    assert done.stderr == ""


@pytest.mark.user_input("The machine", "a trainer that is killed", "survived: its workers end")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_workers_do_not_outlive_a_killed_trainer(cfg, tmp_path):
    code = """
import multiprocessing, sys
from kdjax import data

def main():
    cfg = eval(sys.argv[1]) | {"workers": 1}
    batches = data.train_batches(data.open_dataset(cfg), cfg, batch_size=4, seed=7)
    next(batches)
    [worker] = multiprocessing.active_children()
    print(worker.pid, flush=True)
    sys.stdin.read()

if __name__ == "__main__":
    main()
"""
    script = tmp_path / "killed.py"
    script.write_text(code)
    command = [sys.executable, str(script), repr(cfg.to_dict())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}) as trainer:
        worker = Path("/proc") / trainer.stdout.readline().decode().strip()
        assert worker.is_dir()
        trainer.kill()
    deadline = time.monotonic() + 20
    while worker.is_dir() and "(zombie)" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline


@pytest.mark.user_input(
    "The machine", "SIGTERM or Ctrl-C to a trainer and its workers", "survived: the trainer still gets its batches"
)
def test_workers_survive_signals_to_the_group(cfg, tmp_path):
    """A trainer that saves its state on SIGTERM or Ctrl-C still gets the batch that it waits for."""
    code = """
import os, signal, sys
from kdjax import data

def main():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    cfg = eval(sys.argv[1]) | {"workers": 1}
    batches = data.train_batches(data.open_dataset(cfg), cfg, batch_size=4, seed=7)
    next(batches)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.killpg(0, number)
    for _ in range(10):  # more than are made ahead
        next(batches)
    batches.close()

if __name__ == "__main__":
    main()
"""
    script = tmp_path / "stopped.py"
    script.write_text(code)
    command = [sys.executable, str(script), repr(cfg.to_dict())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_open_iterator_does_not_delay_the_exit(cfg):
    code = """
import sys
from kdjax import data
cfg = eval(sys.argv[1])
next(data.train_batches(data.open_dataset(cfg), cfg, batch_size=4, seed=7))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, repr(cfg.to_dict())],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
