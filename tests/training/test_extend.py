"""A finished run goes on where its schedule allows it."""

import pytest

from kdjax import weights
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.training.run import run
from kdjax.training.setup import check_extension
from tests.support.runs import tiny_config


def plain(folder, steps, **changes):
    common = dict(steps=steps, optimizer__warmup=1, optimizer__flat=1.0, data__stage2__start=0, checkpoint__every=4)
    return tiny_config(folder, teacher=None, **common | changes)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a finished run with more steps", "refused; trained on with `config.extend`"
)
@pytest.mark.slow
def test_an_extended_run_is_the_longer_run(folder, tmp_path):
    longer = run(plain(folder, 8), tmp_path / "longer")
    run(plain(folder, 4), tmp_path / "run")
    with pytest.raises(UserError, match=r"other settings \(steps was 4, is 8\)"):
        run(plain(folder, 8), tmp_path / "run")
    assert run(plain(folder, 8, extend=True), tmp_path / "run") == longer
    first, second = (flatten(weights.load(tmp_path / name / "student")[1]) for name in ("longer", "run"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    with pytest.raises(UserError, match=r"config\.steps is 6, but the run is already at step 8: set more"):
        run(plain(folder, 6, extend=True), tmp_path / "run")
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.002, is 0\.1"):
        run(plain(folder, 9, extend=True, optimizer__lr=0.1), tmp_path / "run")


def test_a_schedule_that_has_decayed_is_not_extended(folder):
    cosine = plain(folder, 200, optimizer__flat=0.5)
    check_extension(cosine, 100, 50)  # the decay of the shorter run has not begun
    with pytest.raises(UserError, match=r"of the 60 steps that are done, those from 51 on had another learning rate"):
        check_extension(cosine, 100, 60)
    check_extension(plain(folder, 200, optimizer__drops=(30, 60)), 100, 100)


def test_a_run_in_int8_is_extended_before_it_rounds(folder):
    longer = plain(folder, 200, student__options={"int8": True}, int8_start=0.5)
    check_extension(longer, 100, 50)
    with pytest.raises(
        UserError, match=r"of the 60 steps that are done, those from 50 on are rounded to 8 bits, but in a"
    ):
        check_extension(longer, 100, 60)
