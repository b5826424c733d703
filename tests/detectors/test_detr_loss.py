"""The losses of transformers: slow NumPy, and what must not change them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.boxes import edges
from kdjax.detectors import detr_loss
from kdjax.errors import UserError
from tests.support.arrays import DEVICES, quick_jit
from tests.support.boxes import slow_iou
from tests.support.queries import (
    BINS,
    CLASSES,
    LAYERS,
    NUMBER,
    QUERIES,
    SIZE,
    reordered,
    soiled,
    some_output,
    some_targets,
)

OBJECTS = 6
COUNTS = (2, 0, 4, 1, 1, 0, 3, 2)  # one image for each device
KINDS = {"rt_detr": detr_loss.rt_detr_terms, "d_fine": detr_loss.d_fine_terms}
assign = detr_loss.assigner(CLASSES, num_denoising=NUMBER)


@functools.cache
def program(kind):
    """The assignment, the terms, and the gradient of their sum at the outputs."""

    def run(output, targets, key):
        assignment = assign(output, targets, key)

        def total(output):
            terms = KINDS[kind](output, targets, assignment)
            return sum(map(jnp.sum, jax.tree.leaves(terms))), terms

        (_, terms), slope = jax.value_and_grad(total, has_aux=True, allow_int=True)(output)
        return assignment, terms, slope

    return quick_jit(run)


def case(kind, counts=COUNTS, seed=0):
    output = some_output(seed, len(counts), OBJECTS, d_fine=kind == "d_fine")
    return output, some_targets(seed, list(counts), OBJECTS)


def run(kind, output, targets, seed=0):
    return program(kind)(output, targets, jax.random.key(seed))


def overlap(boxes, wanted):
    corners = [np.concatenate([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2]) for x in (boxes, wanted)]
    return slow_iou(*corners), slow_iou(*corners, "giou")


def slow(outputs, of_class, of_box, targets, live):
    """Sums of the classes, of L1 and of GIoU of each output, row by row: matched objects i32[S, B, Q] of both kinds."""
    sums = np.zeros((3, len(outputs)))
    shares = np.float64(targets.boxes) / ([SIZE[1], SIZE[0]] * 2)
    truth = np.concatenate([(shares[..., :2] + shares[..., 2:]) / 2, shares[..., 2:] - shares[..., :2]], -1)
    for s, queries in enumerate(outputs):
        for b, q in np.ndindex(queries.boxes.shape[:2]):
            if not live[q]:
                continue
            box, m = np.float64(queries.boxes[b, q]), of_class[s][b, q]
            for c in range(CLASSES):
                x = np.float64(queries.logits[b, q, c])
                p, here = 1 / (1 + np.exp(-x)), m >= 0 and targets.labels[b, m] == c
                t = overlap(box, truth[b, m])[0] if here else 0.0
                weight = t if here else 0.75 * p**2
                sums[0, s] -= weight * (t * np.log(p) + (1 - t) * np.log(1 - p))
            if (m := of_box[s][b, q]) >= 0:
                sums[1, s] += np.abs(box - truth[b, m]).sum()
                sums[2, s] += 1 - overlap(box, truth[b, m])[1]
    return sums * np.array([[1], [5], [2]])


distance_of = quick_jit(edges.edge_distance)


def slow_edges(layers, matched, targets, live, balance):
    """FGL's sums and DDF of each layer."""
    bins, found = np.float64(quick_jit(lambda: edges.edge_bins(BINS))()), np.zeros((2, len(layers)))
    softmax = lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    shares = targets.boxes / np.float32([SIZE[1], SIZE[0]] * 2)
    truth = np.concatenate([(shares[..., :2] + shares[..., 2:]) / 2, shares[..., 2:] - shares[..., :2]], -1)
    for s, layer in enumerate(layers):
        groups = ([], [])
        for b, q in np.ndindex(layer.boxes.shape[:2]):
            if not live[q]:
                continue
            m, corners, last = matched[b, q], np.float64(layer.corners[b, q]), np.float64(layers[-1].corners[b, q])
            quality = overlap(np.float64(layer.boxes[b, q]), np.float64(truth[b, m]))[0] if m >= 0 else None
            best = 1 / (1 + np.exp(-layers[-1].logits[b, q].max()))
            if m >= 0:
                distance = np.asarray(distance_of(layer.reference[b, q], truth[b, m]))
                for edge in range(4):
                    hat = [np.interp(distance[edge], bins, unit) for unit in np.eye(BINS + 1)]
                    found[0, s] -= quality * np.dot(hat, np.log(softmax(corners[edge])))
            for edge in range(4):
                p, r = softmax(last[edge] / 5), softmax(corners[edge] / 5)
                apart = 25 * np.sum(p * np.log(p / r))
                groups[int(m < 0)].append(apart * (quality if m >= 0 else best))
        found[1, s] = np.dot([np.mean(x) if x else 0 for x in groups], np.sqrt(balance)) / np.sqrt(balance).sum()
    return found * np.array([[0.15], [1.5]])


