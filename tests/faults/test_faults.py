"""The short form of the harness: a run that is killed, and damaged files. `python -m tests.faults` is the long form."""

import random

import pytest

from kdjax.training.log import Log
from tests.faults import corruptions, kills
from tests.faults.runs import make_home, metrics, unsound
from tests.shared import ROOT

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = make_home(tmp_path_factory.mktemp("faults"), ROOT / ".cache" / "jax")
    return made._replace(flags=("--config.twin=False",))  # a third of each start is the twin's


@pytest.fixture(scope="module")
def known(home):
    return kills.reference(home, again=False)


def test_a_killed_run_ends_as_if_undisturbed(home, known):
    done, faults = kills.disturbed(home, known, "killed", random.Random(3), 1, signals=["SIGKILL"])
    assert not faults and [kill.signal for kill in done] == ["SIGKILL"]


# What a damaged checkpoint breaks in TensorStore's threads is reported where it is read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damaged_file_is_used_silently(home, known):
    cases = corruptions.run(home, known.workdir, 44, seed=0)
    assert not corruptions.faults(cases)
    assert {case.kind for case in cases} == {*corruptions.kinds(home, known.workdir)}
    assert {case.damage for case in cases} == {*corruptions.DAMAGES}
    assert {case.outcome for case in cases} >= {"harmless", "passed over", "refused"}


def test_a_damaged_line_is_left_out_and_told(tmp_path):
    """A line that a reader of metrics.jsonl leaves out is not compared, but named."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "report.html").write_text("</html>")
    with Log(tmp_path, 0, board=False) as written:
        written.write(1, "eval", {"loss": 1.0})
        written.write(2, "eval", {"loss": 2.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert metrics(tmp_path) == {(1, "eval", "loss"): 1.0, (2, "eval", "loss"): 2.0} and unsound(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(whole.replace(b"1.0", b"1\x00"))
    assert metrics(tmp_path) == {(2, "eval", "loss"): 2.0}
    assert unsound(tmp_path) == ["metrics.jsonl has 1 damaged lines"]
