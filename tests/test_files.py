"""Locks, on file systems with and without them; temporary files."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from kdjax import files
from kdjax.errors import UserError

HOLD = """
import fcntl, os, sys
from kdjax import files
if sys.argv[2]:
    def flock(*_):
        raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))
    fcntl.flock = flock
with files.lock(sys.argv[1], "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.user_input(
    "The machine",
    "a file system without locks (Lustre, some NFS and FUSE)",
    "survived: a file NAME.owner stands for the lock",
)
@pytest.mark.user_input("The machine", "a process that is killed while it holds a lock", "survived: the lock is free")
@pytest.mark.parametrize("name", ["", "ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_lock_has_one_holder_and_is_free_when_that_is_killed(tmp_path, monkeypatch, name):
    """With flock, and with the answers of file systems that have none."""
    path, number = tmp_path / "x.lock", getattr(errno, name) if name else ""
    if name:

        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
    command = [sys.executable, "-c", HOLD, str(path), str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            message = f"busy (if no such process runs any more, delete {path}.owner)" if name else "busy"
            with pytest.raises(UserError) as refused, files.lock(path, "busy"):
                pass
            assert str(refused.value) == message
        finally:
            other.kill()
    for _ in range(2):
        with files.lock(path, "busy"):
            assert tmp_path.joinpath("x.lock.owner").exists() == bool(name)


def test_a_lock_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), files.lock(tmp_path / "file" / "x.lock", "busy"):
        pass


@pytest.mark.user_input("The machine", "a temporary file of a killed run", "survived: the same command removes it")
def test_temporary_files_of_killed_processes_are_removed(tmp_path, monkeypatch):
    (tmp_path / "student").mkdir()
    monkeypatch.setattr(files.Path, "replace", lambda *_: sys.exit("killed"))
    for path in (tmp_path / "a.json", tmp_path / "student" / "b.json"):
        with pytest.raises(SystemExit):
            files.write_json(path, {})
    others = {tmp_path / ".own.tmp", tmp_path / "student" / "c.tmp"}
    for path in others:
        path.touch()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    files.remove_temporary(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == others
