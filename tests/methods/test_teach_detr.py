"""Teach-DETR: detections as further targets of every kind of student, and the weights of targets in every loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import methods
from kdjax.distill import Custom, Distiller
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, PaddedDetections, targets_of
from tests.methods.test_matrix import CLASSES, FAMILIES, SIDE, batch, network, taps
from tests.support.arrays import quick_jit

KEY = jax.random.PRNGKey(0)
BOXES = [family for family in FAMILIES if family not in ("rtmdet_ins", "mask_rcnn")]
FEW = ["rtmdet", "rtdetr"]
# Two stages draw regions; D-FINE takes the first of the objects that a query was matched with equally often.
IN_ORDER = {"faster_rcnn", "cascade_rcnn", "dfine"}
LONG = [pytest.param(family, marks=[pytest.mark.slow] * (family not in FEW)) for family in BOXES]


def objects(**changed) -> PaddedDetections:
    """The objects of the batch as detections of score 1."""
    truth = batch()
    found = PaddedDetections(truth["boxes"], truth["valid"].astype(np.float32), truth["labels"], truth["valid"])
    return jax.tree.map(jnp.asarray, found._replace(**changed))


def seen(found: PaddedDetections) -> DetectorOutput:
    return DetectorOutput(strides=(8, 16, 32), detections=found)


def teacher(found: PaddedDetections) -> Custom:
    one = jax.eval_shape(lambda: jax.tree.map(lambda x: x[:1], seen(found)))
    return Custom(spec=lambda image_size: one, observe=lambda variables, batch: seen(found))


@functools.cache
def losses(family: str, **options):
    """(student's output, detections) -> (term, the student's own losses without denoising), and their gradients."""
    student = network(family, False)
    made = Distiller(student, teacher(objects()), [methods.teach_detr(**options)])

    def both(output, found):
        term = made.terms({"teach_detr": {}}, output, batch(), observed=seen(found), key=KEY)["teach_detr/loss"]
        targets = targets_of(jax.tree.map(jnp.asarray, batch()))
        own = student.loss(output, targets, student.assign(output, targets, KEY)._replace(denoising=None))
        return term, sum(own.values())

    def compute(output, found):
        (term, own), pull = jax.vjp(lambda output: both(output, found), output)
        return term, own, *(pull(way)[0] for way in ((1.0, 0.0), (0.0, 1.0)))

    return quick_jit(compute)


@pytest.mark.parametrize("family", LONG)
def test_the_objects_as_detections_double_the_loss(family):
    """With `unmatched=1`, value and gradient are those of the student's own loss; the order does not matter."""
    compute, output = losses(family, unmatched=1.0), taps(family, False)
    term, own, of_term, of_own = compute(output, objects())
    assert own > 0 and term == pytest.approx(float(own), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), of_term, of_own)
    order = np.array([2, 1, 0])
    turned, *_ = compute(output, jax.tree.map(lambda x: x[:, order], objects()))
    if family not in IN_ORDER:
        assert turned == pytest.approx(float(term), rel=1e-5)


@pytest.mark.parametrize("family", LONG)
def test_detections_that_are_not_sure_enough_teach_nothing(family):
    compute, output = losses(family, unmatched=1.0), taps(family, False)
    few = objects(scores=jnp.full((2, 3), 0.29))
    term, _, of_term, _ = compute(output, few)
    assert term == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(of_term))
    none, _, gradient, _ = compute(output, objects(valid=jnp.zeros((2, 3), bool)))
    assert none == 0 and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("family", LONG)
