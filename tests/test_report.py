"""The report: what stands in the page, that it needs nothing but itself, and that odd metrics do not break it."""

import base64
import doctest
import io
import math
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from kdjax.report import drawing as drawing
from kdjax.report import run_report

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


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


def examples(count=2, shape=(40, 60), models=run_report.MODELS, seed=0):
    draws = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        corner = draws.uniform(0, 20, (3, 2))
        boxes, labels = np.concatenate([corner, corner + 15], axis=1), draws.integers(0, 2, 3)
        example = {"image": draws.integers(0, 256, (*shape, 3), np.uint8), "truth": {"boxes": boxes, "labels": labels}}
        found = {"boxes": boxes + 1, "labels": labels, "scores": np.array([0.9, 0.5, 0.1])}
        made.append(example | {model: found if model in models else None for model in run_report.MODELS})
    return made


def write(tmp_path, **changes):
    given = {
        "title": "tiny on cells",
        "results": {"teacher": metrics(0.48), "twin": metrics(0.389), "student": metrics(0.412), "gain": None},
        "rows": rows(20),
        "per_class": {m: {"cell": a, "plate": 0.3} for m, a in zip(run_report.MODELS, (0.5, 0.4, 0.45), strict=True)},
        "examples": examples(),
        "classes": ["cell", "plate"],
        "config_text": '{"seed": 0}',
        "notes": ["Not chosen by result.", "jax: 0.10.2"],
    } | changes
    path = tmp_path / "report.html"
    run_report.write_report(path, **given)
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
    assert "Weight in the total: 2." in page.text
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
    assert {target for target in re.findall(r"url\(#([^)]*)\)", text)} <= set(ids)
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
    assert "The detector, trained without a teacher, reaches AP 41.2." in page.text
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
        (0.48, 0.389, 0.5, "the teacher has 48.0, less than its student."),
        (0.38, 0.389, 0.412, "no lead to pass on"),
        (0.392, 0.389, 0.391, "the teacher has 39.2."),
        (None, 0.389, 0.412, "2.3 points above the same student trained alone (38.9)."),
        (0.48, None, 0.412, "the teacher has 48.0. The same student was not trained alone (no twin)"),
        (None, None, 0.412, "trained without a teacher"),
        (0.48, 0.389, -1, "undefined"),
        (0.48, 0.389, None, "undefined"),
        (-1, 0.389, 0.412, "trained alone (38.9)."),
        (0.48, -1, 0.412, "does not say what distillation added"),
    ],
)
def test_the_verdict_says_no_more_than_the_metrics(teacher, twin, student, words):
    values = {"teacher": teacher, "twin": twin, "student": student}
    text = run_report.verdict({name: None if ap is None else {"AP": ap} for name, ap in values.items()})
    assert words in text
    share = re.search(r"closed (\d+) %", text)
    assert bool(share) == ("closed" in words) and (not share or share[1] == "25")


def test_all_text_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&amp;<b>'
    page, text = write(
        tmp_path,
        title=evil,
        rows=[{"step": 1, "kind": "train", f"student/mkd/{evil}": 1.0, evil: 2.0}],
        per_class={"student": {evil: 0.3, "細胞": 0.2, "\ud800": 0.1}},
        classes=[evil, "細胞"],
        examples=[example | {"name": evil} for example in examples()],
        config_text=evil,
        notes=[evil, f"a: {evil}"],
    )
    assert not page.all("script") and "<script" not in text
    assert page.text.count(evil) >= 8 and "細胞" in page.text


def test_losses_that_are_not_finite_are_told(tmp_path):
    lines = rows(30)
    for line, value in zip(
        [line for line in lines if line["kind"] == "train"], (math.nan, math.inf, None), strict=False
    ):
        line["student/loss_cls"] = value
    for line in lines:
        line["student/mkd/feature"] = math.nan
    page, _ = write(tmp_path, rows=lines)
    assert "Not finite at 3 steps, first at 10 (crosses)." in page.text
    assert "Not finite at 30 steps" in page.text
    assert not re.search(r"[\s,\"]nan[\s,\"]", " ".join(attrs.get("d", "") for attrs in page.all("path")))


def test_the_last_line_of_a_step_counts():
    lines = [{"step": s, "kind": "train", "lr": v} for s, v in ((10, 1.0), (20, 9.0), (30, 9.0), (20, 2.0), (30, 3.0))]
    lines += [{"step": 20, "kind": "eval", "student/AP": 0.1}, {"step": 20, "kind": "eval", "twin/AP": 0.2}]
    steps, values = run_report._read(lines, "train")["lr"]
    assert steps.tolist() == [10, 20, 30] and values.tolist() == [1, 2, 3]
    assert set(run_report._read(lines, "eval")) == {"student/AP", "twin/AP"}


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_any_number_of_rows(tmp_path, count):
    lines = rows(count)
    start = time.process_time()
    page, text = write(tmp_path, rows=lines, examples=[])
    assert time.process_time() - start < 5
    assert len(text) < 600_000
    assert ("mkd/feature" in page.text) == (count > 0)


