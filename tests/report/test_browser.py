"""The pages in a real browser: narrow and wide, light and dark, without errors, and what reloads itself."""

import time

import numpy as np
import pytest
from PIL import Image

from kdjax import cli
from kdjax.commands import evaluate
from kdjax.evals import tide
from kdjax.evals.matching import truth_by_image
from kdjax.report import evaluation, league, live, pages, run, study
from kdjax.structs import Detections
from tests.commands.test_compare import make
from tests.report.test_run import metrics, rows
from tests.support.browser import WIDTHS, browser, look
from tests.support.data import coco_json
from tests.support.report import examples

LONG = "a class with a rather long name, and_one_without_any_blank_that_is_even_longer"
NAMES = ["cell", "plate", LONG]


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


def report(file, **changes):
    lines = rows(40)
    measured = {"share/mkd": 0.3, "conflict/mkd": -0.1}
    given = {
        "title": "rtmdet_pico on cells, mkd",
        "results": {"teacher": metrics(0.48), "twin": metrics(0.389), "student": metrics(0.412)},
        "rows": [row | measured if row["kind"] == "train" else row for row in lines],
        "per_class": {m: dict.fromkeys(NAMES, 0.4) for m in ("teacher", "twin", "student")},
        "examples": examples(2, shape=(120, 160)),
        "class_names": NAMES,
        "config_text": '{"a": "' + 300 * "x" + '"}',
        "notes": ["Not chosen by result.", "devices: 1 x cpu", f"data: {LONG}"],
        "seconds": {"start": 5.0, "step": 90.0},
        "meanings": {"start": "before training", "step": "updates"},
    } | changes
    run.write_report(file, **given)


def running(file, step=1000, ended=""):
    progress = live.Progress(step, 1600, 420.0, "2026-01-31 23:45:02", "2026-01-31 23:52", ended, "Of 100 images.")
    results = {"twin": metrics(0.389, flops=None), "student": metrics(0.412, flops=None)}
    report(file, results=results, progress=progress, examples=examples(2, shape=(120, 160), models=("twin", "student")))


def compared(file):
    folder = file.parent
    names = ("mkd", "cwd_with_a_rather_long_name_of_its_run", "half")
    folders = [make(folder / name, ap=0.3 + 0.05 * i, classes=NAMES) for i, name in enumerate(names[:2])]
    folders.append(make(folder / "half", upto=60, method="cwd"))
    assert cli.main(["compare", *map(str, folders), f"--out={folder / 'out'}"]) == 0
    (folder / "out" / "compare.html").rename(file)


def merged(file):
    one = {"student": {"AP": 0.42, "AP50": 0.6, "params": 10, "flops": 2e6}, "twin": {"AP": 0.4, "AP50": 0.55}}
    made = [study.summarize(name, dict.fromkeys(range(3), one), {3: "a loss is not finite"}) for name in NAMES]
    made = [row | {"methods": {}, "tuned": ""} for row in made]
    data = {"name": "cells", "fingerprint": "0123456789"}
    columns = [
        {"title": title, "data": data, "student": "a", "teacher": None, "settings": {"steps": 100}, "rows": made}
        for title in ("cells: rtmdet_pico from rtmdet_micro", "plates: rtmdet_pico from rtmdet_micro (data=0123)")
    ]
    file.write_text(league.page(columns, ["kdjax 0.1.0, jax 0.10.2"]), encoding="utf-8")


def evaluated(file):
    boxes = [[5.0 + 10 * i, 5.0, 20.0, 20.0] for i in range(3)]
    objects = [(0, 1 + i, box, {"area": 400.0, "iscrowd": 0}) for i, box in enumerate(boxes)]
    truth = coco_json({"a.png": (60, 80)}, objects, [(1 + i, name) for i, name in enumerate(NAMES)])
    corners = np.array(boxes) + [[0, 0, b[0], b[1]] for b in boxes]
    found = {10: Detections(corners, np.array([0.9, 0.8, 0.3]), np.array([0, 1, 1]), tuple(NAMES), (1, 2, 3))}
    objects = truth_by_image(truth)
    results, kept = {}, {}
    for name in ("model", "other"):
        results[name] = evaluate.analyse(truth, found) | {"path": f"runs/{name}", "params": 10, "flops": 20}
        chosen = tide.above_threshold(objects, found, evaluate.thresholds(results[name]))
        kept[name] = tide.without_crowd(objects, chosen)
    image = np.full((60, 80, 3), 90, np.uint8)
    page = evaluation.page(results, data="cells", truth=truth, stream=lambda ids: iter([(10, image)]), kept=kept)
    file.write_text(page, encoding="utf-8")


@pytest.mark.parametrize("made", [report, running, compared, merged, evaluated])
def test_a_page_is_whole_at_any_width_and_in_both_themes(opened, made, tmp_path):
    file = tmp_path / "page.html"
    made(file)
    for width in WIDTHS:
        for theme, seen in look(opened, file, width, tmp_path).items():
            assert seen.errors == [], (width, theme)
            assert seen.overflow == 0 and seen.wide == [], (width, theme)
            assert seen.contrast >= 4.5, (width, theme)
            with Image.open(tmp_path / f"page_{width}_{theme}.png") as image:
                pixels = np.asarray(image.convert("L"))
            assert pixels.shape == (900, width) and pixels.std() > 5
            assert np.median(pixels) > 240 if theme == "light" else np.median(pixels) < 40
            assert sum(seen.paper) > 700 if theme == "light" else sum(seen.paper) < 100


def test_a_wide_table_scrolls_in_its_own_box(opened, tmp_path):
    compared(tmp_path / "page.html")
    page = opened.new_page(viewport={"width": 400, "height": 900})
    page.goto((tmp_path / "page.html").as_uri())
    boxes = page.eval_on_selector_all(".scroll", "all => all.map(one => [one.scrollWidth, one.clientWidth])")
    assert any(inner > outer for inner, outer in boxes) and all(outer <= 400 for _, outer in boxes)
    page.eval_on_selector(".scroll", "one => { one.scrollLeft = 1000; }")
    first = page.eval_on_selector(".scroll tbody th", "one => one.getBoundingClientRect().left")
    assert 0 <= first < 40, "the first column stays"
    page.close()


def test_a_page_of_a_run_reads_itself_again(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "RELOAD", 1)
    running(tmp_path / "page.html")
    page = opened.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert "Running: step 1,000 of 1,600, 7 minutes to the last step." in page.inner_text(".verdict")
    report(tmp_path / "page.html")
    page.locator(".verdict", has_text="The distilled student reaches").wait_for(timeout=10_000)
    loaded = page.evaluate("performance.timeOrigin")
    time.sleep(1.5)
    assert page.evaluate("performance.timeOrigin") == loaded, "the final page stays"
    page.close()


def test_pages_without_a_reload_have_none():
    assert "refresh" not in pages.page("a", "", [])
