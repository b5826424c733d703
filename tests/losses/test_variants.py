"""Every loss of the other methods in every way: eager, jitted, vmapped, under pmap, on eight shards, in bfloat16."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.boxes import assign
from kdjax.errors import UserError
from kdjax.losses import (
    attention,
    classification,
    disagreement,
    distance,
    divergence,
    normalization,
    reconstruction,
    regions,
    relation,
    similarity,
)
from tests.support.arrays import maps, on_pmap, on_shards, quick_jit

CONTEXT = [relation.init_context(jax.random.key(i), 4) for i in range(2)]
for block in CONTEXT:
    block["up"]["kernel"] = block["up"]["kernel"] + 0.3
NON_LOCAL = relation.init_non_local(jax.random.key(2), 4)
NON_LOCAL["norm"]["scale"] = NON_LOCAL["norm"]["scale"] + 1
GENERATOR = {
    name: {"kernel": 0.3 * jax.random.normal(jax.random.key(i), (3, 3, 4, 4)), "bias": jnp.full(4, 0.1)}
    for i, name in enumerate(("first", "second"))
}


def flat(x):
    """Maps as predictions of priors: f32[B, N, K]."""
    return x.reshape(len(x), -1, x.shape[-1])


def boxes_of(x):
    """Boxes near a grid, moved by the predictions: differentiable, never inverted."""
    x = jnp.tanh(flat(x).astype(jnp.float32))
    place = 8.0 * jnp.stack([jnp.arange(x.shape[1]) % 5, jnp.arange(x.shape[1]) // 5], -1)
    return jnp.concatenate([place - 6 + x[..., :2], place + 6 + x[..., 2:]], -1)


def per_image(student, teacher):
    """Losses that look at one image at a time: a dict of arrays with the batch first."""
    s, t = flat(student), flat(teacher)
    batch, priors = s.shape[:2]
    labels = jnp.broadcast_to(jnp.arange(priors) % 4, (batch, priors))
    matched, positive = labels % 3, labels < 3
    scores = [classification.label_score(x, labels) for x in (s, t)]
    boxes = jnp.broadcast_to(jnp.array([[2.0, 3, 20, 18], [10, 0, 40, 30], [0, 0, 0, 0]]), (batch, 3, 4))
    valid = jnp.broadcast_to(jnp.array([True, True, False]), (batch, 3))
    anchors = boxes_of(jnp.zeros((1, priors, 4)))[0]
    size = jnp.array([32, 40])
    foreground, background = regions.focal_masks(boxes, valid, size, student.shape[1:3])
    (fine,) = regions.level_masks(boxes, valid, (8,), (student.shape[1:3],))
    grid = anchors.reshape(*student.shape[1:3], 1, 4)
    imitated = regions.fine_grained_mask(boxes, valid, grid)
    *_, threshold = assign.atss_candidates(anchors, boxes, level_sizes=[priors], topk=5)
    valuable = regions.valuable_region(anchors, boxes, valid, threshold)
    scaled = [normalization.min_max(x) for x in (student, teacher)]
    target, others = divergence.decoupled_kl(s, t, labels, temperature=2.0)
    sigmoid_target, sigmoid_others = divergence.decoupled_sigmoid_kl(s, t, labels)
    found, _, found_valid = disagreement.general_instances(s, t, boxes_of(s), boxes_of(t), count=4)
    drop = reconstruction.keep_mask(jnp.linspace(0, 0.99, priors).reshape(1, *student.shape[1:3], 1), 0.4)
    return {
        "ssim": similarity.structural_dissimilarity(*scaled, window=3),
        "ssim factors": similarity.structural_dissimilarity(*scaled, window=3, exponents=(1.0, 2.0, 0.5)),
        "min-max by channel": normalization.min_max(student, scope="channel"),
        "rm": divergence.rank_kl(*scores, matched, positive, boxes=3),
        "rm boxes": divergence.has_positives(matched, positive, boxes=3).astype(jnp.float32),
        "pfi": distance.guided_squared(student, teacher, disagreement.class_disagreement(student, teacher)),
        "pfi probs": disagreement.class_disagreement(student, teacher, space="probs"),
        "fgd focal": (foreground + background) * attention.attention_weighted(student, teacher),
        "fgd attention": attention.attention_difference(student, teacher),
        "fgd relation": distance.squared(*map(relation.context_block, (student, teacher), CONTEXT)),
        "mgd": distance.squared(reconstruction.reconstruct(drop * student, GENERATOR), teacher),
        "hinton softmax": divergence.softmax_kl(s, t, temperature=4.0),
        "hinton sigmoid": divergence.sigmoid_kl(s, t, temperature=2.0),
        "dkd target": target,
        "dkd others": others,
        "yao target": sigmoid_target,
        "yao others": sigmoid_others,
        "crosskd, bckd": classification.modulated_bce(s, t),
        "crosskd beta": classification.modulated_bce(s, t, beta=2.0),
        "bckd gap": disagreement.score_gap(s, t),
        "ld": valuable * divergence.softmax_kl(s, t, temperature=10.0, class_reduction="mean"),
        "defeat": fine * distance.squared(student, teacher),
        "fgfi": imitated * distance.squared(student, teacher),
        "gid instances": found * found_valid[..., None],
        "gid relation": relation.pairwise_relation(s[:, :4], t[:, :4], jnp.ones((batch, min(4, priors)), bool)),
    }


def over_batch(student, teacher, axis_name=None):
    """Losses with a statistic of the global batch; each keeps the batch axis, so that shards can be put together."""
    norm = distance.frobenius(student, teacher, axis_name=axis_name)
    return {
        "crosskd align": normalization.match_statistics(student, teacher, axis_name=axis_name),
        "crosskd align ddof 0": normalization.match_statistics(student, teacher, ddof=0, axis_name=axis_name),
        "ssim by batch": normalization.min_max(student, scope="batch", axis_name=axis_name),
        "pfi normalised": normalization.unit_mean(
            disagreement.class_disagreement(student, teacher), axis_name=axis_name
        ),
        "fkd norm": jnp.broadcast_to(norm, student.shape[:1]),
        "fkd non-local": relation.non_local_block(student, NON_LOCAL, pool=2, axis_name=axis_name),
    }


def every(student, teacher):
    return per_image(student, teacher) | over_batch(student, teacher)


jitted = jax.jit(every)
SHAPE = (8, 4, 5, 4)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, with_pmap=True)
    def test_value(self):
        student, teacher = maps(0, SHAPE)
        value = self.variant(every)(student, teacher)
        chex.assert_trees_all_close(value, jitted(student, teacher), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_eager_is_jitted():
    """Each operation is a program; the losses' own tests compute many of them so."""
    student, teacher = maps(0, SHAPE)
    chex.assert_trees_all_close(every(student, teacher), jitted(student, teacher), rtol=1e-4, atol=1e-5)


