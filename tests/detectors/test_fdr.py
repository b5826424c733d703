"""What D-FINE predicts of queries: which boxes its layers refine, and where gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.detectors import api, fdr
from tests.support.arrays import quick_jit

CLASSES = 3
HEADS = api.pure(lambda: fdr.EdgeHeads(CLASSES, 8, 2, fdr.Bins(8, 0.5, 4.0)))


def refined(params, states, reference):
    """What the heads say of the states of two layers, and the first boxes."""

    def inside(heads):
        first, carry = heads.refine(0, states[0], heads.start(reference))
        second, carry = heads.refine(1, states[1], carry)
        return first, second, heads.first(carry)

    return HEADS.call(params, {}, inside)[0]


@functools.cache
def drawn():
    """Random parameters, the states of two layers, and where the queries begin."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), HEADS.shapes[0])
    states = jnp.asarray(rng.normal(size=(2, 1, 5, 8)), jnp.float32)
    return params, states, jnp.asarray(rng.uniform(0.2, 0.6, (1, 5, 4)), jnp.float32)


def perceptron(params, x):
    layers = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def test_layers_refine_the_edges_of_the_first_boxes():
    """Every number in NumPy from the formulas of the paper."""
    *layers, first = quick_jit(refined)(*drawn())
    params, states, reference = jax.tree.map(np.asarray, drawn())
    logit = perceptron(params["pre_bbox_head"], states[0]) + np.log(reference / (1 - reference))
    start = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(first.boxes, start, rtol=1e-5)
    step = 3 ** (2 / 6)  # up * scale + 1 = 3 with six steps between the second bins from either end
    right = [step**i - 1 for i in range(1, 4)]
    bins = np.array([-4, *(-x for x in right[::-1]), 0, *right, 4])
    corners = 0
    for i, layer in enumerate(layers):
        both = states[i] + (states[i - 1] if i else 0)
        corners = corners + perceptron(params["bbox_embed"][str(i)], both).reshape(1, 5, 4, 9)
        np.testing.assert_allclose(layer.corners, corners, rtol=1e-4, atol=1e-4)
        probs = np.exp(corners) / np.exp(corners).sum(-1, keepdims=True)
        left, top, rest, bottom = np.moveaxis((probs * bins).sum(-1), -1, 0)
        x, y, w, h = np.moveaxis(start, -1, 0)
        low_x, low_y, high_x, high_y = x - (2 + left) * w / 4, y - (2 + top) * h / 4, 0, 0
        high_x, high_y = x + (2 + rest) * w / 4, y + (2 + bottom) * h / 4
        want = np.stack([(low_x + high_x) / 2, (low_y + high_y) / 2, high_x - low_x, high_y - low_y], -1)
        np.testing.assert_allclose(layer.boxes, want, rtol=1e-3, atol=1e-5)
        best = -np.sort(-probs, -1)[..., :4]
        told = np.concatenate([best, best.mean(-1, keepdims=True)], -1).reshape(1, 5, 20)
        classes = params["class_embed"][str(i)]
        want = states[i] @ classes["kernel"] + classes["bias"]
        want = want + perceptron(params["lqe_layers"][str(i)]["reg_conf"], told)
        np.testing.assert_allclose(layer.logits, want, rtol=1e-3, atol=1e-3)


def test_gradients_stop_at_the_first_boxes_and_at_the_states_before():
    params, states, reference = drawn()
    of_second = lambda params, states: jnp.sum(refined(params, states, reference)[1].boxes ** 2)  # noqa: E731
    gradient = quick_jit(jax.grad(of_second, (0, 1)))
    of_params, of_states = gradient(params, states)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_params["pre_bbox_head"]))
    # The second boxes see the first states through the distributions of the first layer, which are passed on.
    assert of_states[0].any() and of_states[1].any() and of_params["bbox_embed"]["0"]["layers"]["0"]["kernel"].any()
    silent = params["bbox_embed"] | {"0": jax.tree.map(jnp.zeros_like, params["bbox_embed"]["0"])}
    _, of_states = gradient(params | {"bbox_embed": silent}, states)
    assert not of_states[0].any() and of_states[1].any()


def test_at_first_boxes_stay_where_the_queries_begin():
    _, states, reference = drawn()
    for queries in quick_jit(refined)(HEADS.init(jax.random.key(0))[0], states, reference):
        np.testing.assert_allclose(queries.boxes, reference, rtol=1e-4)
