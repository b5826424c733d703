"""Prepared folders: written once, locked, and never half complete."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from kdjax import data
from kdjax.data import cache
from kdjax.errors import UserError
from tests.support.data import opened, settings, small_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.user_input(
    "Prepared data", "an image or a json that changed since it was prepared", "read anew: that split is prepared again"
)
@pytest.mark.user_input("Prepared data", "a file of another time with the same content", "read from the prepared copy")
def test_a_split_is_prepared_once_and_again_when_it_changes(tmp_path):
    root = small_folder(tmp_path / "set", count=4)

    def folders():
        opened(root, tmp_path)
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir()}

    first = folders()
    assert len(first) == 2 and folders() == first
    os.utime(root / "images" / "train" / "p1.png", (1, 1))
    assert folders() == first  # the content counts
    assert cv2.imwrite(str(root / "images" / "train" / "p1.png"), np.zeros((41, 59, 3), np.uint8))
    assert len(folders()) == 3  # train alone
    path = root / "annotations" / "instances_val.json"
    path.write_text(path.read_text() + "\n")
    assert len(folders()) == 4  # val alone


@pytest.mark.user_input(
    "Folders and names",
    "files that no json lists: dead links, pipes, names not in UTF-8",
    "survived: they do not matter",
)
def test_files_that_no_json_lists_do_not_matter(tmp_path):
    root = small_folder(tmp_path / "set", count=3)
    before = opened(root, tmp_path)
    folder = root / "images" / "train"
    shutil.copy(folder / "p1.png", folder / "p9.png")
    shutil.copy(folder / "p1.png", os.fsencode(folder) + b"/gr\xf6\xdfe.png")
    (folder / "dead.png").symlink_to("/nowhere/else.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    assert opened(root, tmp_path).splits["train"].folder == before.splits["train"].folder


@pytest.mark.user_input(
    "Prepared data", "a preparation that was killed", "survived: prepared anew; nothing incomplete is used"
)
def test_a_killed_preparation_leaves_nothing_usable(tmp_path):
    code = """
import sys, time
from pathlib import Path
from kdjax.data import cache
def write(folder):
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
cache.prepared(Path(sys.argv[1]), "set", {"a": 1}, write)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    done = cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: (folder / "whole").write_text("x"))
    assert [p.name for p in done.iterdir()] == ["whole"]
    assert cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: pytest.fail("prepared twice")) == done


@pytest.mark.user_input(
    "Prepared data", "two processes that prepare one split", "survived: the second waits for the first"
)
def test_the_second_waits_for_the_first(tmp_path):
    writing, go_on, writes = threading.Event(), threading.Event(), []

    def write(folder: Path) -> None:
        writes.append(folder)
        writing.set()
        assert go_on.wait(30)
        (folder / "whole").write_text("x")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.prepared, tmp_path, "set", {"a": 1}, write)
        assert writing.wait(30)
        second = pool.submit(cache.prepared, tmp_path, "set", {"a": 1}, write)
        with pytest.raises(concurrent.futures.TimeoutError):
            second.result(0.2)
        go_on.set()
        assert first.result(30) == second.result(30)
    assert len(writes) == 1 and (first.result() / "whole").exists()


@pytest.mark.user_input(
    "Prepared data", "two hosts whose locks do not reach each other", "survived: the first complete folder is used"
)
def test_the_folder_of_a_faster_host_is_used(tmp_path):
    """Of two hosts whose locks do not reach each other."""

    def write(folder: Path) -> None:
        (folder / "slow").write_text("x")
        target = tmp_path / folder.name.split(".")[1]
        target.mkdir()
        (target / "fast").write_text("x")

    assert [p.name for p in cache.prepared(tmp_path, "set", {"a": 1}, write).iterdir()] == ["fast"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_preparation_that_fails_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: 1 / 0)
    assert cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: None).is_dir()


@pytest.mark.user_input(
    "The machine", "a full disk while data is prepared", "reported: make room; nothing incomplete is left"
)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path):
    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError('Failed to finalize writing of split "images": write() failed: No space left on device')

    with pytest.raises(UserError) as refused:
        cache.prepared(tmp_path, "set", {"a": 1}, write)
    sentence = f"cache: {tmp_path}: the disk is full: make room, or choose another folder for the cache"
    assert str(refused.value) == sentence
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert cache.prepared(tmp_path, "set", {"a": 1}, lambda folder: None).is_dir()


def test_place_of_the_cache(monkeypatch, tmp_path):
    assert cache.root("x") == Path("x/data")
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path))
    assert cache.root() == tmp_path / "data"
    monkeypatch.delenv("KDJAX_CACHE")
    assert cache.root() == Path.home() / ".cache" / "kdjax" / "data"


@pytest.mark.user_input("Prepared data", "a cache that cannot be written", "refused: choose another")
def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: cannot write to .*file/data .Not a directory.: choose another"):
        data.open_dataset(settings(tmp_path / "file", source="scenes"))
