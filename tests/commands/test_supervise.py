"""`kdjax supervise`, with commands of a shell."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kdjax import cli
from kdjax.commands import supervise
from kdjax.errors import UserError


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(supervise, "PAUSE", 0.05)


def supervised(tmp_path, script, max_restarts=3):
    """Runs a script, which counts its runs in the file `runs`; the exit code and the number of runs."""
    script = f"cd {tmp_path}; echo >>runs; n=$(wc -l <runs); {script}"
    code = supervise.run(words=["bash", "-c", script], workdir=str(tmp_path), max_restarts=max_restarts)
    return code, len((tmp_path / "runs").read_text())


@pytest.mark.parametrize("code", [0, 1, 2, 130, 255])
def test_other_codes_are_final(tmp_path, code):
    assert supervised(tmp_path, f"exit {code}") == (code, 1)


@pytest.mark.parametrize("end", ["exit 75", "exit 143", "kill -KILL $$", "kill -ABRT $$"])
def test_a_preempted_command_runs_again(tmp_path, end, capfd):
    assert supervised(tmp_path, f"[ $n = 3 ] || {end}") == (0, 3)
    assert capfd.readouterr().err.count("it runs again in 0 s") == 2


def test_restarts_without_a_new_checkpoint_are_bounded(tmp_path, capfd):
    assert supervised(tmp_path, "exit 75", max_restarts=2) == (75, 3)
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == (
        "kdjax supervise: the command ended with code 75 and made no new checkpoint, 3 times: given up "
        "(there is no checkpoint)"
    )


def test_under_nohup_sighup_ends_nothing(tmp_path):
    """The command inherits that the signal is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert supervised(tmp_path, "kill -HUP $PPID $$; exit 3") == (3, 1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_pauses_begin_with_the_shortest_and_double(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(supervise.Child, "pause", lambda self, seconds: pauses.append(seconds) or True)
    script = "[ $n -ne 2 ] || mkdir -p checkpoints/10; exit 75"
    assert supervised(tmp_path, script, max_restarts=2)[0] == 75
    assert pauses == [one * supervise.PAUSE for one in (1, 1, 1, 2)]


def test_a_new_checkpoint_begins_the_count_anew(tmp_path):
    # Checkpoints in runs 2 and 4; without one are 1, 3, 5 and 6.
    script = "[ $((n % 2)) = 1 ] || [ $n -gt 4 ] || mkdir -p checkpoints/${n}0; exit 75"
    assert supervised(tmp_path, script, max_restarts=1) == (75, 6)


def test_the_workdir_is_that_of_the_command(tmp_path):
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "checkpoints" / "13.orbax-checkpoint-tmp").mkdir()
    for words in ([f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)]):
        assert supervise.workdir_of(["kdjax", "train", *words, "-x"]) == str(tmp_path)
    assert supervise.newest(tmp_path) == 12
    assert supervise.newest(tmp_path / "nowhere") == -1


@pytest.mark.user_input("Config and flags", "`kdjax supervise` without a workdir, or with no such program", "refused")
def test_what_cannot_be_supervised(tmp_path, capsys):
    assert cli.main(["supervise", "--", "true"]) == 2
    assert "--workdir is missing, and the command has none" in capsys.readouterr().err
    assert cli.main(["supervise", "--workdir=x", "--", "no-such-program", "--config=a"]) == 2
    assert "COMMAND: no-such-program cannot be run: No such file or directory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir: .*file is not a folder"):
        supervise.run(words=["true"], workdir=str(tmp_path / "file"), max_restarts=0)
    with pytest.raises(UserError, match="--max-restarts: -1 must be 0 or more"):
        supervise.run(words=["true"], workdir="x", max_restarts=-1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_and_ends_the_supervision(tmp_path, number):
    """As a scheduler and Ctrl-C send it: the command saves and ends, and is not run again."""
    script = f"trap 'echo saved >{tmp_path}/saved; exit {128 + number}' {number}; echo >>{tmp_path}/runs; "
    script += "while true; do sleep 0.05; done"
    words = [sys.executable, "-m", "kdjax", "supervise", f"--workdir={tmp_path}", "--", "bash", "-c", script]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 128 + number
    assert (tmp_path / "saved").exists() and len((tmp_path / "runs").read_text()) == 1


def test_a_signal_in_a_pause_ends_it(tmp_path):
    with supervise.Child(["true"]) as child:
        signal.raise_signal(signal.SIGTERM)
        assert not child.pause(60) and child.run() == 143