def each_matched(assignment):
    """i32[S, B, Q], the object of each query."""
    found = np.full((*assignment.queries.shape[:2], QUERIES), -1)
    for s, b, m in np.ndindex(assignment.queries.shape):
        if assignment.queries[s, b, m] >= 0:
            found[s, b, assignment.queries[s, b, m]] = m
    return found


def test_rt_detr_is_the_formula():
    output, targets = case("rt_detr")
    assignment, terms, _ = jax.tree.map(np.asarray, run("rt_detr", output, targets))
    outputs, matched = detr_loss.outputs_of(output), each_matched(assignment)
    want = slow(outputs, matched, matched, targets, np.ones(QUERIES)) / sum(COUNTS)
    for name, values in zip(("cls", "l1", "giou"), want, strict=True):
        np.testing.assert_allclose(terms[name], values, rtol=1e-4)
    noised, layers = assignment.denoising, output.ask.args[0].layers
    same = [noised.matched] * LAYERS
    assert noised.groups == 1 and not noised.live.all()
    want = slow(layers, same, same, targets, noised.live) / sum(COUNTS)
    for name, values in zip(("dn_cls", "dn_l1", "dn_giou"), want, strict=True):
        np.testing.assert_allclose(terms[name], values, rtol=1e-4)


def test_d_fine_is_the_formula():
    output, targets = case("d_fine", counts=(2, 0, 3, 1, 1, 0, 3, 2))
    assignment, terms, _ = jax.tree.map(np.asarray, run("d_fine", output, targets))
    outputs, matched = detr_loss.outputs_of(output), each_matched(assignment)
    assert len(outputs) == LAYERS + 2
    union = np.full(matched.shape[1:], -1)
    for b, q in np.ndindex(union.shape):
        met = matched[:, b, q][matched[:, b, q] >= 0]
        union[b, q] = np.bincount(met).argmax() if len(met) else -1
    pairs = (union >= 0).sum()
    assert pairs > 5
    classes, l1, giou = slow(outputs, matched, [union] * len(outputs), targets, np.ones(QUERIES))
    balance = np.array([pairs, union.size - pairs])
    fgl, ddf = slow_edges(output.layers, union, targets, np.ones(QUERIES), balance)
    want = {"cls": classes / 12, "l1": l1 / pairs, "giou": giou / pairs, "fgl": fgl / pairs, "ddf": ddf}
    noised, decoded = assignment.denoising, output.ask.args[0]
    assert noised.groups == 2
    outputs, same = (*decoded.layers, decoded.first), [noised.matched] * (LAYERS + 1)
    classes, l1, giou = slow(outputs, same, same, targets, noised.live) / 24
    fgl, ddf = slow_edges(decoded.layers, noised.matched, targets, noised.live, balance)
    want |= {"dn_cls": classes, "dn_l1": l1, "dn_giou": giou, "dn_fgl": fgl / 24, "dn_ddf": ddf}
    assert set(terms) == set(want)
    for name, values in want.items():
        np.testing.assert_allclose(terms[name], values, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_order_of_objects_change_nothing(kind):
    output, targets = case(kind)
    _, terms, slope = run(kind, output, targets)
    # Which of two objects a query of D-FINE keeps, that it met equally often, hangs on their order.
    order = np.array([4, 0, 1, 5, 2, 3]) if kind == "d_fine" else np.random.default_rng(0).permutation(OBJECTS)
    for other in (soiled(targets), reordered(soiled(targets), order)):
        # The noise of denoising queries goes with the places.
        _, changed, slope_changed = run(kind, output, other)
        for name in terms:
            if not name.startswith("dn_"):
                np.testing.assert_allclose(changed[name], terms[name], rtol=1e-5, atol=1e-6)
        for layer, layer_changed in zip(slope.layers, slope_changed.layers, strict=True):
            chex.assert_trees_all_close(layer_changed, layer, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_objects(kind):
    output, targets = case(kind, counts=(0,) * 8)
    assignment, terms, slope = run(kind, output, targets)
    assert not assignment.positive.any() and (assignment.labels == CLASSES).all() and not assignment.boxes.any()
    for name, value in terms.items():
        assert np.isfinite(value).all() and (np.asarray(value) > 0).any() == (name in ("cls", "ddf")), name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope.layers))
    assert np.any(slope.layers[0].logits) and not np.any(slope.layers[0].boxes)


