"""Runs side by side: the table, the page, the json, and folders that are no runs."""

import json
import math

import pytest

from kdjax import cli, files
from kdjax.commands import compare
from kdjax.report.charts import COLOURS
from tests.support.models import refused
from tests.support.pages import Page

STEPS = 100


def make(folder, *, ap=0.4, upto=STEPS, method="mkd", lr=0.004, data="ab12", classes=("cell", "plate"), seconds=120.0):
    """A folder as the trainer leaves it; `upto` is its last step."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(10, upto + 1, 10):
        values = {"student/total": math.exp(-step / STEPS), f"student/{method}/neck": 1.0, f"share/{method}": 0.3}
        rows.append({"step": step, "kind": "train", "seconds": seconds / 10, "lr": lr, "images_per_s": 50.0} | values)
        if step % 50 == 0:
            rows.append({"step": step, "kind": "eval", "student/AP": ap * step / STEPS, "student/AP50": ap})
            rows[-1] |= {"twin/AP": 0.3, "twin/AP50": 0.35}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"steps": STEPS, "eval": {"limit": 7}, "methods": {method: {}}, "optimizer": {"lr": lr}}
    config["student"] = {"detector": "rtmdet_pico", "weights": ""}
    facts = {"data": data, "jax": "0.10.2"}
    files.write_json(folder / "config.json", files.sealed({"config": config, "runs": [facts]}))
    if upto == STEPS:
        student = {"AP": ap, "AP50": ap + 0.1, "params": 1_000_000, "flops": 5}
        twin = {"AP": 0.3, "AP50": 0.35, "params": 1_000_000, "flops": 5}
        gain = {"AP": ap - 0.3, "AP50": -1}
        results = {"teacher": None, "twin": twin, "student": student, "gain": gain}
        files.write_json(folder / "results.json", files.sealed(results))
        by_class = {name: ap + 0.1 * i * ap for i, name in enumerate(classes)}
        files.write_json(folder / "per_class.json", {"student": by_class, "twin": {}})
        files.write_json(folder / "time.json", {"seconds": {"start": 60.0, "step": 540.0}, "processes": []})
    return folder


def compared(tmp_path, *folders):
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, folders), f"--out={out}"]) == 0
    text = (out / "compare.html").read_text(encoding="utf-8")
    return Page(text), json.loads((out / "compare.json").read_text()), text


def test_two_finished_runs_and_one_that_is_not(tmp_path, capsys):
    runs = [make(tmp_path / "a" / "cwd", ap=0.45, method="cwd"), make(tmp_path / "b" / "cwd", ap=0.4, lr=0.002)]
    runs.append(make(tmp_path / "b" / "half", ap=0.5, upto=60))
    page, content, text = compared(tmp_path, *runs)
    first, second, half = content["runs"]
    assert [run["name"] for run in content["runs"]] == ["a/cwd", "b/cwd", "half"]
    assert first["finished"] and first["metrics"]["AP"] == 0.45 and first["seconds"] == 600
    assert first["gain"] == {"AP": pytest.approx(0.15)}, "an undefined gain is left out"
    assert not half["finished"] and (half["step"], half["evaluated"], half["limit"]) == (60, 50, 7)
    assert half["metrics"]["AP"] == 0.25 and half["gain"]["AP"] == pytest.approx(-0.05) and half["seconds"] == 72
    assert half["per_class"] == {} and second["per_class"] == {"cell": 0.4, "plate": pytest.approx(0.44)}
    assert content["settings"] == {
        "config.methods.cwd": [{}, None, None],
        "config.methods.mkd": [None, {}, {}],
        "config.optimizer.lr": [0.004, 0.002, 0.004],
    }
    table = {row[0]: row[1:] for row in page.rows}
    assert table["a/cwd"] == ["finished", "rtmdet_pico", "cwd", "45.0", "55.0", "+15.0", "10 minutes", "1M"]
    assert [cell.replace("\xa0", " ") for cell in table["half"]] == [
        "step 60 of 100", "rtmdet_pico", "mkd", "25.0", "50.0", "−5.0", "1 minute", "–",
    ]  # fmt: skip
    assert table["plate"] == ["49.5", "44.0", "−5.5"] and table["cell"] == ["45.0", "40.0", "−5.0"]
    assert list(table).index("plate") < list(table).index("cell"), "the largest difference comes first"
    assert "a/cwd has the highest AP, 45.0; b/cwd is next with 40.0. Not finished: half." in page.text
    assert "half: metrics after step 50, on the first 7 validation images." in page.text
    told = capsys.readouterr().out
    assert "a/cwd has the highest AP" in told and told.rstrip().endswith("compare.html")
    charts = [attrs["aria-label"] for attrs in page.all("svg") if attrs.get("role") == "img"]
    [ap] = [label for label in charts if label.startswith("Chart of AP:")]
    assert all(name in ap for name in ("a/cwd from 22.5 at step 50 to 45", "half from 25 at step 50 to 25"))
    assert any(label.startswith("Chart of share of the gradient of mkd:") for label in charts)
    assert not any("cwd/neck" in label for label in charts), "of one run only"
    for place in range(3):
        assert f'class="line run{place}"' in text and f"var(--run{place})" in text
    assert not page.all("script") and 'http-equiv="refresh"' not in text


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "runs to compare whose metrics.jsonl has damaged lines", "reported: how many"
)
def test_damaged_lines_are_counted_and_equal_runs_are_named(tmp_path, capsys):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    lines = (second / "metrics.jsonl").read_text().splitlines()
    lines[0] = lines[0][:-5]
    (second / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page, _, _ = compared(tmp_path, first, second)
    assert f"note: {second / 'metrics.jsonl'}: 1 damaged lines are left out" in capsys.readouterr().err
    assert "a and b have the highest AP, 40.0." in page.text


def test_runs_on_other_data_are_not_comparable(tmp_path):
    page, content, _ = compared(tmp_path, make(tmp_path / "a"), make(tmp_path / "b", data="cd34", classes=("dog",)))
    assert "their APs are not comparable. a and b have the highest AP, 40.0." in page.text
    assert content["settings"]["data"] == ["ab12", "cd34"]
    assert {row[0]: row[1:] for row in page.rows}["dog"] == ["–", "40.0", "–"]


def test_many_runs_have_colours_and_dashes_of_their_own(tmp_path):
    _, _, text = compared(tmp_path, *(make(tmp_path / f"run{i}", ap=0.3 + 0.01 * i) for i in range(COLOURS + 2)))
    assert "border-top:3px dashed var(--run1)" in text and "stroke-dasharray" in text


def test_a_run_before_its_first_evaluation(tmp_path):
    page, content, _ = compared(tmp_path, make(tmp_path / "a", upto=10), make(tmp_path / "b"))
    assert content["runs"][0]["metrics"] is None and content["runs"][0]["gain"] is None
    assert "b has AP 40.0; the others have none yet. Not finished: a." in page.text


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "folders to compare that are no runs", "refused: what is missing, or which run"
)
def test_folders_that_are_no_runs(tmp_path, capsys):
    run = make(tmp_path / "run")
    out = f"--out={tmp_path / 'out'}"
    (tmp_path / "empty").mkdir()
    (run / "student").mkdir()
    for path, words in (
        (tmp_path / "missing", "there is no such folder: name the workdir of a run"),
        (tmp_path / "empty", "it is not the folder of a run (metrics.jsonl and config.json): name the workdir"),
        (run / "student", f"it is not the folder of a run (metrics.jsonl and config.json): its run is {run}"),
        (tmp_path / "empty" / ".." / "run", f"it is the same run as {run}: name each run once"),
    ):
        assert refused(capsys, "compare", str(run), str(path), out).startswith(f"kdjax: {path}: {words}")
    told = refused(capsys, "compare", str(run), "gs://bucket/runs/a", out)
    assert told == "kdjax: gs://bucket/runs/a: runs in object stores are not read: copy it to this machine"
    assert "it is the only run: name two or more" in refused(capsys, "compare", str(run), out)
    other = make(tmp_path / "other")
    assert "is the folder of a run" in refused(capsys, "compare", str(run), str(other), f"--out={other}")
    results = (other / "results.json").read_text()
    (other / "results.json").write_text(results.replace("0.4", "0.9"))
    assert "results.json: it was changed (its SHA-256 differs): delete it" in refused(
        capsys, "compare", str(run), str(other), out
    )
    (other / "results.json").write_text(results)
    (other / "config.json").write_text("{}")
    assert "config.json: it is damaged or incomplete" in refused(capsys, "compare", str(run), str(other), out)
    assert not (tmp_path / "out").exists()


@pytest.mark.user_input("Workdirs, checkpoints and logs", "HTML in names of runs to compare", "read as plain text")
def test_names_are_escaped(tmp_path):
    evil = "<script>alert(1)<b>"
    page, _, text = compared(tmp_path, make(tmp_path / "a"), make(tmp_path / evil, method="a<b>"))
    assert not page.all("script") and "<script" not in text and evil in page.text


def test_settings_are_flat_and_only_those_that_differ():
    tree = {"a": {"b": 1, "c": [1]}, "d": "x"}
    assert compare.flat(tree, "config") == {"config.a.b": 1, "config.a.c": [1], "config.d": "x"}
    assert compare.differences([{"x": 1, "y": 2}, {"x": 1}]) == {"y": [2, None]}