def test_a_scale_is_logarithmic_where_values_span_decades():
    steps = np.arange(5.0)
    wide = run_report.line_chart({"student": (steps, 10.0**-steps)}, title="x")
    narrow = run_report.line_chart({"student": (steps, 1 + steps)}, title="x")
    assert "log scale" in wide and "log scale" not in narrow
    assert "log scale" not in run_report.line_chart({"student": (steps, 10.0**-steps - 1e-4)}, title="x")
    assert "log scale" not in run_report.line_chart({"run": (steps, 10.0**-steps)}, title="x", log=False)
    assert run_report.line_chart({"student": (steps[:0], steps[:0])}, title="x") == ""


def test_thinned_curves_keep_their_extremes():
    steps = np.arange(10_000.0)
    values = np.ones(10_000)
    values[[1234, 7777]] = 50, -50
    at, mean, low, high = run_report._thin(steps, values)
    assert len(at) == run_report.MAX_POINTS and high.max() == 50 and low.min() == -50
    assert np.isclose(np.average(mean), 1, atol=0.01) and (np.diff(at) > 0).all()


def test_many_classes_are_a_table_of_numbers(tmp_path):
    names = [f"class number {i}" for i in range(40)]
    page, text = write(tmp_path, per_class={m: {n: i / 100 for i, n in enumerate(names)} for m in run_report.MODELS})
    assert all(name in page.text for name in names) and "long" in text
    assert len(text.split("By size")[0].split("By class")[1].split('class="bar"')) == 1
    gains = {"a": (0.1, 0.3), "b": (0.1, 0.4), "c": (-1, 0.9), "d": (0.3, 0.1)}
    rows = {name: {"twin": twin, "student": student} for name, (twin, student) in gains.items()}
    page = Page(run_report._class_and_size({}, {m: {n: rows[n][m] for n in rows} for m in ("twin", "student")}))
    assert [row[0] for row in page.rows[1:]] == ["b", "a", "d", "c"]


def test_eight_noisy_images_stay_under_three_megabytes(tmp_path):
    _, text = write(tmp_path, examples=examples(8, shape=(360, 480)))
    assert len(text) < 3_000_000


# -------------------------------------------------------------------------------------------------------- images

GREY = np.full((40, 80, 3), 128, np.uint8)
BOX = np.array([[8.0, 8, 30, 30]])


def test_small_images_grow_and_large_ones_shrink():
    for shape, drawn in {
        (40, 80): (160, 320),
        (300, 400): (300, 400),
        (720, 960): (360, 480),
        (4000, 100): (960, 24),
        (1, 1): (320, 320),
    }.items():
        assert drawing.draw(np.zeros((*shape, 3), np.uint8), [], [], [], []).shape[:2] == drawn
    assert drawing.draw(GREY, BOX, [0], [0.9], ["a"], width=None).shape == GREY.shape


def test_draw_leaves_its_input_alone_and_is_deterministic():
    image = GREY.copy()
    first = drawing.draw(image, BOX, [0], [0.9], ["a"])
    assert (image == GREY).all() and (first == drawing.draw(image, BOX, [0], [0.9], ["a"])).all()
    assert first.dtype == np.uint8 and (first[32, 32:36] == drawing.class_color(0)).all(axis=-1).any()


def test_what_is_under_the_threshold_or_not_finite_is_not_drawn():
    plain = drawing.draw(GREY, [], [], [], ["a"])
    assert (drawing.draw(GREY, BOX, [0], [0.29], ["a"]) == plain).all()
    assert (drawing.draw(GREY, BOX, [0], [np.nan], ["a"]) == plain).all()
    assert (drawing.draw(GREY, BOX * np.nan, [0], [0.9], ["a"]) == plain).all()
    assert (drawing.draw(GREY, BOX, [0], None, ["a"]) != plain).any()


@pytest.mark.parametrize("box", [[-50, -50, 500, 500], [100, 100, 120, 130], [20, 20, 20, 20], [30, 30, 10, 10]])
@pytest.mark.parametrize("outcome", [drawing.HIT, drawing.FALSE, drawing.MISSED, None])
def test_odd_boxes_can_be_drawn(box, outcome):
    outcomes = None if outcome is None else [outcome]
    assert drawing.draw(GREY, [box], [7], [1.0], ["a"], outcome=outcomes).shape == (160, 320, 3)


def test_names_that_the_font_lacks_are_told_by_number():
    names = ["café", "Клетка", "細胞", "a\nb", "", "x" * 50]
    told = [drawing.class_name(i, names) for i in range(-1, 7)]
    assert told == ["class -1", "café", "Клетка", "class 2", "class 3", "class 4", "x" * 21 + "…", "class 6"]
    drawing.draw(GREY, np.repeat(BOX, 6, 0), range(6), np.ones(6), names)
    assert "細胞 (class 2)" in run_report.image_rows(
        [{"image": GREY, "truth": {"boxes": BOX, "labels": [2]}}], ["a", "b", "細胞"]
    )


