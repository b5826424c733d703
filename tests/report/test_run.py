"""The report of a run: its content, that it is self-contained, and odd metrics."""

import base64
import io
import math
import re
import time

import numpy as np
import pytest
from PIL import Image

from kdjax.report import run, series
from kdjax.report.format import MODELS
from tests.support.pages import Page
from tests.support.report import examples

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def metrics(ap, **changes):
    return {key: ap * (1 + 0.01 * i) for i, key in enumerate(KEYS)} | {"params": 4_873_000, "flops": 8.09e9} | changes


def rows(count, *, twin=True):
    noise = np.random.default_rng(0).random((count, 8))
    lines = []
    for i in range(count):
        line = {"step": 10 * (i + 1), "kind": "train", "time": 1e9 + i, "lr": 0.004, "images_per_s": 60.0}
        line |= {"student/loss_cls": 1 + noise[i, 0], "student/loss_box": 1 + noise[i, 1], "student/total": 5.0}
        line |= {"student/mkd/feature": 10.0 ** (3 - 5 * i / count), "weight/mkd/feature": 2.0}
        line |= {"twin/loss_cls": 1 + noise[i, 2], "twin/loss_box": 1 + noise[i, 3]} if twin else {}
        lines.append(line)
        if i % max(1, count // 5) == 0:
            # As the trainer writes them: a line a model, several of one step.
            lines += [
                {"step": 10 * (i + 1), "kind": "eval"} | {f"{model}/{key}": 0.01 * i / count for key in KEYS}
                for model in (("twin", "student") if twin else ("student",))
            ]
    return lines


def write(tmp_path, **changes):
    given = {
        "title": "tiny on cells",
        "results": {"teacher": metrics(0.48), "twin": metrics(0.389), "student": metrics(0.412), "gain": None},
        "rows": rows(20),
        "per_class": {m: {"cell": a, "plate": 0.3} for m, a in zip(MODELS, (0.5, 0.4, 0.45), strict=True)},
        "examples": examples(),
        "class_names": ["cell", "plate"],
        "config_text": '{"seed": 0}',
        "notes": ["Not chosen by result.", "jax: 0.10.2"],
    } | changes
    path = tmp_path / "report.html"
    run.write_report(path, **given)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def table(page):
    return {row[0].split()[0]: row[1:] for row in page.rows if row and row[0]}


def test_the_page_holds_everything(tmp_path):
    page, text = write(tmp_path)
    assert "reaches AP 41.2, 2.3 points above the same student trained alone (38.9)" in page.text
    assert set(KEYS) | {"Parameters", "FLOPs"} <= set(table(page))
    assert table(page)["AP"] == ["48.0", "38.9", "41.2", "+2.3"]
    assert table(page)["Parameters"][:3] == ["4.87M"] * 3 and table(page)["FLOPs"][0] == "8.09G"
    for name in (
        "loss_cls",
        "loss_box",
        "mkd/feature",
        "learning rate",
        "AP50",
        "cell",
        "small",
        "0.10.2",
        '"seed": 0',
    ):
        assert name in page.text
    assert "Weight: 2." in page.text
    charts = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(charts) >= 8 and all(len(attrs["aria-label"]) > 20 for attrs in charts)
    assert page.all("html")[0]["lang"] == "en" and any(a.get("name") == "viewport" for a in page.all("meta"))
    assert "prefers-color-scheme:dark" in text and page.all("details") and not page.all("script")


def test_the_page_needs_nothing_but_itself(tmp_path):
    page, text = write(tmp_path)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith("data:image/jpeg") or value[1:] in ids
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    images = page.all("img")
    assert len(images) == 8 and all(attrs["alt"] and attrs["width"] for attrs in images)
    assert images[0]["alt"].startswith("ground truth: 3 objects (")
    image = Image.open(io.BytesIO(base64.b64decode(images[1]["src"].split(",")[1])))
    assert image.size == (320, round(320 * 40 / 60))


def test_the_same_run_gives_the_same_page(tmp_path):
    assert write(tmp_path)[1] == write(tmp_path)[1]


def test_a_supervised_run_has_no_columns_for_others(tmp_path):
    page, _ = write(
        tmp_path,
        results={"teacher": None, "twin": None, "student": metrics(0.412), "gain": None},
        rows=rows(20, twin=False),
        per_class={"student": {"cell": 0.4}},
        examples=examples(models=("student",)),
    )
    assert "The detector reaches AP 41.2; there is no other AP to compare it with." in page.text
    assert table(page)["AP"] == ["41.2"]
    assert len(page.all("img")) == 4
    for word in ("twin", "gain"):
        assert word not in page.text


@pytest.mark.parametrize("missing", ["teacher", "twin"])
def test_a_run_without_teacher_metrics_or_without_twin(tmp_path, missing):
    results = {"teacher": metrics(0.48), "twin": metrics(0.389), "student": metrics(0.412)} | {missing: None}
    page, _ = write(tmp_path, results=results, per_class={"student": {"cell": 0.1}}, examples=[])
    assert len(table(page)["AP"]) == 2 + (missing == "teacher")
    assert ("gain" in [row[-1] for row in page.rows]) == (missing == "teacher")
    assert not page.all("img")


def test_undefined_metrics_are_dashes(tmp_path):
    undefined = {"APl": -1, "ARl": -1.0, "AP75": math.nan, "AR1": None}
    page, _ = write(
        tmp_path,
        results={"teacher": metrics(0.5), "twin": metrics(0.3, **undefined), "student": metrics(0.4, **undefined)},
        per_class={"teacher": {"cell": 0.5}, "twin": {"cell": -1}, "student": {"cell": -1}},
    )
    for key in undefined:
        assert table(page)[key][1:] == ["–", "–", "–"] and table(page)[key][0] != "–"
    assert not re.search(r"-100|-1\.0|\bnan\b", page.text)
    page, _ = write(
        tmp_path, results={"student": dict.fromkeys(KEYS, -1)}, per_class={}, rows=[], examples=[], notes=[]
    )
    assert "undefined" in page.text


@pytest.mark.parametrize(
    ("teacher", "twin", "student", "words"),
    [
        (
            0.48,
            0.389,
            0.412,
            "above the same student trained alone (38.9); the teacher has 48.0, so distillation closed",
        ),
        (
            0.48,
            0.412,
            0.389,
            "2.3 points below the same student trained alone (41.2): in this run distillation did not",
        ),
        (0.48, 0.389, 0.38901, "level with the same student trained alone"),
        (0.48, 0.389, 0.5, "the teacher has 48.0, less than the student."),
        (0.38, 0.389, 0.412, "there was no gap to close"),
        (0.392, 0.389, 0.391, "the teacher has 39.2."),
        (None, 0.389, 0.412, "2.3 points above the same student trained alone (38.9)."),
        (0.48, None, 0.412, "the teacher has 48.0. The same student was not trained alone (no twin)"),
        (None, None, 0.412, "no other AP to compare"),
        (0.48, 0.389, -1, "undefined"),
        (0.48, 0.389, None, "undefined"),
        (-1, 0.389, 0.412, "trained alone (38.9)."),
        (0.48, -1, 0.412, "does not show what distillation added"),
    ],
)
def test_the_verdict_follows_the_metrics(teacher, twin, student, words):
    values = {"teacher": teacher, "twin": twin, "student": student}
    text = run.verdict({name: None if ap is None else {"AP": ap} for name, ap in values.items()})
    assert words in text
    share = re.search(r"closed (\d+) %", text)
    assert bool(share) == ("closed" in words) and (not share or share[1] == "25")


@pytest.mark.user_input("COCO json", "HTML in names of classes, in the report", "read as plain text")
def test_all_text_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&amp;<b>'
    page, text = write(
        tmp_path,
        title=evil,
        rows=[{"step": 1, "kind": "train", f"student/mkd/{evil}": 1.0, evil: 2.0}],
        per_class={"student": {evil: 0.3, "細胞": 0.2, "\ud800": 0.1}},
        class_names=[evil, "細胞"],
        examples=[example._replace(name=evil) for example in examples()],
        config_text=evil,
        notes=[evil, f"a: {evil}"],
    )
    assert not page.all("script") and "<script" not in text
    assert page.text.count(evil) >= 8 and "細胞" in page.text


def test_non_finite_losses_are_marked(tmp_path):
    lines = rows(30)
    for line, value in zip(
        [line for line in lines if line["kind"] == "train"], (math.nan, math.inf, None), strict=False
    ):
        line["student/loss_cls"] = value
    for line in lines:
        line["student/mkd/feature"] = math.nan
    page, _ = write(tmp_path, rows=lines)
    assert "Non-finite at 3 steps, first at step 10 (crosses)." in page.text
    assert "Non-finite at 30 steps" in page.text
    assert not re.search(r"[\s,\"]nan[\s,\"]", " ".join(attrs.get("d", "") for attrs in page.all("path")))


def test_the_last_line_of_a_step_counts():
    lines = [{"step": s, "kind": "train", "lr": v} for s, v in ((10, 1.0), (20, 9.0), (30, 9.0), (20, 2.0), (30, 3.0))]
    lines += [{"step": 20, "kind": "eval", "student/AP": 0.1}, {"step": 20, "kind": "eval", "twin/AP": 0.2}]
    steps, values = series.read(lines, "train")["lr"]
    assert steps.tolist() == [10, 20, 30] and values.tolist() == [1, 2, 3]
    assert set(series.read(lines, "eval")) == {"student/AP", "twin/AP"}


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_any_number_of_rows(tmp_path, count):
    lines = rows(count)
    start = time.process_time()
    page, text = write(tmp_path, rows=lines, examples=[])
    assert time.process_time() - start < 5
    assert len(text) < 600_000
    assert ("mkd/feature" in page.text) == (count > 0)


def test_many_classes_are_a_table_of_numbers(tmp_path):
    names = [f"class number {i}" for i in range(40)]
    page, text = write(tmp_path, per_class={m: {n: i / 100 for i, n in enumerate(names)} for m in MODELS})
    assert all(name in page.text for name in names) and "long" in text
    assert len(text.split("By object size")[0].split("By class")[1].split('class="bar"')) == 1
    gains = {"a": (0.1, 0.3), "b": (0.1, 0.4), "c": (-1, 0.9), "d": (0.3, 0.1)}
    rows = {name: {"twin": twin, "student": student} for name, (twin, student) in gains.items()}
    page = Page(run._class_and_size({}, {m: {n: rows[n][m] for n in rows} for m in ("twin", "student")}))
    assert [row[0] for row in page.rows[1:]] == ["b", "a", "d", "c"]


def test_eight_noisy_images_stay_under_three_megabytes(tmp_path):
    _, text = write(tmp_path, examples=examples(8, shape=(360, 480)))
    assert len(text) < 3_000_000
