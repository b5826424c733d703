"""The tuning of a study: the same budget for every row, on images and a seed that the table does not use."""

import json

import pytest

from kdjax.commands import settings, study_runs, study_tuning
from kdjax.commands.study_variants import Variant
from tests.support.models import refused
from tests.support.studies import cells, run_study, stand_in
from tests.test_study import options

OWN = settings.read("quickstart").optimizer.lr


def ap(said):
    """Best: the doubled rate, ten times the weight of CWD, a tenth of MKD's; a share of 0.1."""
    value = 0.2 + 0.001 * int(said["seed"][-1]) + 0.05 * (said.get("optimizer.lr") == str(2 * OWN))
    weights = {key.split(".")[1]: said[key] for key in said if key.endswith(".weight")}
    if said["method"] == "ld":
        raise study_runs.Failed("no bins")
    if weights.get("cwd") == "100.0":
        value += 0.02
    if weights.get("mkd") == "0.1":
        value += 0.03
    if said.get("auto_weight.share") == "0.1":
        value += 0.04
    return value


def test_every_row_and_the_twin_get_the_same_number_of_runs(monkeypatch, tmp_path, capsys):
    asked = stand_in(monkeypatch, ap)
    flags = ["methods", "--methods=cwd,mkd,ld", "--tune=3", "--seeds=3", "--config.steps=80"]
    assert run_study(*flags, workdir=tmp_path) == 0
    out = capsys.readouterr().out
    rows = {row["name"]: row for row in cells(out)}
    first = [(path, said) for path, said in asked if "tuning" in path.parts]
    assert [said["method"] for _, said in first] == [""] * 3 + ["cwd"] * 3 + ["mkd"] * 3 + ["ld"] * 3
    assert len({path for path, _ in first}) == 12, "each has a folder of its own"
    assert {(said["seed"], said["data.holdout"]) for _, said in first} == {("2000000", "0.2")}
    assert "optimizer.lr" not in first[0][1], "the first is the config's own"
    table = [(path, said) for path, said in asked if "tuning" not in path.parts]
    assert not any("data.holdout" in said or said["seed"] == "2000000" for _, said in table)
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    [twin], entries = tuned["twins"], {entry["name"]: entry for entry in tuned["rows"]}
    best = twin["chosen"]
    assert [one["value"] for one in twin["tried"]] == [OWN, 2 * OWN, OWN / 2] and best == 2 * OWN
    assert {said["optimizer.lr"] for _, said in table} == {str(best)}, "student and twin have the twin's best rate"
    assert [entry["chosen"] for entry in entries.values()] == [10.0, 0.1, 1.0]
    assert [one["AP"] for one in entries["cwd"]["tried"]] == [0.25, pytest.approx(0.27), 0.25]
    assert entries["ld"]["tried"] == [{"value": value, "failed": "no bins"} for value in (1.0, 10.0, 0.1)]
    assert rows["cwd"]["tuned"] == f"rate {best:g}, weight × 10" and rows["cwd"]["gain in AP"] == "+2.00"
    assert rows["ld"]["note"] == "seed 0, 1, 2 failed: no bins"
    assert (tmp_path / "seed0" / f"mkd_methods.mkd.weight=0.1_optimizer.lr={best}").is_dir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("config.json")}
    asked.clear()
    assert run_study(*flags, workdir=tmp_path) == 0, "it goes on with what is there"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("config.json")} == before


def test_weights_that_set_themselves_try_shares_and_twins_the_rate_alone(monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, ap)
    flags = ["--methods=cwd", "--weights=published,auto", "--tune=2", "--seeds=1"]
    assert run_study("methods", *flags, workdir=tmp_path / "a") == 0
    tuned = {row["name"]: row["tuned"] for row in cells(capsys.readouterr().out)}
    assert tuned["cwd, auto"].endswith(", share 0.1") and tuned["cwd"].endswith(", weight × 10")
    assert run_study("twins", "--tune=2", "--seeds=3", workdir=tmp_path / "b") == 0
    [row] = cells(capsys.readouterr().out)
    assert row["tuned"].startswith("rate ") and "weight" not in row["tuned"] and row["verdict"] == "not shown"


def test_the_teachers_cache_for_the_tuning_lies_beside_that_of_the_table(monkeypatch, tmp_path, capsys):
    """The folder of a cache holds nothing else."""
    stand_in(monkeypatch, ap)
    written = []
    monkeypatch.setattr(study_runs, "call", lambda command: written.extend(f for f in command if "cache=" in f))
    flags = ["--methods=cwd", "--tune=2", "--seeds=1", "--config.data.views=2", f"--config.teacher.cache={tmp_path}/c/"]
    assert run_study("methods", *flags, workdir=tmp_path / "a") == 0
    assert written == [f"--config.teacher.cache={tmp_path}/{name}" for name in ("c-tuning", "c")]


def test_grids_begin_with_what_the_config_has():
    grids = (study_tuning.RATES, study_tuning.FACTORS, study_tuning.SHARES)
    assert {len({*grid}) for grid in grids} == {study_tuning.MOST}
    assert [grid[0] for grid in grids] == [1.0, 1.0, 0.3]


@pytest.mark.user_input(
    "Config and flags", "`kdjax study --tune` where nothing can be tuned", "refused before any run, with the reason"
)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["methods", "--tune=8"], "--tune must be in 0 .. 7, not 8"),
        (["methods", "--tune=-1"], "--tune must be in 0 .. 7, not -1"),
        (["weight", "--tune=2"], "--tune: the weights of the study weight are given: leave it out"),
        (["methods", "--tune=2", "--config.data.holdout=0.1"], "--tune: config.data.holdout is set, but the table"),
    ],
)
def test_a_tuning_that_has_no_meaning_is_refused(arguments, words, monkeypatch, tmp_path, capsys):
    asked = stand_in(monkeypatch, ap)
    assert words in refused(capsys, "study", *arguments, f"--workdir={tmp_path}") and not asked


def test_a_twin_that_fails_at_every_rate_ends_the_study(monkeypatch, tmp_path, capsys):
    def fails(said):
        raise study_runs.Failed("no memory")

    stand_in(monkeypatch, fails)
    told = refused(capsys, "study", "methods", "--methods=mkd", "--tune=2", f"--workdir={tmp_path}")
    assert told == "kdjax: --tune: the twin, which all runs need, failed: no memory"


def test_the_default_rate_is_that_of_the_linear_rule(tmp_path):
    chosen = options(tune=2, flags=["--config.optimizer.lr=0", "--config.batch_size=32"])
    own, doubled = study_tuning.learning_rates(chosen, Variant("mkd", "mkd"))
    assert (own.value, own.flags) == (0.0005, ()) and doubled.flags == ("--config.optimizer.lr=0.001",)
