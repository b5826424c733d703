"""Names of taps, what they select, and which levels of two outputs meet."""

import jax
import numpy as np
import pytest

from kdjax.distill import Pair, init_adapters, pair, tap, taps
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Rows


def output(strides=(8, 16, 32), *, channels: int = 4, rows: bool = False) -> DetectorOutput:
    """Maps of an image of 64 x 64 pixels; every one has another value."""
    count = iter(range(100))

    def maps(width):
        return tuple(np.full((2, 64 // s, 64 // s, width), next(count), np.float32) for s in strides)

    sizes = tuple((64 // s) ** 2 for s in strides)
    filled = Rows(
        logits=np.arange(2 * sum(sizes) * 3, dtype=np.float32).reshape(2, -1, 3),
        boxes=np.zeros((2, sum(sizes), 4), np.float32),
        location=np.arange(sum(sizes) * 4, dtype=np.float32).reshape(-1, 4),
        level_sizes=sizes,
    )
    return DetectorOutput(
        strides=strides,
        backbone_strides=(4, 8, 16),
        backbone=tuple(np.zeros((2, 64 // s, 64 // s, channels), np.float32) for s in (4, 8, 16)),
        neck=maps(channels),
        cls_tower=(maps(channels), maps(channels)),
        cls_logits=maps(3),
        rows=filled if rows else None,
    )


def test_every_name_is_a_tap_and_every_tap_has_a_name():
    whole = output(rows=True)
    levels = [f"{field}{i}" for field in ("backbone", "neck", "cls_logits") for i in ("", ".0", ".1", ".2")]
    expected = [*levels, "cls_tower.0", "cls_tower.1", "rows.logits", "rows.boxes", "rows.location"]
    assert taps.taps(whole) == expected
    for name in expected:
        taps.resolve(whole, name)
    assert taps.taps(DetectorOutput(strides=(8,))) == []


@pytest.mark.parametrize(
    ("name", "strides", "field", "indices"),
    [
        ("neck", (8, 16, 32), "neck", (0, 1, 2)),
        ("neck.1", (16,), "neck", (1,)),
        ("neck.0:2", (8, 16), "neck", (0, 1)),
        ("backbone.2", (16,), "backbone", (2,)),
        ("backbone", (4, 8, 16), "backbone", (0, 1, 2)),
    ],
)
def test_a_tap_of_levels_is_a_dict_by_stride(name, strides, field, indices):
    whole = output()
    found = tap(whole, name)
    assert tuple(found) == strides
    assert all(found[stride] is getattr(whole, field)[i] for stride, i in zip(strides, indices, strict=True))


def test_a_tap_of_a_tower_is_one_convolution_on_all_levels():
    whole = output()
    for name, index in (("cls_tower.0", 0), ("cls_tower.1", 1), ("cls_tower.-1", 1), ("cls_tower.-2", 0)):
        found = tap(whole, name)
        assert tuple(found) == (8, 16, 32) and list(found.values()) == list(whole.cls_tower[index])


@pytest.mark.parametrize(
    "name",
    [
        "nack",
        "neck.3",
        "neck.-1",
        "neck.1:1",
        "neck.0:4",
        "neck.:2",
        "neck.0:2:3",
        "cls_tower",
        "cls_tower.2",
        "cls_tower.-3",
        "cls_tower.0:1",
        "reg_tower.0",
        "rows.logits",
        "strides",
        "quality",
        "neck.",
    ],
)
def test_a_wrong_tap_is_refused_with_the_valid_names(name):
    with pytest.raises(UserError, match=r"^tap .*this model has no such tap.*its taps are backbone, .*cls_tower\.1$"):
        tap(output(), name)


def test_a_tap_that_not_all_models_have_says_what_it_needs():
    with pytest.raises(UserError, match="needs box edges as distributions over bins, as GFL has them: its taps are"):
        taps.only(output(rows=True), ["rows.distribution"])
    with pytest.raises(UserError, match="rows have no levels"):
        tap(output(rows=True), "rows.logits")


def test_pairs_are_by_stride():
    fine, coarse = output(), output((16, 32, 64), channels=6)
    assert [p.stride for p in pair(fine, coarse, "neck")] == [16, 32]
    assert [p.stride for p in pair(fine, fine, "neck", "backbone.1:3")] == [8, 16]
    assert [p.student.shape[-1] for p in pair(fine, fine, "cls_tower.1", "cls_logits")] == [4] * 3
    with pytest.raises(UserError, match="no stride in common"):
        pair(fine, output((64,)), "neck")
    with pytest.raises(UserError, match="factor of 2"):
        init_adapters(jax.random.key(0), [Pair(8, fine.neck[0], fine.neck[2])])


def test_only_keeps_what_is_named():
    whole = output(rows=True)
    kept = taps.only(whole, ["neck.0", "neck.2", "cls_tower.-1", "rows.logits", "targets", "assignment", "head"])
    assert kept.neck[0] is whole.neck[0] and kept.neck[1] is None and kept.neck[2] is whole.neck[2]
    assert kept.cls_tower[0] is None and kept.cls_tower[1] is whole.cls_tower[1]
    assert kept.backbone == kept.cls_logits == ()
    assert kept.rows is not None and kept.rows.logits is whole.rows.logits
    assert kept.rows.boxes is None and kept.rows.location is None and kept.rows.level_sizes == (64, 16, 4)
    assert taps.only(whole, ["neck.1", "neck"]).neck == whole.neck == taps.only(whole, ["neck", "neck.1"]).neck
    assert taps.only(whole, ["neck"]).rows is None


@pytest.mark.parametrize("shapes", [False, True], ids=["arrays", "shapes"])
def test_the_levels_that_both_have_are_the_finest(shapes):
    three, two = output(rows=True), output((8, 16), rows=True)
    if shapes:
        three, two = (jax.eval_shape(lambda one=one: one) for one in (three, two))
    for student, teacher in ((three, two), (two, three)):
        for cut in taps.shared_levels(student, teacher):
            assert cut.strides == (8, 16) and len(cut.neck) == len(cut.cls_logits) == 2
            assert [len(levels) for levels in cut.cls_tower] == [2, 2] and len(cut.backbone) == 3
            assert cut.rows.level_sizes == (64, 16) and cut.rows.logits.shape == (2, 80, 3)
            assert cut.rows.boxes.shape == (2, 80, 4) and cut.rows.location.shape == (80, 4)
    if not shapes:
        cut = taps.shared_levels(three, two)[0]
        assert np.array_equal(cut.rows.logits, three.rows.logits[:, :80])
    other = output((4, 8), rows=True)
    assert taps.shared_levels(three, other) == (three, other), "other finest levels: nothing is cut"
