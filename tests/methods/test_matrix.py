"""Every method on pairs of families, with numbers: finite terms, a gradient at the student, none at the teacher.

Maps are drawn once for each family, in the shapes of narrow networks; assigners, heads and decoders are the families'
own. One pair a method is tried here, all others by `python -m pytest tests/methods/test_matrix.py -m slow`. That what
does not refuse a pair also runs on it is traced for all pairs in tests/test_docs.py. Rows are paired by place: made-up
queries would rarely overlap; test_queries.py pairs them by what they say.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors, methods
from kdjax.distill import Distiller, by_place

SIDE, BATCH, CLASSES = 64, 2, 3
QUICK = {"xla_backend_optimization_level": 0}
DENSE = dict(base_channels=2, stacked_convs=2)
# Family -> its smallest variant; options of student and teacher.
FAMILIES = {
    "rtmdet": ("rtmdet_pico", {"widen": 0.0625}, {"widen": 0.125}),
    "rtmdet_ins": ("rtmdet_ins_pico", {"widen": 0.0625}, {"widen": 0.125}),
    "yolox": ("yolox_pico", {"widen": 0.0625, "deepen": 0.1}, {"widen": 0.125, "deepen": 0.1}),
    "retinanet": ("retinanet_r18", *({**DENSE, "neck_channels": c, "head_channels": c} for c in (4, 8))),
} | {
    family: (f"{family}_r18", *({**DENSE, "groups": 2, "neck_channels": c, "head_channels": c} for c in (4, 8)))
    for family in ("fcos", "gfl", "atss")
}
TWO_STAGE = dict(base_channels=2, head_channels=8, proposals=16, region_samples=8)
FAMILIES["faster_rcnn"] = ("faster_rcnn_r18", *(TWO_STAGE | {"neck_channels": c} for c in (4, 8)))
MASKS = TWO_STAGE | dict(mask_channels=4, mask_convs=1)
FAMILIES["mask_rcnn"] = ("mask_rcnn_r18", *(MASKS | {"neck_channels": c} for c in (4, 8)))
FAMILIES["cascade_rcnn"] = ("cascade_rcnn_r18", *(TWO_STAGE | {"neck_channels": c} for c in (4, 8)))
DETR = dict(encoder_hidden=4, expansion=0.5, heads=2, hidden=4, layers=2, queries=6, denoising=2)
for _family in ("rtdetr", "rtdetrv2"):
    _backbone = dict(stem=2, widths=[4, 4, 4, 4], blocks=[1, 1, 1, 1], points=1)
    FAMILIES[_family] = (
        f"{_family}_pico",
        *(DETR | _backbone | {"encoder_channels": c, "channels": c} for c in (4, 8)),
    )
_backbone = dict(stem=[2, 2], middle=[2] * 4, widths=[4] * 4, blocks=[1] * 4, block_layers=[1] * 4, repeats=1)
_backbone |= dict(points=[1, 1, 1], bins=4)
FAMILIES["dfine"] = ("dfine_s", *(DETR | _backbone | {"encoder_channels": c, "channels": c} for c in (4, 8)))
assert set(FAMILIES) == set(detectors.families())
# Decoders that are asked are made up in test_decoders.py.
NAMES = [name for name in methods.names() if "ask" not in methods.build(name).reads.student]
PAIRS = [(student, teacher) for student in FAMILIES for teacher in FAMILIES]


@functools.cache
def network(family: str, teacher: bool):
    name, *options = FAMILIES[family]
    return detectors.build(name, CLASSES, **options[teacher])


@functools.cache
def spec(family: str, teacher: bool):
    return network(family, teacher).spec((SIDE, SIDE))


@functools.cache
def taps(family: str, teacher: bool):
    """Maps of two images; distances in pixels are of two cells and more, so that objects have several priors."""
    rng = np.random.default_rng(teacher)
    draw = lambda leaf: rng.normal(0, 0.5, (BATCH, *leaf.shape[1:])).astype(np.float32)  # noqa: E731
    of = spec(family, teacher)
    drawn = jax.tree.map(draw, dataclasses.replace(of, rows=None, at=None, masks_at=None, stages=(), ask=None))
    if of.at is not None:  # of parameters and maps
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), of.at.args[0])
        bind = lambda call: jax.tree_util.Partial(call.func, params, drawn.neck[:4])  # noqa: E731
        calls, is_call = {"at": of.at, "stages": of.stages}, lambda leaf: isinstance(leaf, jax.tree_util.Partial)
        drawn = dataclasses.replace(drawn, **jax.tree.map(bind, calls, is_leaf=is_call))
    if family not in ("rtmdet", "rtmdet_ins", "fcos"):
        return drawn
    distances = tuple(stride * (2 + cells) for stride, cells in zip(drawn.strides, drawn.box_reg, strict=True))
    return dataclasses.replace(drawn, box_reg=distances)


def batch() -> dict:
    boxes = np.zeros((BATCH, 3, 4), np.float32)
    boxes[:, :2] = [[2, 3, 60, 58], [0, 0, 42, 44]]
    valid = np.array([[True, True, False], [True, False, False]])
    return {
        "image": np.zeros((BATCH, SIDE, SIDE, 3), np.uint8),
        "boxes": boxes * valid[..., None],
        "labels": np.array([[1, 2, 0], [0, 0, 0]], np.int32),
        "valid": valid,
        "image_size": np.full((BATCH, 2), SIDE, np.int32),
    }


def runs(name: str, pair: tuple[str, str]) -> bool:
    return not methods.refusal(name, network(pair[0], False), network(pair[1], True), (SIDE, SIDE), by_place)


def check(name: str, student_family: str, teacher_family: str) -> None:
    student, teacher = network(student_family, False), network(teacher_family, True)
    distiller, key = Distiller(student, teacher, [methods.build(name)], by_place), jax.random.PRNGKey(0)
    adapters = distiller.init(key, (SIDE, SIDE))

    def terms(output, maps, frozen):
        observed = dataclasses.replace(maps, rows=teacher.rows(maps))
        if "detections" in distiller.teacher_reads:
            found = teacher.decode(maps, batch()["image_size"], max_detections=5)
            observed = dataclasses.replace(observed, detections=found._replace(masks=None))
        return distiller.terms(adapters, output, batch(), frozen, observed=observed, key=key, step=0)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(*where):
        values, pull_back = jax.vjp(terms, *where)
        sums = [
            sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(part)) for part in pull_back(dict.fromkeys(values, 1.0))
        ]
        return values, sums

    values, (at_student, *at_teacher) = gradients(
        taps(student_family, False), taps(teacher_family, True), teacher.init(jax.random.PRNGKey(1))
    )
    assert all(np.isfinite(value) for value in values.values()), values
    assert np.isfinite(at_student) and at_student > 0 and not any(at_teacher)


# One each that compares maps, boxes, predictions, through a head, instances and distributions; the others are slow.
KINDS = ("mkd", "fgfi", "dkd", "crosskd", "gid", "ld")


@pytest.mark.parametrize(
    ("number", "name"),
    [pytest.param(i, name, id=name, marks=[pytest.mark.slow] * (name not in KINDS)) for i, name in enumerate(NAMES)],
)
def test_a_method_teaches_across_families(number, name):
    """On one pair, of two families if it runs on any; which pair differs from method to method."""
    first = 23 * number % len(PAIRS)
    turned = sorted(PAIRS[first:] + PAIRS[:first], key=lambda pair: pair[0] == pair[1])
    pair = next((pair for pair in turned if runs(name, pair)), None)
    if pair is None:
        pytest.skip(f"no family has what {name} compares")
    check(name, *pair)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_method_teaches_on_every_pair(name):
    for pair in PAIRS:
        if runs(name, pair):
            check(name, *pair)