def test_neighbouring_classes_have_colours_far_apart():
    colors = np.array([drawing.class_color(k) for k in range(80)], float)
    assert len(np.unique(colors, axis=0)) == 80
    assert (np.abs(np.diff(colors, axis=0)).sum(axis=1) > 100).all()


def test_wrong_images_are_refused_in_one_sentence():
    for image in (GREY[..., 0], GREY.astype(np.float32), GREY[:0]):
        with pytest.raises(ValueError, match=r"uint8\[h, w, 3\]"):
            drawing.draw(image, [], [], [], [])
    with pytest.raises(ValueError, match="1 boxes, 2 labels"):
        drawing.draw(GREY, BOX, [0, 1], [1.0], ["a"])


def test_match_is_greedy_by_score_and_within_a_class():
    truth = np.array([[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10.0]])
    boxes = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 4], [5, 5, 5, 5.0]])
    scores = np.array([0.9, 0.8, 0.7, 0.9, 0.9])
    hit, found = drawing.match(truth, np.array([0, 1, 0]), boxes, np.array([0, 0, 0, 0, 0]), scores)
    assert hit.tolist() == [True, False, False, False, False] and found.tolist() == [True, False, False]
    for n, m in ((0, 2), (2, 0), (0, 0)):
        hit, found = drawing.match(truth[:n], np.zeros(n), boxes[:m], np.zeros(m), scores[:m])
        assert (len(hit), len(found), hit.any(), found.any()) == (m, n, False, False)


def test_match_agrees_with_a_slow_loop():
    draws = np.random.default_rng(3)
    for _ in range(20):
        n, m = draws.integers(1, 8, 2)
        truth, boxes = (np.sort(draws.uniform(0, 9, (k, 2, 2)), axis=1).reshape(k, 4) for k in (n, m))
        labels, own, scores = draws.integers(0, 2, n), draws.integers(0, 2, m), draws.random(m)
        found = set()
        for i in sorted(range(m), key=lambda i: -scores[i]):
            best, choice = 0.3, None
            for j in set(range(n)) - found:
                low, high = np.maximum(boxes[i, :2], truth[j, :2]), np.minimum(boxes[i, 2:], truth[j, 2:])
                shared = np.prod(np.maximum(high - low, 0))
                union = sum(np.prod(b[2:] - b[:2]) for b in (boxes[i], truth[j])) - shared
                if own[i] == labels[j] and shared / union >= best:
                    best, choice = shared / union, j
            found |= {choice} - {None}
        assert set(np.flatnonzero(drawing.match(truth, labels, boxes, own, scores, iou_threshold=0.3)[1])) == found


def test_panels_count_what_they_show():
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    example = examples(1)[0] | {"twin": empty, "teacher": None}
    truth, twin, student = drawing.panels(example, ["a", "b"])
    assert [panel.name for panel in (truth, twin, student)] == ["truth", "twin", "student"]
    assert (twin.found, twin.false, twin.missed) == (0, 0, 3)
    assert (student.found, student.false, student.missed) == (2, 0, 1)  # the third has the score 0.1
    assert drawing.summary(truth) == "3 objects" and truth.image.shape == twin.image.shape
    nothing = drawing.panels({"image": GREY, "truth": {"boxes": [], "labels": []}, "student": empty}, ["a"])
    assert [drawing.summary(panel) for panel in nothing] == ["no object", "0 found, 0 false, 0 missed"]


def test_compare_puts_panels_side_by_side():
    drawn = drawing.compare(examples(1)[0], ["a", "b"])
    assert drawn.shape[1] == 4 * 320 + 3 * 8 and drawn.dtype == np.uint8
    assert drawing.compare(examples(1, models=("student",))[0], ["a", "b"]).shape[1] == 2 * 320 + 8


def test_contact_sheet():
    images = [GREY, np.zeros((30, 30, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)]
    boxes, labels = [BOX, np.zeros((0, 4)), BOX / 4], [[0], [], [1]]
    sheet = drawing.contact_sheet(images, boxes, labels, ["a", "b"], 2, width=100)
    assert sheet.shape == (2 * 200 + 8, 2 * 100 + 8, 3) and sheet.dtype == np.uint8
    assert (sheet[:10] == 255).all() and (sheet[60:, 50] != 255).any()
    assert drawing.contact_sheet(images[:1], boxes[:1], labels[:1], ["a"], 4, width=100).shape == (50, 100, 3)
    for bad in (([], [], [], [], 2), (images, boxes, labels, ["a"], 0), (images, boxes[:1], labels, ["a"], 2)):
        with pytest.raises(ValueError, match="contact_sheet"):
            drawing.contact_sheet(*bad)


@pytest.mark.parametrize("module", [drawing, run_report])
def test_docstring_examples(module):
    assert not doctest.testmod(module).failed
