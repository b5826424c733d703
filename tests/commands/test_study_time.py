"""Studies at equal time: what is measured, and the twin that is trained longer."""

import json

import pytest

from kdjax.commands import study_layout, study_time
from kdjax.commands.study_variants import Variant
from kdjax.errors import UserError
from tests.support.models import refused
from tests.support.studies import cells, run_study, stand_in
from tests.test_study import options


def log(path, lines):
    rows = [dict(step=step, kind=kind, seconds=seconds) for step, kind, seconds in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{damaged\n")
    return path


def test_seconds_of_a_step_leave_out_starts_and_pauses(tmp_path):
    lines = [(10, "train", 99.0), (20, "train", 1.0), (30, "train", 1.2), (40, "train", 60.0), (40, "eval", 5.0)]
    # Killed at 50 and resumed from the checkpoint at 30: its first line starts programs again.
    lines += [(50, "train", 1.1), (40, "train", 50.0), (50, "train", 1.0), (55, "train", 0.6)]
    assert study_time.step_seconds(log(tmp_path / "m", lines)) == pytest.approx((1 + 1.2 + 1.1 + 1 + 0.6) / 45)
    with pytest.raises(UserError, match=r"m: it has too few lines to measure a step: set config.log_every to less$"):
        study_time.step_seconds(log(tmp_path / "m", lines[:2]))


def test_times_are_rounded_up_to_tenths_and_count_the_writing_of_a_cache():
    assert study_time.of_steps(0.13, 0.1)["times"] == 1.3 and study_time.of_steps(0.1301, 0.1)["times"] == 1.4
    assert study_time.of_steps(0.05, 0.1)["times"] == 1.0, "the twin is never shorter"
    assert study_time.of_steps(0.1, 0.1, cache=0.02)["ratio"] == pytest.approx(1.2)
    assert study_time.scaled(800, 1.3) == 1040 and study_time.scaled(7, 1.1) == 8


def test_the_longer_twin_has_its_schedule_stretched():
    flags = ["--config.steps=100", "--config.data.stage2.start=81", "--config.optimizer.drops=50,80"]
    chosen, mkd = options(flags=[*flags, "--config.optimizer.warmup=10"]), Variant("mkd", "mkd")
    longer = study_time.longer(chosen, mkd, 0, 1.3)
    assert study_time.longer(chosen, mkd, 0, 1.0) is mkd
    made = study_layout.read_config(study_layout.twin_flags(chosen, longer, 0))
    assert (made.steps, made.data.stage2.start, made.optimizer.drops) == (130, 106, (65, 104))
    assert made.optimizer.warmup == 10
    assert study_layout.twin_folder(chosen, longer, 0).name.startswith("twin_steps=130_data.stage2.start=106_")


def test_a_study_at_equal_time_has_its_own_gain_and_verdict(monkeypatch, tmp_path, capsys):
    """The ratio is measured once; rows of about the same time share the longer twin; an interrupted study goes on."""

    def ap(said):
        return (
            0.1
            + 0.01 * int(said["seed"])
            + {"": 0, "mkd": 0.03, "cwd": 0.02, "pkd": 0.01}[said["method"]]
            + (0.02 * (int(said["steps"]) > 800))
        )

    asked = stand_in(monkeypatch, ap, seconds={"mkd": 0.125, "cwd": 0.121})
    flags = ["methods", "--methods=mkd,cwd,pkd", "--equal=time", "--seeds=3", "--config.steps=800"]
    assert run_study(*flags, workdir=tmp_path) == 0
    mkd, cwd, pkd = cells(capsys.readouterr().out)
    assert [(row["name"], row["time of a step"], row["longer twin"]) for row in (mkd, cwd, pkd)] == [
        ("mkd", "1.25", "× 1.3"),
        ("cwd", "1.21", "× 1.3"),
        ("pkd", "1.00", "× 1"),
    ]
    assert (mkd["gain in AP"], mkd["gain at equal time"], mkd["its verdict"]) == ("+3.00", "+1.00", "helps")
    assert (cwd["gain at equal time"], cwd["verdict"], cwd["its verdict"]) == ("+0.00", "helps", "not shown")
    assert pkd["gain at equal time"] == pkd["gain in AP"] == "+1.00"
    twins = {path.name for path, said in asked if not said["method"]}
    assert twins == {"twin", "twin_steps=1040"} and {path.parent.name for path, _ in asked} == {
        "seed0",
        "seed1",
        "seed2",
    }
    before = (tmp_path / "times.json").read_text()
    assert [*json.loads(before)] == ["mkd", "cwd", "pkd", "sha256"]
    (tmp_path / "seed0" / "mkd" / "metrics.jsonl").write_text("")  # not measured again
    asked.clear()
    assert run_study(*flags[:3], "--seeds=4", flags[4], workdir=tmp_path) == 0
    assert (tmp_path / "times.json").read_text() == before and {path.name for path, said in asked} >= twins
    capsys.readouterr()
    (tmp_path / "times.json").write_text(before.replace("0.1", "0.2", 1))
    told = refused(capsys, "study", *flags, f"--workdir={tmp_path}")
    assert told.endswith("times.json: it was changed after it was written: delete it to have the times measured")


def test_a_share_of_writing_the_cache_is_counted(monkeypatch, tmp_path):
    """The seconds of the files, over the runs of the study that read them and their steps."""

    class Written:
        def listed(self):
            return {"a": {"seconds": 50.0}, "b": {"seconds": 10.0}, "older": {}}

    monkeypatch.setattr(study_time.shards, "find", lambda folder: Written())
    variants = [Variant("mkd", "mkd"), Variant("cwd", "cwd"), Variant("other", "mkd", ("--config.teacher.weights=A",))]
    chosen = options(seeds=3, cache=str(tmp_path), views=True, flags=["--config.steps=100"])
    share = study_time.writing_seconds(chosen, variants, variants[0], 0)
    assert share == pytest.approx(60 / (2 * 3) / 100)
    assert study_time.writing_seconds(chosen, variants, variants[2], 0) == pytest.approx(60 / 3 / 100)
    assert study_time.writing_seconds(options(cache=""), variants, variants[0], 0) == 0


@pytest.mark.user_input(
    "Config and flags",
    "`kdjax study --equal=time` with a log of too few lines",
    "refused: set --config.log_every=N or less",
)
def test_a_study_that_cannot_be_measured_is_refused(monkeypatch, tmp_path, capsys):
    asked = stand_in(monkeypatch, lambda said: 0.1)
    flags = ["--equal=time", "--config.steps=50", f"--workdir={tmp_path}"]
    told = refused(capsys, "study", "methods", "--methods=mkd", *flags)
    assert told == (
        "kdjax: --equal=time: 50 steps with a line every 20 are too few lines to measure a step: set "
        "--config.log_every=16 or less"
    )
    assert "twins have no teacher" in refused(capsys, "study", "twins", *flags) and not asked
