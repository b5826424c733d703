"""The parts of detection transformers: who sees whom, where gradients go, what weights begin with."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.detectors import api, query_decoder, transformer
from kdjax.detectors.query_decoder import BoxHeads, Decoder
from kdjax.structs import Asked
from tests.support.arrays import quick_jit

CLASSES, CHANNELS, QUERIES, LAYERS = 3, 8, 5, 2
SHAPES = ((6, 8), (3, 4))


def construct(layers=LAYERS, **of_layer):
    return Decoder(
        CLASSES,
        CHANNELS,
        layers=layers,
        queries=QUERIES,
        heads=2,
        hidden=12,
        points=(2, 2),
        predict=lambda: BoxHeads(CLASSES, CHANNELS, layers),
        **of_layer,
    )


MODULE = api.pure(construct)


@functools.cache
def params():
    """Random ones, also where the initial values are 0."""
    rng = np.random.default_rng(3)
    flat = api.flatten(MODULE.init(jax.random.key(0))[0])
    return api.unflatten({k: v + 0.3 * rng.normal(size=v.shape).astype(np.float32) for k, v in flat.items()})


@functools.cache
def maps(batch=2):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(batch, *shape, CHANNELS)), jnp.float32) for shape in SHAPES)


def asked(count=4, seed=1, **fields):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0.2, 0.8, (2, count, 2)), rng.uniform(0.05, 0.4, (2, count, 2))], -1)
    labels = rng.integers(0, CLASSES + 1, (2, count)).astype(np.int32)
    return Asked(**dict(boxes=boxes.astype(np.float32), labels=labels) | fields)


@functools.cache
def run():
    return quick_jit(lambda params, maps: MODULE.call(params, {}, Decoder.__call__, maps)[0])


@functools.cache
def ask(sees_own=True):
    def answer(params, known, boxes, labels, blocked):
        return MODULE.call(params, {}, Decoder.ask, known, Asked(boxes, labels, blocked, sees_own))[0]

    return quick_jit(answer)


@functools.cache
def known():
    return run()(params(), maps())[2]


def answer(asked: Asked, of=None):
    return ask(asked.sees_own)(params(), of or known(), asked.boxes, asked.labels, asked.blocked)


GROUPS = np.array([0, 0, 1, 1])
APART = GROUPS[:, None] != GROUPS


def test_asking_is_one_decoder_over_all_queries():
    """The papers run one decoder with a mask; its own queries come last."""
    further, values = asked(blocked=APART), known().values

    def joint(module):
        chosen = module.select(maps())
        content = jnp.concatenate([module.denoising_class_embed(further.labels), chosen.content], 1)
        reference = jnp.concatenate([further.boxes, chosen.queries.boxes], 1)
        blocked = np.zeros((4 + QUERIES,) * 2, bool)
        blocked[:4, :4], blocked[4:, :4] = APART, True
        return module._run(content, reference, values, SHAPES, (), jnp.asarray(blocked))[0]

    whole = quick_jit(lambda params: MODULE.call(params, {}, joint)[0])(params())
    own, apart = run()(params(), maps())[0], answer(further)
    for both, one, other in zip(whole.layers, apart.layers, own.layers, strict=True):
        for field in ("logits", "boxes", "hidden"):
            parts = [getattr(part, field) for part in (one, other)]
            np.testing.assert_allclose(getattr(both, field), np.concatenate(parts, 1), atol=2e-6)


def test_groups_do_not_see_each_other():
    first = answer(asked(blocked=APART))
    moved = asked(blocked=APART)
    moved.boxes[:, 2:] += 0.1
    second = answer(moved)
    chex.assert_trees_all_equal(first.layers[-1].logits[:, :2], second.layers[-1].logits[:, :2])
    assert not np.allclose(first.layers[-1].logits[:, 2:], second.layers[-1].logits[:, 2:])


def test_an_image_may_have_groups_of_its_own():
    together = answer(asked(blocked=np.stack([APART, np.zeros_like(APART)])))
    for image, blocked in enumerate((APART, np.zeros_like(APART))):
        np.testing.assert_allclose(
            together.layers[-1].boxes[image], answer(asked(blocked=blocked)).layers[-1].boxes[image], atol=1e-6
        )


def test_the_order_of_further_queries_is_theirs_alone():
    order = np.array([2, 0, 3, 1])
    given = asked()
    turned = answer(given._replace(boxes=given.boxes[:, order], labels=given.labels[:, order]))
    for one, other in zip(answer(given).layers, turned.layers, strict=True):
        np.testing.assert_allclose(one.boxes[:, order], other.boxes, atol=1e-6)


def test_further_queries_see_the_own_ones_unless_told_otherwise():
    other = known()._replace(seen=tuple((keys + 1, values - 1) for keys, values in known().seen))
    assert not np.allclose(answer(asked()).layers[-1].logits, answer(asked(), other).layers[-1].logits)
    alone = asked(sees_own=False)
    chex.assert_trees_all_equal(answer(alone).layers[-1].logits, answer(alone, other).layers[-1].logits)


def test_queries_without_labels_begin_as_the_cells_at_their_centres():
    """About the boxes of its own queries, which are anchors here, the decoder says what it says of its own queries."""
    flat = api.flatten(params())
    fixed = api.unflatten(flat | {k: 0 * v for k, v in flat.items() if k.startswith("enc_bbox_head/layers/2")})
    decoded, chosen, known = run()(fixed, maps())
    assert query_decoder.grid_anchors(SHAPES)[1][chosen.index].all()
    found = ask(sees_own=False)(fixed, known, chosen.queries.boxes, None, None)
    chex.assert_trees_all_close(found.layers, decoded.layers, atol=1e-5)


def test_a_box_sends_gradient_one_layer_back():
    """Look forward twice: through the box of the layer before it, not through the one before that."""
    heads = api.pure(lambda: BoxHeads(CLASSES, CHANNELS, 3))
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(3, 1, 2, CHANNELS)), jnp.float32)
    start = api.unflatten({k: rng.normal(size=v.shape) for k, v in api.flatten(heads.shapes[0]).items()})
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)

    def total(params, layer):
        def whole(module):
            carry = module.start(jnp.full((1, 2, 4), 0.4))
            for i in range(layer + 1):
                found, carry = module.refine(i, states[i], carry)
            return jnp.sum(found.boxes**2)

        return heads.call(params, {}, whole)[0]

    for layer, reached in ((0, {0}), (1, {0, 1}), (2, {1, 2})):
        gradient = jax.grad(total)(start, layer)["bbox_embed"]
        assert {i for i in range(3) if np.any(gradient[str(i)]["layers"]["2"]["kernel"])} == reached, layer


@functools.cache
def gradients():
    """Largest entries of the gradient of boxes: of the last layer, of the selection, of the answer about no class."""

    def totals(params):
        decoded, chosen, known = MODULE.call(params, {}, Decoder.__call__, maps())[0]
        further = asked(labels=np.full((2, 4), CLASSES, np.int32))
        answered = MODULE.call(params, {}, Decoder.ask, known, further)[0]
        parts = decoded.layers[-1], chosen.queries, answered.layers[-1]
        return jnp.stack([jnp.sum(part.boxes**2) for part in parts])

    flat = api.flatten(quick_jit(jax.jacrev(totals))(params()))
    largest = {k: np.abs(v).reshape(3, -1).max(1) for k, v in flat.items()}
    return [{k: float(v[i]) for k, v in largest.items()} for i in range(3)]


def test_queries_begin_without_gradient():
    last, selected, _ = gradients()
    assert last["enc_bbox_head/layers/2/kernel"] == 0 and last["enc_output/0/kernel"] == 0
    assert selected["enc_bbox_head/layers/2/kernel"] > 0 and selected["enc_output/0/kernel"] > 0
    assert last["layers/0/encoder_attn/value_proj/kernel"] > 0


def test_the_state_of_no_class_is_not_learned():
    answered = gradients()[2]
    assert answered["denoising_class_embed/kernel"] == 0 < answered["query_pos_head/layers/0/kernel"]


def test_the_start_is_the_anchors_and_rare_classes():
    start = MODULE.init(jax.random.key(1))[0]
    decoded, chosen, _ = run()(start, maps())
    anchors, _ = query_decoder.grid_anchors(SHAPES)
    np.testing.assert_allclose(chosen.queries.boxes, jax.nn.sigmoid(anchors[chosen.index]), atol=1e-6)
    np.testing.assert_allclose(decoded.layers[-1].boxes, chosen.queries.boxes, atol=1e-5)
    assert 0.003 < float(jax.nn.sigmoid(decoded.layers[-1].logits).mean()) < 0.03
    assert not np.any(start["denoising_class_embed"]["kernel"][:, -1])


def test_selection_takes_the_best_cells_in_order():
    _, chosen, _ = run()(params(), maps())
    best = np.sort(chosen.scores.max(-1), 1)[:, ::-1][:, :QUERIES]
    np.testing.assert_array_equal(chosen.queries.logits.max(-1), best)


def test_fewer_layers_are_the_first_ones():
    whole = run()(params(), maps())[0]
    short = quick_jit(lambda params: MODULE.call(params, {}, Decoder.__call__, maps(), 2)[0][0])(params())
    assert len(short.layers) == 2
    chex.assert_trees_all_close(short.layers, whole.layers[:2], atol=1e-6)


def test_invalid_anchors_score_alike_and_stand_for_the_whole_image():
    shapes = ((50, 50),)
    anchors, valid = query_decoder.grid_anchors(shapes)
    assert not valid[0] and valid[51] and valid.sum() == 48**2
    assert np.all(1 / (1 + np.exp(-anchors[0].astype(np.float64))) == 1)
    cells = (jnp.asarray(np.random.default_rng(0).normal(size=(1, 50, 50, CHANNELS)), jnp.float32),)
    scores = MODULE.call(params(), {}, lambda module: module.select(cells).scores)[0]
    assert np.unique(np.asarray(scores)[0, ~valid], axis=0).shape[0] == 1


def test_attention_is_a_weighted_mean_over_what_is_not_blocked():
    rng = np.random.default_rng(0)
    attention = api.pure(lambda: transformer.Attention(4, 2))
    weights = attention.init(jax.random.key(0))[0]
    queries, keys = (jnp.asarray(rng.normal(size=(1, n, 4)), jnp.float32) for n in (2, 3))
    blocked = np.array([[False, True, False], [True, True, False]])

    def whole(module):
        return module(queries, *module.project(keys, keys), blocked)

    found = attention.call(weights, {}, whole)[0]
    of = {name: np.asarray(part["kernel"]) for name, part in weights.items()}
    q, k, v = queries[0] @ of["q_proj"], keys[0] @ of["k_proj"], keys[0] @ of["v_proj"]
    rows = []
    for i, free in enumerate(~blocked):
        heads = []
        for h in (slice(0, 2), slice(2, 4)):
            share = np.exp(k[free, h] @ q[i, h] / np.sqrt(2))
            heads.append(share @ v[free, h] / share.sum())
        rows.append(np.concatenate(heads) @ of["out_proj"])
    np.testing.assert_allclose(found[0], rows, atol=1e-6)


def test_heads_look_around():
    offsets = transformer.directions(4, (2, 1))(np.random.default_rng(0), (24,)).reshape(4, 3, 2)
    np.testing.assert_allclose(offsets[0], [[1, 0], [2, 0], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(offsets[1, 1], [0, 2], atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_without_projections_the_maps_are_sampled_as_they_are(gated):
    module = api.pure(lambda: construct(layers=1, gated=gated, projected=False))
    names = api.flatten(module.shapes[0])
    assert not any("value_proj" in name or "output_proj" in name for name in names)
    assert any("gateway" in name for name in names) == gated
    _, _, known = module.call(module.init(jax.random.key(0))[0], {}, Decoder.__call__, maps())[0]
    np.testing.assert_array_equal(known.values[0].reshape(2, -1, CHANNELS)[:, :48], maps()[0].reshape(2, 48, CHANNELS))
