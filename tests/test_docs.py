"""docs/methods.md, zoo.md and inputs.md say what code and tests do; the guide to a method works as it is printed."""

import dataclasses
import fnmatch
import inspect
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors, methods, plugins
from kdjax.commands import settings
from kdjax.distill import Distiller, taps
from kdjax.structs import Assignment, PaddedDetections
from tests import golden_replay
from tests.methods import test_contract
from tests.shared import ROOT, SHARED, script

generate = script(ROOT / "docs" / "generate.py")
GUIDE = (ROOT / "docs" / "add_a_method.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "rest"])
def test_the_pages_are_up_to_date(rest, capsys, monkeypatch):
    """By default a sample is computed, and the rest is taken as read.

    Of the variants it is the smallest of each third family, of the pairs of families each tenth.
    """
    if not rest:
        lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "zoo.md").read_text().splitlines()]
        read = {cells[0]: tuple(cells) for cells in lines if len(cells) == 3}
        [header] = [cells for cells in lines if cells[0] == "student / teacher"]
        runs = {(cells[0], teacher): text for cells in lines for teacher, text in zip(header, cells, strict=False)}
        chosen, compute = {*list(itertools.product(generate.families(), repeat=2))[::10]}, generate.cell
        monkeypatch.setattr(generate, "cell", lambda *pair: compute(*pair) if pair in chosen else runs.get(pair, ""))
        small = {generate.pair_of(family)[0] for family in list(generate.families())[::3]}
        count = generate.row_of
        monkeypatch.setattr(
            generate, "row_of", lambda name: count(name) if name in small else read.get(f"`{name}`", ())
        )
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ('"Sounds", "a wav", "refused"', "unknown area 'Sounds': the areas are COCO json, "),
        ('"Weights", "a zip", "unpacked"', "'unpacked' begins with 'unpacked', not with read, refused, "),
    ],
)
def test_a_mark_of_an_unknown_area_or_outcome_is_refused(tmp_path, monkeypatch, mark, words):
    monkeypatch.setattr(generate, "TESTS", tmp_path)
    path = tmp_path / "test_x.py"
    source = "@pytest.mark.slow\n@pytest.mark.user_input({})\n@fuzz(2)\ndef test_x():\n    import no_such_module\n"
    path.write_text(source.format('"Weights", "a|b*", "read: as `c*`"'))
    [one] = generate.read_marks(path)
    assert one == ("Weights", "a|b*", "read: as `c*`", "test_x.py")
    assert r"| a\|b\* | read: as `c*` | [test_x.py](../tests/test_x.py) |" in generate.inputs([one])
    path.write_text(source.format(mark))
    with pytest.raises(ValueError, match=r"^tests/test_x.py: ") as caught:
        generate.read_marks(path)
    assert words in str(caught.value)


def test_every_area_has_inputs():
    marked = [one for path in generate.TESTS.rglob("test_*.py") for one in generate.read_marks(path)]
    assert {one.area for one in marked} == set(generate.AREAS)
    assert len({one[:2] for one in marked}) == len(marked) > 200


@pytest.mark.parametrize("name", methods.names())
def test_a_proof_names_reference_files_that_are_replayed(name):
    told = generate.describe(name).sections
    named = generate.GOLDEN.findall(told["Proof"])
    assert named or (told["Proof"].startswith("none") and told["Status"] != "proven"), told["Proof"]
    patterns = [pattern for pattern, _ in golden_replay.known_checks()]
    roots = [root for root in (SHARED and SHARED / "golden", ROOT / "tests" / "golden") if root]
    files = [file for root in roots for file in golden_replay.files_of(root)]
    for one in named:
        whole = one if "." in one else f"{one}.npz"
        assert any(fnmatch.fnmatchcase(whole, p) or fnmatch.fnmatchcase(p, whole) for p in patterns), one
        # Some files are in the shared folder alone.
        assert fnmatch.filter(files, whole) or not SHARED, f"{name}: there is no file {one}"


# A family with the taps, strides and rows of another: only the pair of itself is traced by default.
ALIKE = ("rtmdet_ins", "mask_rcnn", "cascade_rcnn", "rtdetrv2", "dfine")