def test_what_is_perfect_has_no_box_loss_and_the_assignment_says_so():
    output, targets = case("rt_detr", counts=(4, 1, 3, 0, 0, 2, 2, 1))
    shares = targets.boxes / np.float32([SIZE[1], SIZE[0]] * 2)
    truth = np.concatenate([(shares[..., :2] + shares[..., 2:]) / 2, shares[..., 2:] - shares[..., :2]], -1)

    def perfect(queries):
        boxes, logits = queries.boxes.copy(), np.full_like(queries.logits, -4)
        boxes[:, 2 : 2 + OBJECTS] = np.where(targets.valid[..., None], truth, boxes[:, 2 : 2 + OBJECTS])
        logits[:, 2 : 2 + OBJECTS] += 9 * np.eye(CLASSES, dtype=np.float32)[targets.labels]
        return queries._replace(boxes=boxes, logits=logits)

    layers = tuple(map(perfect, output.layers))
    output = type(output)(**(vars(output) | {"layers": layers, "selected": perfect(output.selected)}))
    assignment, terms, _ = run("rt_detr", output, targets)
    np.testing.assert_allclose(terms["l1"], 0, atol=1e-5)
    np.testing.assert_allclose(terms["giou"], 0, atol=1e-5)
    index = np.arange(QUERIES) - 2
    want = np.where((index >= 0) & (index < np.array([4, 1, 3, 0, 0, 2, 2, 1])[:, None]), index, -1)
    np.testing.assert_array_equal(assignment.matched, want)
    np.testing.assert_array_equal(assignment.positive, want >= 0)
    np.testing.assert_allclose(assignment.quality, want >= 0, atol=1e-5)
    np.testing.assert_array_equal(assignment.boxes[0, 2:6], targets.boxes[0, :4])
    np.testing.assert_array_equal(assignment.labels[0, 2:6], targets.labels[0, :4])
    assert not assignment.ignore.any()


@pytest.mark.slow
def test_eight_devices_are_one():
    given = case("d_fine")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole, shards = run("d_fine", *given)[:2], run("d_fine", *jax.device_put(given, split))[:2]
    chex.assert_trees_all_close(shards, whole, rtol=1e-5, atol=1e-6)


def test_names_of_the_losses_and_the_need_of_a_key():
    output, targets = case("d_fine")
    with pytest.raises(UserError, match="pass a PRNG key"):
        detr_loss.assigner(CLASSES)(output, targets)
    without = jax.eval_shape(detr_loss.assigner(CLASSES, num_denoising=0), output, targets)
    assert without.denoising is None
    names = {"loss_cls", "loss_l1", "loss_giou"}
    assert set(jax.eval_shape(detr_loss.rt_detr_loss, output, targets, without)) == names
    edged = names | {"loss_fgl", "loss_ddf"}
    assert set(jax.eval_shape(detr_loss.d_fine_loss, output, targets, without)) == edged
    assignment, terms, _ = run("d_fine", output, targets)
    losses = jax.eval_shape(detr_loss.d_fine_loss, output, targets, assignment)
    assert set(losses) == edged | {name.replace("loss", "loss_dn") for name in edged} == {f"loss_{n}" for n in terms}
