"""The methods on predictions and assignments, on the heads of the dense families: steps of two networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import methods
from kdjax.detectors import build
from kdjax.distill import Distiller, Method
from kdjax.errors import UserError
from kdjax.structs import targets_of

NAMES = ("retinanet_r18", "fcos_r18", "gfl_r18", "atss_r18", "yolox_pico")
METHODS = ("bckd", "crosskd", "fgfi", "gid", "pfi", "rm")
SIDE, BATCH, CLASSES = 64, 2, 3
QUICK = {"xla_backend_optimization_level": 0}


def methods_of(name: str) -> dict[str, Method]:
    options = {"crosskd": {"quality_weight": 1.0 if name.startswith(("fcos", "atss", "yolox")) else 0.0}}
    chosen = {method: methods.build(method, **options.get(method, {})) for method in METHODS}
    return chosen | ({"ld": methods.build("ld")} if name.startswith("gfl") else {})


@functools.cache
def networks(name: str):
    """A student, and a teacher of twice its width."""
    if name.startswith("yolox"):
        return tuple(build(name, CLASSES, widen=widen, deepen=0.1) for widen in (0.0625, 0.125))
    groups = {} if name.startswith("retinanet") else {"groups": 2}
    return tuple(
        build(name, CLASSES, base_channels=2, neck_channels=c, head_channels=c, stacked_convs=2, **groups)
        for c in (4, 8)
    )


def batch() -> dict:
    boxes = np.zeros((BATCH, 3, 4), np.float32)
    boxes[0, :2] = [[2, 3, 60, 58], [0, 0, 42, 44]]  # the second image is empty
    return {
        "image": np.random.default_rng(0).integers(0, 255, (BATCH, SIDE, SIDE, 3)).astype(np.uint8),
        "boxes": boxes,
        "labels": np.array([[1, 2, 0], [0, 0, 0]], np.int32),
        "valid": np.array([[True, True, False], [False] * 3]),
        "image_size": np.full((BATCH, 2), SIDE, np.int32),
    }


def terms(name: str, params, stats, frozen, batch) -> dict:
    """Every term of every method."""
    student, teacher = networks(name)
    distiller, key = Distiller(student, teacher, methods_of(name)), jax.random.PRNGKey(0)
    output, _ = student.apply(params, stats, student.preprocess(batch["image"]), train=True)
    assignment = student.assign(output, targets_of(batch))
    adapters = distiller.init(key, (SIDE, SIDE))
    return distiller.terms(adapters, output, batch, frozen, assignment=assignment, key=key, step=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_methods_teach_dense_heads(name):
    student, teacher = networks(name)
    params, stats = student.init(jax.random.PRNGKey(1))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, frozen):
        """The terms, the gradient of each at the student's weights, and that of all at the teacher's."""
        values, pull_back = jax.vjp(
            lambda *weights: terms(name, weights[0], stats, weights[1], batch()), params, frozen
        )
        pulled = {}
        for term in values:
            one = {other: jnp.float32(other == term) for other in values}
            pulled[term] = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(pull_back(one)[0]))
        at_teacher = jax.tree.leaves(pull_back(jax.tree.map(jnp.ones_like, values))[1])
        return values, pulled, sum(jnp.sum(jnp.abs(leaf)) for leaf in at_teacher)

    values, pulled, at_teacher = run(params, teacher.init(jax.random.PRNGKey(2)))
    assert all(np.isfinite(v) for v in values.values()) and at_teacher == 0
    # GID relates three instances or more of an image; how many there are is not up to the test.
    silent = {term for term, pull in pulled.items() if not (np.isfinite(pull) and pull > 0)}
    assert silent <= {"gid/relation"}, silent


def refusal(student, teacher, method: str, **options) -> str:
    """The sentence that refuses a method on two detectors."""
    with pytest.raises(UserError) as caught:
        Distiller(student, teacher, [methods.build(method, **options)]).init(jax.random.PRNGKey(0), (SIDE, SIDE))
    return str(caught.value)


@pytest.mark.parametrize("name", ["retinanet_r18", "fcos_r18", "atss_r18", "yolox_pico"])
def test_ld_is_refused_without_distributions(name):
    sentence = refusal(*networks(name), "ld")
    assert sentence.startswith("ld: student: tap 'rows.distribution': ")
    assert "needs box edges as distributions over bins, as GFL has them" in sentence


def test_crosskd_names_the_taps_where_there_is_no_quality():
    pair = networks("yolox_pico")[0], build("rtmdet_pico", CLASSES, widen=0.125)
    sentence = refusal(*pair, "crosskd", quality_weight=1.0)
    assert sentence.startswith("crosskd: teacher: tap 'quality': this model has no such tap")
    assert "its taps are backbone, " in sentence
