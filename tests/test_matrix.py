"""Every method on pairs of families, with numbers: finite terms, a gradient at the student, none at the teacher.

Maps are drawn once for each family, in the shapes of narrow networks; assigners, heads and decoders are the families'
own. One pair a method is tried here, all others by `python -m pytest tests/test_matrix.py -m slow`. That what does not
refuse a pair also runs on it is traced for all pairs in tests/test_docs.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors
from kdjax.methods import api
from kdjax.training import step
from kdjax.training.setup import output_spec

SIDE, BATCH, CLASSES = 64, 2, 3
QUICK = {"xla_backend_optimization_level": 0}
DENSE = dict(base_channels=2, stacked_convs=2)
# Family -> its smallest variant; options of student and teacher.
FAMILIES = {
    "rtmdet": ("rtmdet_pico", {"widen": 0.0625}, {"widen": 0.125}),
    "yolox": ("yolox_pico", {"widen": 0.0625, "deepen": 0.1}, {"widen": 0.125, "deepen": 0.1}),
    "retinanet": ("retinanet_r18", *({**DENSE, "neck_channels": c, "head_channels": c} for c in (4, 8))),
} | {
    family: (f"{family}_r18", *({**DENSE, "groups": 2, "neck_channels": c, "head_channels": c} for c in (4, 8)))
    for family in ("fcos", "gfl", "atss")
}
assert set(FAMILIES) == set(detectors.families())
PAIRS = [(student, teacher) for student in FAMILIES for teacher in FAMILIES]


@functools.cache
def network(family: str, teacher: bool):
    name, *options = FAMILIES[family]
    return detectors.build(name, CLASSES, **options[teacher])


@functools.cache
def spec(family: str, teacher: bool):
    return output_spec(network(family, teacher), (SIDE, SIDE))


@functools.cache
def taps(family: str, teacher: bool):
    """Maps of two images; distances in pixels are of two cells and more, so that objects have several priors."""
    rng = np.random.default_rng(teacher)
    draw = lambda leaf: rng.normal(0, 0.5, (BATCH, *leaf.shape[1:])).astype(np.float32)  # noqa: E731
    drawn = jax.tree.map(draw, spec(family, teacher))
    if family not in ("rtmdet", "fcos"):
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


def runs(name: str) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if not api.refusal(name, spec(pair[0], False), spec(pair[1], True))]


def check(name: str, student_family: str, teacher_family: str) -> None:
    student, teacher = network(student_family, False), network(teacher_family, True)
    methods, key = {name: api.build(name)}, jax.random.PRNGKey(0)
    adapters = step.init_adapters(methods, key, spec(student_family, False), spec(teacher_family, True))
    frozen = step.Teacher(*teacher.init(jax.random.PRNGKey(1)))
    given = batch()

    def terms(output, seen, frozen):
        fixed = dataclasses.replace(teacher, apply=lambda *_, train: (seen, None))
        _, assignment = student.loss(output, step.targets_of(given))
        return step.compare(student, fixed, methods, adapters, frozen, output, assignment, given, jnp.int32(0), key)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(*where):
        values, pull_back = jax.vjp(terms, *where)
        sums = [
            sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(part)) for part in pull_back(dict.fromkeys(values, 1.0))
        ]
        return values, sums

    values, (at_student, *at_teacher) = gradients(taps(student_family, False), taps(teacher_family, True), frozen)
    assert all(np.isfinite(value) for value in values.values()), values
    assert np.isfinite(at_student) and at_student > 0 and not any(at_teacher)


@pytest.mark.parametrize("number, name", list(enumerate(api.names())), ids=api.names())
def test_a_method_teaches_across_families(number, name):
    able = runs(name)
    mixed = [pair for pair in able if pair[0] != pair[1]] or able
    check(name, *mixed[7 * number % len(mixed)])


@pytest.mark.slow
@pytest.mark.parametrize("name", api.names())
def test_a_method_teaches_on_every_pair(name):
    for pair in runs(name):
        check(name, *pair)