@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "rest"])
@pytest.mark.parametrize(("number", "name"), list(enumerate(methods.names())), ids=methods.names())
def test_a_method_computes_on_every_pair_that_does_not_refuse_it(number, name, rest):
    """The whole matrix of docs/zoo.md, traced: every family as student under every family as teacher.

    By default one in eight pairs of two families; which, differs from method to method.
    """
    for place, (student, teacher) in enumerate(itertools.product(generate.families(), repeat=2), number):
        if rest != (student != teacher and (bool({student, teacher} & {*ALIKE}) or place % 8 != 0)):
            continue
        if methods.build(name).reads.teacher == ("detections",) and teacher != student:
            continue  # detections look alike, whoever found them
        if refusal := generate.refusal(name, student, teacher):
            assert re.search(r"student|teacher", refusal), refusal
        else:
            terms = shapes_of_terms(name, generate.pair_of(student)[0], generate.pair_of(teacher)[1])
            assert set(terms) == set(methods.build(name).weights), (student, teacher)
            assert all(term.shape == () and term.dtype == jnp.float32 for term in terms.values()), (student, teacher)


def shapes_of_terms(name: str, student: str, teacher: str) -> dict:
    """The terms of a method on two detectors as the trainer's step has them, as shapes: nothing is computed."""
    side = generate.SIZE
    distiller = Distiller(generate.built(student), generate.built(teacher), [methods.build(name)])

    def arrays(*shape, of):
        return [jax.ShapeDtypeStruct((*shape, *rest), dtype) for dtype, *rest in of]

    boxes = [(jnp.float32, 4), (jnp.int32,), (jnp.bool_,)]
    batch = dict(zip(("boxes", "labels", "valid"), arrays(1, 5, of=boxes), strict=True))
    batch["image_size"], batch["image"] = arrays(1, of=[(jnp.int32, 2), (jnp.uint8, side, side, 3)])
    rows = [(jnp.int32,), (jnp.bool_,), (jnp.bool_,), (jnp.int32,), (jnp.float32, 4), (jnp.float32,)]
    two_stages = generate.specs(student).at is not None
    queries = generate.specs(student).layers
    rows_of_one = queries[-1].logits.shape[1] if queries else len(distiller.student.priors((side, side)))
    count = 8 if two_stages else rows_of_one
    assignment = Assignment(*arrays(1, count, of=rows))
    if two_stages:
        assignment = assignment._replace(regions=assignment.boxes)

    def terms(key, output, observed, variables, assignment, batch):
        adapters = distiller.init(key, (side, side))
        return distiller.terms(
            adapters, output, batch, variables, observed=observed, assignment=assignment, key=key, step=0
        )

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    whole = generate.specs(teacher)
    observed = taps.only(whole, distiller.teacher_reads)
    if queries or whole.layers:  # as `Distiller.observe` has it: queries are paired by all that they say
        observed = dataclasses.replace(observed, rows=whole.rows)
    if "detections" in distiller.teacher_reads:
        found = arrays(1, 100, of=[(jnp.float32, 4), (jnp.float32,), (jnp.int32,), (jnp.bool_,)])
        observed = dataclasses.replace(observed, detections=PaddedDetections(*found))
    variables = distiller.teacher.shapes
    found = jax.eval_shape(terms, key, generate.specs(student), observed, variables, assignment, batch)
    return {term.partition("/")[2]: value for term, value in found.items()}


