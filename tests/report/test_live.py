"""The top of the page of a run that goes on, and its table of terms."""

import pytest

from kdjax.report import live
from tests.report.test_run import metrics, rows, table, write
from tests.support.pages import Page
from tests.support.report import examples

PROGRESS = live.Progress(1000, 1600, 420.0, "2026-01-31 23:45:02", "2026-01-31 23:52", "", "Of 100 images.")


def lines():
    values = {"seconds": 2.0, "images_per_s": 41.26, "wait_share": 0.0321, "weight/mkd/feature": 2.0}
    return [{"step": 980 + 10 * i, "kind": "train", "student/mkd/feature": 3.0, **values} for i in (1, 2)]


def test_a_page_of_a_run_that_goes_on(tmp_path):
    given = dict(results={"twin": metrics(0.389), "student": metrics(0.412)}, progress=PROGRESS)
    page, text = write(tmp_path, rows=rows(20) + lines(), examples=examples(2, models=("twin", "student")), **given)
    assert page.text.count("Running: step 1,000 of 1,600, 7 minutes to the last step.") == 1
    assert "distilled student reaches" not in page.text
    assert "Written at 2026-01-31 23:45:02; the page reloads itself every 30 seconds, and is written anew" in page.text
    assert "at about 2026-01-31 23:52: if it is not, the run was killed or hangs. Of 100 images." in page.text
    assert [attrs.get("content") for attrs in page.all("meta") if attrs.get("http-equiv") == "refresh"] == ["30"]
    assert page.all("progress") == [{"value": "1000", "max": "1600", "aria-label": "steps"}]
    assert "62 %" in page.text and "41.3images per second" in page.text and "3.2 %of the time" in page.text
    assert table(page)["AP"] == ["38.9", "41.2", "+2.3"] and table(page)["mkd/feature"] == ["3", "2", "6"]
    assert text.index(">Images</h2>") < text.index(">Losses</h2>")
    _, final = write(tmp_path, rows=rows(20) + lines())
    assert final.index(">Images</h2>") > final.index(">Losses</h2>") and ">Terms</h2>" not in final


def test_a_page_before_the_first_line_of_the_log(tmp_path):
    given = dict(results={}, rows=[], per_class={}, examples=[], progress=live.Progress(0, 50, None, "now"))
    page, _ = write(tmp_path, **given)
    assert "Running: step 0 of 50.0 %" in page.text and not page.all("table")[1:] and not page.all("img")


@pytest.mark.parametrize(
    ("changes", "words", "reloads"),
    [
        (dict(step=1600), "Running: all 1,600 steps are done, and the final evaluation is under way.", True),
        (dict(ended="stopped at step 1000 <of> 1600"), "Not running: stopped at step 1000 <of> 1600.", False),
    ],
)
def test_the_end_of_the_steps(tmp_path, changes, words, reloads):
    page, text = write(tmp_path, progress=PROGRESS._replace(**changes))
    assert words in page.text and ('http-equiv="refresh"' in text) == reloads
    assert ("does not reload itself any more" in page.text) != reloads


def test_shares_of_the_gradient_are_shown_where_they_were_measured(tmp_path):
    measured = [row | {"share/mkd": 0.25, "conflict/mkd": -0.125} for row in lines()]
    page = Page(live.terms(measured))
    assert page.rows[0] == ["term", "value", "weight", "weighted", "share of the gradient", "cosine"]
    assert page.rows[1] == ["mkd/feature", "3", "2", "6", "25.0 %", "-0.12"]
    assert "config.auto_weight.log=True" in live.terms(lines()) and live.terms(rows(3, twin=False)[1:1]) == ""
    page, _ = write(tmp_path, rows=measured)
    assert "Cosine with the gradient of the detection losses: -0.12 at last." in page.text
    assert any(attrs.get("aria-label", "").startswith("Chart of mkd: run from 25 ") for attrs in page.all("svg"))


def test_early_in_a_run_lower_scores_are_drawn():
    made = examples(2)  # with three objects, and scores 0.9, 0.5 and 0.1 in each
    assert live.threshold(made) == 0.1
    few = [one._replace(labels=one.labels[:2], boxes=one.boxes[:2]) for one in made]
    assert live.threshold(few) == 0.3 and live.threshold([]) == 0.3
    none = [one._replace(detections={"student": one.detections["student"][:0]}) for one in made]
    assert live.threshold(none) == 0.05
