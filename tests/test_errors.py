"""The sentences on the faults of the machine, also inside the exceptions of libraries; a bug is none."""

import errno
import os
import signal

import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from kdjax import cli, files
from kdjax.commands import latency
from kdjax.errors import UserError, fault, interruptible

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "student/key/0" in OCDBT database at local file "/runs/a/checkpoints/5.tmp/": '
    "Failed writing: [OS error 28: ENOSPC No space left on device] [source locations='...']\nmore"
)


def system(number: int, *name: str) -> OSError:
    return OSError(number, os.strerror(number), *name)


def raised(error: Exception, *, cause: Exception | None = None, handling: Exception | None = None) -> Exception:
    """An exception as it arrives: with a cause, or raised while another one was handled."""
    try:
        try:
            if handling:
                raise handling
        finally:
            raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.user_input(
    "The machine", "a full disk or quota, read-only, no permission, a bad disk", "reported in one sentence: what to do"
)
@pytest.mark.user_input("The machine", "used-up memory or file handles", "reported in one sentence: what to do")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (system(errno.ENOSPC, "a/b"), "a/b: the disk is full: make room"),
        (system(errno.EDQUOT, "a/b"), "a/b: the disk quota is used up: make room or raise the quota"),
        (system(errno.EROFS, "a"), "a: the file system is read-only: make it writable or choose another folder"),
        (system(errno.EACCES, "a"), "a: permission is denied: change the permissions or choose another folder"),
        (system(errno.EMFILE), "too many files are open: raise the limit (ulimit -n)"),
        (system(errno.EIO, "a"), "a: the disk fails: check the disk or choose another folder"),
        (
            system(errno.ENOENT, "/nowhere/at/all/metrics.jsonl"),
            "/nowhere/at/all/metrics.jsonl: its folder does not exist or was removed: restore it or choose another "
            "folder",
        ),
        (system(errno.ENOENT, "no_such_file"), "no_such_file: No such file or directory"),
        (OSError("it is odd"), "it is odd"),
        (ValueError(TENSORSTORE), "/runs/a/checkpoints/5.tmp: the disk is full: make room"),
        (
            ExceptionGroup("many", [KeyError("a"), ValueError(TENSORSTORE)]),
            "/runs/a/checkpoints/5.tmp: the disk is full: make room",
        ),
        (
            raised(RuntimeError("save failed"), cause=system(errno.EDQUOT, "q")),
            "q: the disk quota is used up: make room or raise the quota",
        ),
        (raised(RuntimeError("loop is closed"), handling=system(errno.ENOSPC, "q")), "q: the disk is full: make room"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nhints"),
            "the memory is used up (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.): close other programs, or "
            "compute with smaller batches, images or models",
        ),
        (
            MemoryError(),
            "the memory is used up: close other programs, or compute with smaller batches, images or models",
        ),
        (ValueError("a bug"), None),
        (KeyError("a"), None),
        # What a program handles, in the meantime, is not why it fails.
        (raised(KeyError("a"), handling=system(errno.EACCES, "q")), None),
        (raised(KeyError("a"), handling=system(errno.ENOENT, "q")), None),
    ],
    ids=str,
)
def test_faults_have_sentences_and_bugs_have_none(error, told):
    assert fault(error) == told


def test_a_huge_array_is_a_fault():
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert fault(caught.value).startswith("the memory is used up (Unable to allocate 1.00 EiB")


@pytest.mark.user_input("The machine", "one output that cannot be written", "reported: the other results are written")
def test_one_output_that_fails_does_not_lose_the_others(tmp_path):
    failed: list[str] = []
    (tmp_path / "a").mkdir()
    for name in "abc":
        with files.attempt(failed):
            files.write_text(tmp_path / name, name)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["b", "c"]
    with pytest.raises(UserError) as caught:
        files.finish(failed)
    what = f"{tmp_path / 'a'}: Is a directory"
    assert str(caught.value) == f"{what}; the other results are written: run the same command again"
    with pytest.raises(KeyError), files.attempt(failed):
        raise KeyError("a bug")
    files.finish([])


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a link to nowhere in the place of a folder to make", "refused: move it away"
)
def test_outputs_that_cannot_be_written_are_found(tmp_path):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "student").write_text("")
    (tmp_path / "twin").symlink_to(tmp_path / "nowhere")
    files.check_outputs("--out", tmp_path, files=["a", "b/c"], folders=["d"])
    for outputs, told in (
        (dict(files=["report.html"]), "report.html is a folder, where a file is to be written: move it away"),
        (dict(folders=["student"]), "student is not a folder, where one is to be made: move it away"),
        (dict(folders=["twin"]), "twin is not a folder, where one is to be made: move it away"),
    ):
        with pytest.raises(UserError) as caught:
            files.check_outputs("--out", tmp_path, **outputs)
        assert str(caught.value) == f"--out: {tmp_path}/{told}"


def test_ctrl_c_ends_a_command_where_a_library_makes_an_error_of_it(monkeypatch, capsys):
    """As matplotlib's C code does, which calls Python: "Invalid affine transformation matrix"."""

    def careless(**_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("Invalid affine transformation matrix") from None

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible(), interruptible():
            careless()
        with pytest.raises(ValueError, match="mine"), interruptible():
            raise ValueError("mine")
        monkeypatch.setattr(latency, "run", careless)
        assert cli.main(["latency", "--model=quickstart_teacher"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""