SOUND = """Name: what it is.

    L = 1

Paper: someone, "A title", 2020.
Taps: neck.
  And more.
Open: none.
Proof: kd/some_* (their code): largest relative error 1e-6.
Status: proven
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Name: what", "what", "begins with 'NAME: what it is.'"),
        ("    L = 1", "L = 1", "formula, every line indented by 4"),
        ("    L = 1\n", "", "formula, every line indented by 4"),
        ("Open: none.\n", "", "no section 'Open:'"),
        ("Open: none.", "Open:", "section 'Open:' is empty"),
        ("Open: none.\n", "Open: none.\nOpen: none.\n", "Paper, Taps, Open, Open, Proof, Status"),
        ("Status: proven", "Status: good", "'good'; it must be one of proven, formula, experimental"),
    ],
)
def test_a_docstring_without_the_layout_is_named_in_one_sentence(old, new, words):
    title, what, formula, sections = generate.read_module("x.py", SOUND)
    assert (title, what, formula) == ("Name", "what it is", "    L = 1")
    assert sections["Taps"] == "neck. And more." and generate.short(sections["Paper"]) == "someone, 2020"
    with pytest.raises(ValueError, match=r"^x.py: ") as caught:
        generate.read_module("x.py", SOUND.replace(old, new))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_of_options_comes_from_make():
    def make(*, weight=2.0, student="neck", teacher="neck", mode="a|b"):
        """One line.

        Args:
          weight: of all,
            in two lines.
          student, teacher: taps.
          mode: "a|b", or *c*.

        Raises:
          ValueError: never.
        """

    rows = generate.read_options("x.py", make)
    assert rows == [
        ("`weight`", "`2.0`", "of all, in two lines."),
        ("`student`, `teacher`", '`"neck"`', "taps."),
        ("`mode`", '`"a|b"`', '"a|b", or *c*.'),
    ]
    assert generate.prose("*c* `*d*` kd/x_*") == r"\*c\* `*d*` kd/x_\*"
    assert generate.table(("a",), [("a|b",)]) == "| a |\n| --- |\n| a\\|b |\n"
    for old, new in (("mode:", "node:"), ("weight:", "height:"), ("  mode", "    mode")):
        make.__doc__, before = make.__doc__.replace(old, new), make.__doc__
        with pytest.raises(ValueError, match=r"^x.py: .* make( does not)? tell"):
            generate.read_options("x.py", make)
        make.__doc__ = before


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The files of the guide in a folder of their own, and its method where kdjax looks for methods."""
    for name, text in BLOCKS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path))
    monkeypatch.setattr(methods, "__path__", list(methods.__path__))
    yield tmp_path
    sys.modules.pop("kdjax.methods.cosine", None)
    vars(methods).pop("cosine", None)


def test_the_guide_works(guide):
    """Its method keeps the contract, its recipe, test and check of reference numbers run, and the page describes it."""
    assert set(BLOCKS) == {
        "methods/cosine.py",
        "tests/test_cosine.py",
        "tests/golden_checks/cosine.py",
    }
    assert "cosine" in methods.names()
    made = test_contract.prepared("cosine")
    run = 0
    for name, check in vars(test_contract).items():
        if name.startswith("test_") and "made" in inspect.signature(check).parameters:
            cases = check.pytestmark[0].args[1] if hasattr(check, "pytestmark") else [None]
            for case in cases:
                if hasattr(case, "marks"):  # a long one
                    continue
                check(made, case) if case else check(made)
                run += 1
    assert run > 8

    config = settings.read("distill/coco_folder:cosine", ["--config.methods.cosine.warmup=500"])
    assert config.methods.cosine.warmup == 500
    own = script(guide / "tests" / "test_cosine.py")
    own.test_cosine_is_one_minus_the_cosine()
    own.test_a_negative_weight_is_refused()
    written = generate.section(generate.describe("cosine"))
    assert f"**Runs on.** {', '.join(detectors.families())}." in written
    assert "| `weight` | `1.0` | of the term, >= 0. |" in written


def test_the_guides_reference_numbers_are_replayed(guide):
    rng = np.random.default_rng(0)
    arrays = {side: rng.normal(size=(2, 3, 4, 5)).astype(np.float32) for side in ("student", "teacher")}
    s, t = (arrays[side].reshape(2, -1).astype(np.float64) for side in ("student", "teacher"))
    sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t)]
    cosine = np.sum(s * t, 1, keepdims=True) / (sizes[0] * sizes[1])
    arrays["value"] = 1 - cosine.mean()
    arrays["grad_student"] = (-(t / (sizes[0] * sizes[1]) - cosine * s / sizes[0] ** 2) / 2).reshape(2, 3, 4, 5)
    meta = '{"cases": {"case00": {"what": "cosine", "params": {"loss_weight": 1.0}}}}'
    path = guide / "golden" / "kd" / "cosine_1.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, meta=meta, **{f"case00/{name}": value for name, value in arrays.items()})
    checks = script(guide / "tests" / "golden_checks" / "cosine.py").CHECKS
    found = list(golden_replay.replay_file(guide / "golden", "kd/cosine_1.npz", checks))
    assert [check.verdict for check in found] == ["passed", "passed"], found
