"""Where two models predict differently: PFI's guide and GID's instances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import disagreement, distance
from tests.support.arrays import maps, quick_jit


def pfi(student, teacher, student_logits, teacher_logits, **options):
    return distance.guided_squared(
        student, teacher, disagreement.class_disagreement(student_logits, teacher_logits, **options)
    )


def test_pfi_equals_its_formula():
    (s, t), (zs, zt) = maps(6, (2, 3, 4, 5)), maps(7, (2, 3, 4, 6))
    expected = ((zs - zt) ** 2).mean(-1) * ((s - t) ** 2).mean(-1)
    np.testing.assert_allclose(pfi(s, t, zs, zt)[..., 0], expected, rtol=1e-5)
    sigmoid = (jax.nn.sigmoid(zs) - jax.nn.sigmoid(zt)) ** 2
    np.testing.assert_allclose(
        disagreement.class_disagreement(zs, zt, space="probs")[..., 0], sigmoid.mean(-1), rtol=1e-4
    )


def test_pfi_properties():
    (s, t), (zs, zt) = maps(8, (2, 3, 4, 5)), maps(9, (2, 3, 4, 6))
    value = pfi(s, t, zs, zt)
    assert float(value.min()) > 0
    np.testing.assert_array_equal(pfi(s, s, zs, zt), 0)
    np.testing.assert_array_equal(pfi(s, t, zs, zs), 0)
    np.testing.assert_allclose(pfi(t, s, zt, zs), value, rtol=1e-5)  # student and teacher swapped
    ones = distance.guided_squared(s, t, jnp.ones((2, 3, 4, 1)))
    np.testing.assert_allclose(ones.mean(), distance.squared(s, t).mean(), rtol=1e-5)
    gradients = quick_jit(jax.grad(lambda s, zs: pfi(s, t, zs, zt).sum(), (0, 1)))(s, zs)
    assert all(float(jnp.abs(g).max()) > 0 for g in gradients)


def test_refused():
    with pytest.raises(UserError, match="space"):
        disagreement.class_disagreement(np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 1, 2)), space="softmax")


def test_general_instances():
    rng = np.random.default_rng(3)
    student, teacher = maps(3, (1, 6, 3))
    corner = np.array([[0, 0], [1, 0], [20, 20], [40, 0], [0, 40], [60, 60]], np.float32)[None]
    boxes = np.concatenate([corner, corner + 10], -1)
    student_boxes = boxes + rng.uniform(0, 0.1, boxes.shape).astype(np.float32)
    gap = np.asarray(jax.nn.sigmoid(teacher) - jax.nn.sigmoid(student))
    score = np.abs(gap).max(-1)[0]
    order = [i for i in np.argsort(-score) if i not in ({0, 1} - {np.argmax(score[:2])})]  # 0 and 1 overlap
    found, labels, valid = disagreement.general_instances(student, teacher, student_boxes, boxes, count=4)
    for place, prior in enumerate(order[:4]):
        surer = gap[0, prior, np.abs(gap[0, prior]).argmax()] > 0
        np.testing.assert_allclose(found[0, place], (boxes if surer else student_boxes)[0, prior], rtol=1e-6)
        assert labels[0, place] == np.abs(gap[0, prior]).argmax()
    assert np.all(valid)
    np.testing.assert_allclose(disagreement.score_gap(student, teacher)[0], score, rtol=1e-5)


def test_no_gradient_flows_through_general_instances():
    student, teacher = maps(11, (1, 6, 3))
    boxes = jnp.tile(jnp.array([0.0, 0, 8, 8]), (1, 6, 1)) + 9.0 * jnp.arange(6)[None, :, None]

    def total(*arrays):
        return disagreement.general_instances(*arrays, count=3)[0].sum()

    for gradient in quick_jit(jax.grad(total, (0, 1, 2, 3)))(student, teacher, boxes + 1, boxes):
        np.testing.assert_array_equal(gradient, 0)


def test_score_gap_has_no_sign():
    student, teacher = jnp.array([[0.0, 2.0], [0.0, -2.0]]), jnp.zeros((2, 2))
    np.testing.assert_allclose(disagreement.score_gap(student, teacher), jax.nn.sigmoid(2.0) - 0.5, rtol=1e-6)
