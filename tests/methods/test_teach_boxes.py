"""Teach-Boxes: its first term against Teach-DETR's, its soft labels against a loop over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import methods
from kdjax.distill import Custom, Distiller
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, targets_of
from tests.methods.test_matrix import CLASSES, SIDE, batch, network, taps
from tests.methods.test_teach_detr import BOXES, objects, seen, teacher
from tests.support.arrays import quick_jit

KEY = jax.random.PRNGKey(0)
FEW = ["rtmdet", "faster_rcnn", "rtdetr"]
LONG = [pytest.param(family, marks=[pytest.mark.slow] * (family not in FEW)) for family in BOXES]
SCORES = batch()["valid"] * np.array([0.9, 0.4, 1.0], np.float32)


@functools.cache
def computed(family: str):
    """(student's output, detections) -> terms of both methods, the student's rows, and what they learn."""
    student = network(family, False)
    made = Distiller(student, teacher(objects()), [methods.teach_boxes(), methods.teach_detr()])

    def compute(output, found):
        own = made.terms({"teach_boxes": {}, "teach_detr": {}}, output, batch(), observed=seen(found), key=KEY)
        weights = jnp.concatenate([found.scores, jnp.full((2, 1), 0.5)], 1)
        targets = targets_of(jax.tree.map(jnp.asarray, batch()))._replace(weights=weights)
        given = student.assign(output, targets, KEY)
        logits = student.rows(output).logits if output.at is None else output.at(given.regions).logits
        return own, logits, given.matched, given.positive

    return quick_jit(compute)


@pytest.mark.parametrize("family", LONG)
def test_terms_are_those_of_teach_detr_and_of_a_loop_over_rows(family):
    output = taps(family, False)
    terms, logits, matched, positive = jax.device_get(computed(family)(output, objects(scores=SCORES)))
    assert terms["teach_boxes/targets"] == pytest.approx(float(terms["teach_detr/loss"]), rel=1e-6)
    labels, total = batch()["labels"], 0.0
    for image, row in np.argwhere(positive):
        box = matched[image, row]
        label, score, z = labels[image, box], SCORES[image, box], logits[image, row].astype(float)
        if family in ("faster_rcnn", "cascade_rcnn"):
            log_p = z - np.log(np.exp(z).sum())
            assert len(z) == CLASSES + 1
            total -= score * log_p[label] + (1 - score) * log_p[CLASSES]
        else:
            for k in range(CLASSES):
                p, target = 1 / (1 + np.exp(-z[k])), score if k == label else 0.0
                total -= target * np.log(p) + (1 - target) * np.log(1 - p)
    assert positive.sum() > 2
    assert terms["teach_boxes/soft"] == pytest.approx(total / positive.sum(), rel=1e-4)


@pytest.mark.parametrize("family", ["rtmdet"])
def test_images_without_detections_teach_nothing(family):
    terms, *_ = computed(family)(taps(family, False), objects(valid=jnp.zeros((2, 3), bool)))
    assert terms["teach_boxes/targets"] == terms["teach_boxes/soft"] == 0


@pytest.mark.parametrize(("left_out", "kept"), [("target_weight", "soft"), ("soft_weight", "targets")])
def test_a_term_of_weight_zero_is_not_computed(left_out, kept):
    """Without soft labels a student needs no rows."""
    method = methods.teach_boxes(**{left_out: 0.0})
    assert [*method.weights] == [kept] and ("rows.logits" in method.reads.student) == (kept == "soft")
    made = Distiller(network("rtmdet", False), teacher(objects()), [method])
    terms = jax.eval_shape(
        lambda output: made.terms({"teach_boxes": {}}, output, batch(), observed=seen(objects()), key=KEY),
        taps("rtmdet", False),
    )
    assert [*terms] == [f"teach_boxes/{kept}"]


def test_a_student_without_rows_is_refused_for_soft_labels():
    own = network("rtmdet", False)
    maps = DetectorOutput(strides=own.spec((SIDE, SIDE)).strides, neck=own.spec((SIDE, SIDE)).neck)
    bare = Custom(spec=lambda image_size: maps, assign=own.assign, loss=own.loss)
    with pytest.raises(UserError, match=r"teach_boxes: student: tap 'rows.logits'"):
        Distiller(bare, teacher(objects()), [methods.teach_boxes()]).init(KEY, (SIDE, SIDE))
    plain = Distiller(bare, teacher(objects()), [methods.teach_boxes(soft_weight=0.0)])
    assert plain.init(KEY, (SIDE, SIDE)) == {"teach_boxes": {}}


@pytest.mark.parametrize("family", ["rtmdet_ins", "mask_rcnn"])
def test_students_that_learn_masks_are_refused(family):
    made = Distiller(network(family, False), teacher(objects()), [methods.teach_boxes()])
    with pytest.raises(UserError, match="teach_boxes: the student learns masks"):
        made.init(KEY, (SIDE, SIDE))


@pytest.mark.parametrize(
    ("option", "value"), [("score_threshold", 1.5), ("max_detections", 0), ("max_detections", 101), ("unmatched", -1)]
)
def test_options_out_of_their_range_are_named(option, value):
    with pytest.raises(UserError, match=f"teach_boxes: {option} is {value}"):
        methods.teach_boxes(**{option: value})