def test_vmap_over_images_is_the_batch():
    student, teacher = maps(0, SHAPE)
    alone = quick_jit(jax.vmap(lambda s, t: jax.tree.map(lambda v: v[0], per_image(s[None], t[None]))))(
        student, teacher
    )
    whole = jitted(student, teacher)
    chex.assert_trees_all_close(alone, {name: whole[name] for name in alone}, rtol=1e-4, atol=1e-5)


def test_splitting_the_batch_over_devices_changes_nothing():
    student, teacher = maps(0, SHAPE)
    whole = jitted(student, teacher)
    for split in (on_shards(over_batch, student, teacher), on_pmap(over_batch, student, teacher)):
        chex.assert_trees_all_close(split, {name: whole[name] for name in split}, rtol=1e-4, atol=1e-5)


def test_gradients_over_devices_add_up():
    student, teacher = maps(1, (8, 2, 3, 4))
    weights = {k: np.random.default_rng(2).normal(size=v.shape[1:]) for k, v in over_batch(student, teacher).items()}

    def total(s, t, axis_name=None):  # "fkd norm" is one number: every device holds a copy of it
        parts = over_batch(s, t, axis_name=axis_name)
        return sum(jnp.sum(v * weights[k]) for k, v in parts.items())

    expected = quick_jit(jax.grad(total))(student, teacher)
    mapped = on_pmap(lambda s, t, axis_name: jax.grad(total)(s, t, axis_name), student, teacher)
    np.testing.assert_allclose(mapped, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (1, 1, 1, 4)])
