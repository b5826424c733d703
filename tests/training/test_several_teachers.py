"""A run with several teachers: its terms, results and resumption; which settings are refused."""

import json

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax.commands import settings as flags
from kdjax.errors import UserError
from kdjax.training import checks
from kdjax.training import config as settings
from kdjax.training.run import run
from tests.support.runs import tiny_config


def several(folder, **teachers):
    config = tiny_config(folder, teacher=None, steps=4, log_every=2, checkpoint__every=2, optimizer__warmup=1)
    config.twin = True
    for name, chosen in teachers.items():
        config.teachers[name] = settings.teacher(**chosen)
    return config


@pytest.fixture(scope="module")
def chosen(teacher_folder):
    """Two teachers, one of them with no methods of its own, and their mean."""
    return dict(
        near=dict(weights=str(teacher_folder), methods="cwd"),
        far=dict(weights="quickstart_teacher"),
        both=dict(mean="near+far", methods="hinton"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", [0, 4])
def test_terms_and_results_are_those_of_each_teacher(folder, chosen, tmp_path, capsys, unlabelled):
    """Also where they look at images without labels."""
    config = several(folder, **chosen)
    if unlabelled:
        for shade in range(unlabelled):
            cv2.imwrite(str(tmp_path / f"{shade}.png"), np.full((48, 80, 3), 60 * shade, np.uint8))
        config.data.update(dict(unlabelled=str(tmp_path), unlabelled_ratio=unlabelled / config.batch_size))
    tmp_path = tmp_path / "run"
    results = run(config, tmp_path)
    said = f"Images without labels: {unlabelled}, {unlabelled} in a batch beside 8 with labels"
    assert (said in capsys.readouterr().out) == bool(unlabelled)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert {"student/near/cwd/cwd", "student/both/hinton/classes", "weight/near/cwd/cwd"} <= set(trained[-1])
    assert sorted(results["teachers"]) == ["far", "near"]
    assert results["teacher"] == max(results["teachers"].values(), key=lambda one: one["AP"])
    assert sorted(path.name for path in (tmp_path / "detections").iterdir()) == [
        "student.json",
        "teacher_far.json",
        "teacher_near.json",
        "twin.json",
    ]
    card = (tmp_path / "student" / "README.md").read_text()
    assert "both/hinton + near/cwd" in card and "mean of `near+far`" in card
    assert "The teacher in tables and images is the best" in (tmp_path / "report.html").read_text()
    assert run(config, tmp_path) == results  # evaluated again from the checkpoint
    config.teachers.near.weights = "quickstart_teacher"
    with pytest.raises(UserError, match=r"teachers\.near\.weights was "):
        run(config, tmp_path)


@pytest.mark.user_input(
    "Config and flags", "several teachers whose settings contradict each other", "refused: the setting is named"
)
def test_settings_of_teachers_are_checked(folder, teacher_folder, chosen):
    def told(change, **more):
        config = several(folder, **{**chosen, **more})
        change(config)
        with pytest.raises(UserError) as refused:
            checked(config)
        return str(refused.value)

    def checked(config):
        checks.check_settings(config)
        checks.check_models(config)

    def nothing(config):
        pass

    assert "there are also config.teacher or config.methods" in told(
        lambda c: c.methods.update(settings.methods("mkd"))
    )
    assert told(nothing, both=dict(methods="hinton")).startswith(
        "config.teachers.both: it has neither weights nor mean"
    )
    assert "far+none' must be different names" in told(nothing, both=dict(mean="far+none", methods="hinton"))
    assert "'far+far' must be different names" in told(nothing, both=dict(mean="far+far", methods="hinton"))
    assert "is one teacher: it needs two" in told(nothing, both=dict(mean="far", methods="hinton"))
    assert "config.teachers.alone.methods: there is no method" in told(nothing, alone=dict(weights=str(teacher_folder)))
    assert "config.teachers.near.weights: there is no file" in told(lambda c: c.teachers.near.update(weights="none"))
    assert "unknown setting config.teachers.near.x" in told(
        lambda c: c.teachers.update(near=ConfigDict(dict(c.teachers.near.items(), x=1)))
    )
    assert "config.teachers.near.methods.cwd" in told(lambda c: c.teachers.near.methods.cwd.update(tau=-1.0))


def test_flags_name_teachers(teacher_folder):
    config = flags.read(
        "quickstart",
        [
            "--config.teachers.a.weights=quickstart_teacher",
            "--config.teachers.a.methods=cwd+rm",
            "--config.teachers.a.methods.cwd.weight=2.0",
            "--config.teachers.b.detector=rtmdet_tiny",
            "--config.teachers.b.options.widen=0.25",
        ],
    )
    assert config.teachers.a.methods.cwd.weight == 2.0 and "rm" in config.teachers.a.methods
    assert config.teachers.b.options.widen == 0.25
    with pytest.raises(UserError, match=r"config\.teachers\.a\.methods: .*nothing"):
        flags.read("quickstart", ["--config.teachers.a.methods=nothing"])
    with pytest.raises(UserError, match=r"config\.teachers\.a\.wights"):
        flags.read("quickstart", ["--config.teachers.a.wights=x"])
