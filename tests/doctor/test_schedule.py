"""Wrong schedules are named; those of the configs are not."""

import pytest

from kdjax.commands.settings import read
from kdjax.doctor.findings import ERROR, OK, WARNING
from kdjax.doctor.schedule import check_schedule
from tests.support.findings import errors


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("quickstart", 200),
        ("supervised/scenes", 2000),
        ("distill/mkd_rtmdet", 118287),
        ("supervised/rtmdet", 118287),
        ("supervised/dense", 118287),
        ("distill/dense", 118287),
        ("distill/two_stage", 118287),
    ],
)
def test_the_schedules_of_the_configs_are_sound(name, size):
    assert not errors(check_schedule(read(name), size))


@pytest.mark.user_input(
    "Config and flags",
    "a learning rate that does not fit the batch size",
    "reported by `kdjax doctor`, with the linear rule",
)
def test_a_rate_that_does_not_follow_the_batch_size_is_noticed():
    config = read("distill/mkd_rtmdet")
    for batch, level in ((256, OK), (16, WARNING), (4096, ERROR)):
        config.update_from_flattened_dict({"batch_size": batch, "optimizer.lr": 0.004})
        [finding] = [one for one in check_schedule(config, 118287) if one.subject == "learning rate"]
        assert finding.level == level, finding
        if batch == 16:
            assert "16 times the linear rule (RTMDet's 0.004 for 256 images) for 16 images" in finding.message


def test_a_low_rate_is_no_error_in_fine_tuning(tmp_path):
    config = read("quickstart")
    config.update_from_flattened_dict({"optimizer.lr": 2e-5, "student.weights": str(tmp_path)})
    levels = {finding.subject: finding.level for finding in check_schedule(config, 200)}
    assert levels["learning rate"] == WARNING and "length" not in levels


@pytest.mark.user_input(
    "Config and flags", "a rate too high or low, too few steps, a method hardly active", "reported by `kdjax doctor`"
)
@pytest.mark.parametrize(
    ("changes", "subject", "words"),
    [
        ({"optimizer.lr": 0.08}, "learning rate", "too high"),
        ({"optimizer.lr": 0.004, "batch_size": 4096}, "learning rate", "too low"),
        (
            {"optimizer.name": "sgd", "optimizer.lr": 0.04},
            "learning rate",
            "8 times the linear rule (mmdetection's 0.01",
        ),
        ({"optimizer.lr": 0.0, "steps": 400}, "length", "too little for random initialisation"),
        ({"ema.ramp": 10}, "moving average", "increase config.ema.ramp"),
        ({"methods.mkd.stop": 10}, "mkd", "1% of its weight"),
        ({"methods.mkd.start": 1599}, "mkd", "0% of its weight"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_named(changes, subject, words):
    config = read("quickstart")
    config.update_from_flattened_dict(changes)
    assert words in errors(check_schedule(config, 200))[subject]