def test_finite_in_bfloat16_and_on_degenerate_maps(shape):
    noise = maps(3, shape, jnp.bfloat16)
    constant = jnp.full(shape, 0.3, jnp.bfloat16), jnp.full(shape, -2.0, jnp.bfloat16)
    huge = tuple(1000 * x for x in noise)

    def total(s, t):
        values = every(s, t)
        return sum(jnp.sum(v) for v in values.values()), values

    values_and_gradient = quick_jit(jax.value_and_grad(total, has_aux=True))

    for student, teacher in (
        noise,
        constant,
        (constant[0], noise[1]),
        (noise[0], constant[1]),
        (noise[0], noise[0]),
        huge,
    ):
        (_, values), gradient = values_and_gradient(student, teacher)
        for name, value in values.items():
            assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


ZERO_AT_EQUALITY = [
    *("ssim", "rm", "pfi", "pfi probs", "fgd focal", "fgd attention", "hinton softmax", "hinton sigmoid", "dkd target"),
    *("dkd others", "yao target", "yao others", "crosskd, bckd", "crosskd beta", "bckd gap", "ld", "defeat", "fgfi"),
    *("gid relation", "fkd norm"),
]


def test_zero_at_equality_and_a_gradient_elsewhere():
    student, teacher = maps(4, SHAPE)
    equal, apart = jitted(teacher, teacher), jitted(student, teacher)
    # One forward derivative shows the slope of all at once; convolutions have a rule for the backward one alone.
    convolved = ("fgd relation", "mgd", "fkd non-local")

    def simple(s):
        return {name: value for name, value in every(s, teacher).items() if name not in convolved}

    _, slopes = quick_jit(lambda s, direction: jax.jvp(simple, (s,), (direction,)))(student, maps(5, SHAPE)[0])
    summed = quick_jit(jax.jacrev(lambda s: {name: jnp.sum(jnp.square(every(s, teacher)[name])) for name in convolved}))
    slopes |= summed(student)
    for name in ZERO_AT_EQUALITY:
        np.testing.assert_allclose(equal[name], 0, atol=2e-6, err_msg=name)
        assert float(jnp.max(jnp.abs(apart[name]))) > 1e-6, name
    for name, slope in slopes.items():
        selection = name in ("rm boxes", "gid instances")
        assert (float(jnp.max(jnp.abs(slope))) > 0) != selection, name


def test_nonnegative():
    student, teacher = maps(5, SHAPE)
    for name, value in jitted(student, teacher).items():
        if name in ZERO_AT_EQUALITY:
            assert float(value.min()) > -1e-6, name


@pytest.mark.parametrize(
    ("loss", "arrays"),
    [
        (distance.frobenius, 2), (similarity.ssim, 2), (similarity.structural_dissimilarity, 2),
        (divergence.softmax_kl, 2), (divergence.sigmoid_kl, 2), (classification.modulated_bce, 2),
        (disagreement.score_gap, 2), (attention.attention_weighted, 2),
        (attention.attention_difference, 2), (disagreement.class_disagreement, 2), (distance.guided_squared, 3),
        (normalization.match_statistics, 2), (divergence.decoupled_kl, 3), (divergence.decoupled_sigmoid_kl, 3),
        (divergence.rank_kl, 4),
    ],
)  # fmt: skip
def test_shapes_that_differ_are_refused(loss, arrays):
    student, teacher = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 2, 2, 1), np.float32)
    options = {"boxes": 1} if loss is divergence.rank_kl else {}
    with pytest.raises(UserError, match="shape"):
        loss(student, teacher, *[student] * (arrays - 2), **options)