def test_a_row_learns_as_far_as_the_teacher_is_sure(family):
    """Without the background, equal scores are a factor of all: the assignment does not look at them."""
    compute, output = losses(family, unmatched=0.0), taps(family, False)
    sure, *_ = compute(output, objects())
    half, *_ = compute(output, objects(scores=batch()["valid"] * 0.5))
    assert sure > 0 and half == pytest.approx(0.5 * float(sure), rel=1e-5)
    second = batch()["valid"] * np.array([0.5, 1.0, 1.0])
    mixed, *_ = compute(output, objects(scores=second))
    assert 0.5 * sure < mixed < sure


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f not in FEW)) for f in FAMILIES])
def test_losses_are_linear_in_the_weights_of_targets(family):
    """Weights of 1 change nothing, and each object and the background have a part of the loss."""
    detector, output = network(family, False), taps(family, False)
    masks = {"masks": np.zeros((2, 3, SIDE // 4, SIDE // 4), np.uint8)} if family in ("rtmdet_ins", "mask_rcnn") else {}
    targets = targets_of(jax.tree.map(jnp.asarray, batch() | masks))
    output = dataclasses.replace(output, masks_at=network(family, False).spec((SIDE, SIDE)).masks_at and _no_masks)

    @quick_jit
    def compute(weights):
        given = detector.assign(output, targets, KEY)._replace(denoising=None)
        return detector.loss(output, targets._replace(weights=weights), given)

    plain, ones = compute(None), compute(jnp.ones((2, 4)))
    parts = [compute(jnp.zeros((2, 4)).at[:, i].set(1)) for i in range(4)]
    for name, value in plain.items():
        assert ones[name] == pytest.approx(float(value), rel=1e-6), name
        assert sum(float(part[name]) for part in parts) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
        assert parts[2][name] == 0, name  # no object
    assert sum(parts[0].values()) > 0 < sum(parts[3].values())


def _no_masks(boxes, labels):
    return jnp.zeros((*labels.shape, 28, 28))


def test_a_detector_detects_for_its_student():
    """What `Distiller.observe` gives is what the teacher's `decode` finds, without gradient."""
    student, found = network("rtdetr", False), network("rtmdet", True)
    made = Distiller(student, found, [methods.teach_detr()])
    variables = found.init(KEY)
    one = quick_jit(lambda: made.observe(jax.tree.map(jnp.asarray, batch()), variables))()
    assert one.detections.boxes.shape == (2, 100, 4) and one.rows is None and not one.neck
    assert np.all(np.diff(one.detections.scores, axis=1) <= 0)


@pytest.mark.parametrize("family", ["rtmdet_ins", "mask_rcnn"])
def test_students_that_learn_masks_are_refused(family):
    made = Distiller(network(family, False), teacher(objects()), [methods.teach_detr()])
    with pytest.raises(UserError, match="teach_detr: the student learns masks"):
        made.init(KEY, (SIDE, SIDE))


def test_what_does_not_detect_is_refused():
    mute = Custom(spec=lambda image_size: DetectorOutput(strides=(8, 16, 32)))
    with pytest.raises(UserError, match="reads the teacher's detections, which this teacher does not have"):
        Distiller(network("rtdetr", False), mute, [methods.teach_detr()]).init(KEY, (SIDE, SIDE))
    other = dataclasses.replace(network("rtmdet", True), num_classes=CLASSES + 1)
    with pytest.raises(UserError, match="the student has 3 classes and the teacher 4"):
        Distiller(network("rtdetr", False), other, [methods.teach_detr()]).init(KEY, (SIDE, SIDE))
    made = Distiller(network("rtdetr", False), network("rtmdet", True), [methods.teach_detr()])
    with pytest.raises(UserError, match="needs `image_size` in the batch"):
        jax.eval_shape(lambda: made.observe({"image": batch()["image"]}, network("rtmdet", True).init(KEY)))


@pytest.mark.parametrize(
    ("option", "value"), [("score_threshold", 1.5), ("max_detections", 0), ("max_detections", 101), ("unmatched", -1)]
)
def test_options_out_of_their_range_are_named(option, value):
    with pytest.raises(UserError, match=f"teach_detr: {option} is {value}"):
        methods.teach_detr(**{option: value})
