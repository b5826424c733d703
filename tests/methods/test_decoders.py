"""Methods between the decoders of two transformers, on random layers and a made-up decoder that can be asked."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from kdjax import methods
from kdjax.boxes import edges
from kdjax.distill import Distiller, queries
from kdjax.errors import UserError
from kdjax.methods.detrdistill import attention
from kdjax.structs import Decoded, Queries
from tests.methods.test_matrix import network
from tests.methods.test_queries import BATCH, OBJECTS, STUDENT, TARGETS, batch_of, detector, grid
from tests.support.arrays import quick_jit
from tests.support.queries import CLASSES, SIZE, some_output

RNG = np.random.default_rng(5)
MATRICES = {
    who: [RNG.normal(size=(4, CLASSES + 4)).astype(np.float32) for _ in range(n)] for who, n in (("s", 2), ("t", 3))
}


def answer(matrices, asked):
    """Of each layer: what matrices make of the box, and of the mean box of those that the query sees."""
    count = asked.boxes.shape[1]
    seen = jnp.ones((count, count), bool) if asked.blocked is None else ~jnp.asarray(asked.blocked)
    boxes = asked.boxes + (seen @ asked.boxes) / jnp.sum(seen, -1, keepdims=True)
    found = [jnp.matmul(boxes, m, precision="highest") for m in matrices]
    return Decoded(tuple(Queries(x[..., :CLASSES], jax.nn.sigmoid(x[..., CLASSES:])) for x in found))


def asked_output(who: str, seed: int):
    output = some_output(seed, BATCH, OBJECTS)
    count = len(MATRICES[who])
    return dataclasses.replace(output, layers=output.layers[:count], ask=jax.tree_util.Partial(answer, MATRICES[who]))


def term_sums(made: Distiller, student, observed):
    return made.terms(
        {name: {} for name in made.methods}, student, batch_of(), observed=observed, key=jax.random.key(3)
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def giou(a, b) -> float:
    a, b = (np.concatenate([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2]) for x in (a, b))
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - np.prod(sides)
    around = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return np.prod(sides) / union - (around - union) / around


def test_layers_meet_at_the_same_depth():
    for of_student, of_teacher, wanted in (
        (3, 3, [0, 1, 2]),
        (3, 6, [1, 3, 5]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (1, 4, [3]),
    ):
        pairs = queries.layer_pairs(
            [Queries(i, i) for i in range(of_student)], [Queries(i, i) for i in range(of_teacher)]
        )
        assert [s.boxes for s, _ in pairs] == list(range(of_student)) and len(wanted) == of_student
        assert [t.boxes for _, t in pairs][-1] == of_teacher - 1
        if of_student <= of_teacher:
            assert [t.boxes for _, t in pairs] == wanted


@pytest.mark.parametrize("counts", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_pairs_are_those_of_scipy(counts):
    s, t = (
        jax.tree.map(lambda x, n=n: x[:, :n], some_output(seed, BATCH, OBJECTS).layers[0])
        for seed, n in zip((0, 1), counts, strict=True)
    )
    found = quick_jit(lambda s, t: (queries.cost(s, t), *queries.one_to_one(queries.cost(s, t))))(s, t)
    for image in range(BATCH):
        cost, i, j = (np.asarray(part[image]) for part in found)
        for a, b in np.ndindex(*counts):
            p = sigmoid(t.logits[image, b])
            q = sigmoid(s.logits[image, a])
            entropy = -np.sum(p * np.log(q) + (1 - p) * np.log(1 - q))
            apart = np.abs(s.boxes[image, a] - t.boxes[image, b]).sum()
            assert cost[a, b] == pytest.approx(
                entropy + 5 * apart - 2 * giou(s.boxes[image, a], t.boxes[image, b]), rel=1e-4
            )
        rows, columns = linear_sum_assignment(cost)
        assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(zip(rows.tolist(), columns.tolist(), strict=True))


def test_kd_detr_is_its_formula():
    """Of the specific queries alone, against a loop."""
    student, teacher = asked_output("s", 0), asked_output("t", 1)
    made = Distiller(detector(student), detector(teacher), [methods.kd_detr(general=0)])
    found = jax.device_get(quick_jit(lambda s, t: term_sums(made, s, t))(student, teacher))
    wanted = dict.fromkeys(found, 0.0)
    boxes = teacher.selected.boxes
    seen = boxes + boxes.mean(1, keepdims=True)
    for of_student, of_teacher in ((0, 1), (1, 2)):  # three layers by two: of depth 2 of 3, and the last
        s, t = seen @ MATRICES["s"][of_student], seen @ MATRICES["t"][of_teacher]
        p, q = sigmoid(t[..., :CLASSES]), sigmoid(s[..., :CLASSES])
        w = p.max(-1)
        kl = np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), -1)
        a, b = sigmoid(s[..., CLASSES:]), sigmoid(t[..., CLASSES:])
        apart = [[1 - giou(a[i, j], b[i, j]) for j in range(w.shape[1])] for i in range(len(w))]
        for name, rows in (("classes", kl), ("l1", np.abs(a - b).sum(-1)), ("giou", np.array(apart))):
            wanted[f"kd_detr/{name}"] += float((w * rows).sum() / w.sum())
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in wanted.items()}
    assert dict(made.weights(0)) == {"kd_detr/classes": 1, "kd_detr/l1": 5, "kd_detr/giou": 2}


def test_kd_detr_of_equal_models_is_nothing_and_the_teacher_learns_nothing():
    student, teacher = asked_output("s", 0), asked_output("t", 1)
    made = Distiller(detector(student), detector(teacher), [methods.kd_detr(general=9)])
    other = np.random.default_rng(0).permutation(teacher.selected.boxes.shape[1])

    @quick_jit
    def values(student, teacher):
        shuffled = dataclasses.replace(teacher, selected=jax.tree.map(lambda x: x[:, other], teacher.selected))
        total = lambda s, t: sum(term_sums(made, s, t).values())  # noqa: E731
        equal = jax.value_and_grad(total)(student, student)
        return equal, jax.value_and_grad(total, (0, 1))(student, teacher), total(student, shuffled)

    (nothing, gradient), (value, (of_student, of_teacher)), shuffled = jax.device_get(values(student, teacher))
    assert nothing == pytest.approx(0, abs=1e-5)
    assert all(np.max(np.abs(g), initial=0) < 1e-5 for g in jax.tree.leaves(gradient))
    assert value > 0 and any(np.any(g) for g in jax.tree.leaves(of_student.ask))
    assert not any(np.any(g) for g in jax.tree.leaves(of_teacher))
    assert shuffled == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("cells", [300, 32])
def test_kd_detr_asks_about_the_cells_of_a_dense_student(cells, monkeypatch):
    """Against a loop; queries see those that are asked with them, and of padding nothing."""
    monkeypatch.setattr(sys.modules["kdjax.methods.kd_detr"], "CELLS", cells)
    (student, of_grid), teacher = grid(0), asked_output("t", 1)
    made = Distiller(of_grid, detector(teacher), [methods.kd_detr(dense=True)])
    value = lambda s, t: term_sums(made, s, t)  # noqa: E731

    @quick_jit
    def compute(student, teacher):
        found, pull = jax.vjp(value, student, teacher)
        return found, pull(dict.fromkeys(found, 1.0))

    found, (of_student, of_teacher) = jax.device_get(compute(student, teacher))
    rows, sides = of_grid.rows(student), np.array([SIZE[1], SIZE[0]] * 2)
    boxes = np.clip(np.asarray(rows.location) * [1, 1, 4, 4] / sides, 0, 1)
    pieces = [boxes[i : i + cells] for i in range(0, len(boxes), cells)]
    said = np.concatenate([(piece + piece.mean(0)) @ MATRICES["t"][-1] for piece in pieces])
    p, b = sigmoid(said[:, :CLASSES]), sigmoid(said[:, CLASSES:])
    q, a = sigmoid(rows.logits), np.asarray(rows.boxes) / sides
    a = np.concatenate([(a[..., :2] + a[..., 2:]) / 2, a[..., 2:] - a[..., :2]], -1)
    w = np.tile(p.max(-1), (BATCH, 1))
    apart = np.array([[1 - giou(x, y) for x, y in zip(image, b, strict=True)] for image in a])
    kl = np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), -1)
    for name, values in (("classes", kl), ("l1", np.abs(a - b).sum(-1)), ("giou", apart)):
        assert found[f"kd_detr/{name}"] == pytest.approx((w * values).sum() / w.sum(), rel=1e-4), name
    assert any(np.any(leaf) for leaf in jax.tree.leaves(of_student.cls_logits))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


def test_kd_detr_asks_once_about_the_anchors_of_a_cell():
    asked = []

    def spy(matrices, given):
        asked.append(given.boxes.shape)
        return answer(matrices, given)

    teacher = dataclasses.replace(asked_output("t", 1), ask=jax.tree_util.Partial(spy, MATRICES["t"]))
    student = network("retinanet", False)
    made = Distiller(student, detector(teacher), [methods.kd_detr(dense=True)])
    location = student.priors(SIZE).reshape(-1, 9, 4)
    assert np.all(location == location[:, :1])
    spec = dataclasses.replace(student.spec(SIZE), rows=None)
    jax.eval_shape(
        lambda output: term_sums(made, output, teacher),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype), spec),
    )
    assert asked == [(BATCH, len(location), 4)]


def test_kd_detr_draws_boxes_and_keeps_groups_apart():
    asked = []

    def spy(matrices, given):
        asked.append(given)
        return answer(matrices, given)

    student = dataclasses.replace(asked_output("s", 0), ask=jax.tree_util.Partial(spy, MATRICES["s"]))
    teacher = asked_output("t", 1)
    made = Distiller(detector(student), detector(teacher), [methods.kd_detr(general=500)])
    for key in (3, 3, 4):
        made.terms({"kd_detr": {}}, student, batch_of(), observed=teacher, key=jax.random.key(key))
    first, again, later = asked
    own = teacher.selected.boxes.shape[1]
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert np.all(first.boxes[:, :own] == teacher.selected.boxes) and np.any(
        first.boxes[:, own:] != later.boxes[:, own:]
    )
    drawn = np.asarray(first.boxes[:, own:])
    assert 0 <= drawn[..., :2].min() < 0.01 and 0.99 < drawn[..., :2].max() <= 1
    assert 0.05 <= drawn[..., 2:].min() < 0.052 and 0.58 < drawn[..., 2:].max() <= 0.6
    assert np.median(drawn[..., 2:]) == pytest.approx(np.sqrt(0.05 * 0.6), rel=0.1)  # log-uniform
    groups = np.arange(own + 500) < own
    np.testing.assert_array_equal(first.blocked, groups[:, None] != groups)
    assert not first.sees_own and first.labels is None


D_FINE = some_output(0, BATCH, OBJECTS, d_fine=True)
SETTINGS = {"scale": 3.0, "up": 0.6}


def test_go_lsd_moves_edges_to_those_of_the_teacher():
    """Where the distributions are the targets, the student learns nothing, and they stand for the teacher's boxes."""
    teacher = some_output(1, BATCH, OBJECTS)
    made = Distiller(detector(D_FINE), detector(teacher), [methods.go_lsd(**SETTINGS)])
    order = np.random.default_rng(0).permutation(teacher.layers[-1].boxes.shape[1])
    bins = edges.edge_bins(D_FINE.layers[0].corners.shape[-1] - 1, **SETTINGS)

    def learned(layer: Queries, last: Queries) -> Queries:
        """The layer with the target of each query as its distributions."""
        i, j = queries.one_to_one(queries.cost(layer, last))
        partner = jnp.take_along_axis(j, jnp.argsort(i, 1), 1)
        target = edges.edge_distance(layer.reference, queries.taken(last, partner).boxes, scale=3.0)
        left, weight = edges.nearest_bins(target, bins)
        index = jnp.arange(len(bins))
        share = jnp.where(index == left[..., None], 1 - weight[..., None], 0.0)
        share = jnp.where(index == left[..., None] + 1, weight[..., None], share)
        return layer._replace(corners=jnp.log(jnp.maximum(share, 1e-30)))

    @quick_jit
    def values(student, teacher):
        total = lambda s, t: term_sums(made, s, t)["go_lsd/edges"]  # noqa: E731
        shuffled = dataclasses.replace(teacher, layers=jax.tree.map(lambda x: x[:, order], teacher.layers))
        silent = dataclasses.replace(
            teacher, layers=jax.tree.map(lambda x: x, tuple(q._replace(logits=q.logits - 40) for q in teacher.layers))
        )
        layers = tuple(learned(layer, teacher.layers[-1]) for layer in student.layers)
        taught = dataclasses.replace(student, layers=layers)
        return (
            jax.value_and_grad(total, (0, 1))(student, teacher),
            total(student, shuffled),
            total(student, silent),
            jax.grad(total)(taught, teacher).layers,
            layers,
        )

    (value, (of_student, of_teacher)), shuffled, silent, taught, layers = jax.device_get(values(D_FINE, teacher))
    assert value > 0 and shuffled == pytest.approx(float(value), rel=1e-5) and 0 <= silent < 1e-6
    assert all(np.any(layer.corners) and not np.any(layer.reference) for layer in of_student.layers)
    assert not any(np.any(g) for g in jax.tree.leaves(of_teacher))
    assert all(np.max(np.abs(layer.corners)) < 1e-6 for layer in taught)
    moved = edges.expected_edges(layers[0].corners, bins)
    inside = np.abs(moved) < float(bins[-1]) * 0.999
    boxes = edges.edges_to_boxes(layers[0].reference, moved, scale=3.0)
    i, j = jax.device_get(queries.one_to_one(queries.cost(D_FINE.layers[0], teacher.layers[-1])))
    kept = 0
    for image in range(BATCH):
        for a, b in zip(i[image], j[image], strict=True):
            if np.all(inside[image, a]):
                kept += 1
                np.testing.assert_allclose(boxes[image, a], teacher.layers[-1].boxes[image, b], atol=2e-5)
    assert kept > 3


WIDTH = 6


def with_states(who: str, seed: int):
    """With states of the queries, and maps as wide as they are."""
    output, rng = asked_output(who, seed), np.random.default_rng(seed)
    hidden = lambda q: q._replace(hidden=rng.normal(size=(*q.boxes.shape[:2], WIDTH)).astype(np.float32))  # noqa: E731
    maps = rng.normal(size=(BATCH, SIZE[0] // 8, SIZE[1] // 8, WIDTH)).astype(np.float32)
    return dataclasses.replace(output, layers=tuple(map(hidden, output.layers)), neck=(maps,))


def test_detrdistill_learns_matched_predictions_and_the_teacher_learns_nothing():
    """Equal models have nothing to learn but the truth, in any order of the teacher's queries."""
    student, teacher = with_states("s", 0), with_states("t", 1)
    made = Distiller(detector(student), detector(teacher), [methods.detrdistill()])
    order = np.random.default_rng(0).permutation(teacher.layers[0].boxes.shape[1])
    names = ("classes", "l1", "giou", "features")

    @quick_jit
    def values(student, teacher):
        shuffled = dataclasses.replace(student, layers=jax.tree.map(lambda x: x[:, order], student.layers))

        def total(s, t, names=(*names, "prior")):
            terms = term_sums(made, s, t)
            return sum(terms[f"detrdistill/{name}"] for name in names), terms

        gradient = jax.grad(total, (0, 1), has_aux=True)
        return gradient(student, teacher), jax.value_and_grad(lambda s: total(s, shuffled, names)[0])(student)

    ((of_student, of_teacher), terms), (nothing, gradient) = jax.device_get(values(student, teacher))
    assert nothing == pytest.approx(0, abs=1e-4)
    assert max(np.max(np.abs(g), initial=0) for g in jax.tree.leaves(gradient)) < 1e-5
    assert all(term > 0 for term in terms.values()) and len(terms) == 5
    parts = (of_student.layers[0].boxes, of_student.layers[1].logits, of_student.neck, of_student.ask)
    assert all(any(np.any(g) for g in jax.tree.leaves(part)) for part in parts)
    assert not any(np.any(g) for g in jax.tree.leaves(of_teacher))


def test_detrdistill_matches_and_sums_as_its_formula():
    student, teacher = with_states("s", 0), with_states("t", 1)
    made = Distiller(detector(student), detector(teacher), [methods.detrdistill(prior_weight=0)])
    found = jax.device_get(quick_jit(lambda s, t: term_sums(made, s, t))(student, teacher))
    wanted = dict.fromkeys(("classes", "l1", "giou"), 0.0)
    for s, t in zip(student.layers, (teacher.layers[1], teacher.layers[2]), strict=True):
        sums, costs, weights = dict.fromkeys(wanted, 0.0), np.asarray(queries.cost(s, t)), 0.0
        for image in range(BATCH):
            for i, j in zip(*linear_sum_assignment(costs[image]), strict=True):
                p, q = sigmoid(t.logits[image, j]), sigmoid(s.logits[image, i])
                a, b = s.boxes[image, i], t.boxes[image, j]
                w = p.max()
                sums["classes"] += w * np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
                sums["l1"] += w * np.abs(a - b).sum()
                sums["giou"] += w * (1 - giou(a, b))
                weights += w
        wanted = {name: wanted[name] + sums[name] / weights for name in wanted}
    assert {name: found[f"detrdistill/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    maps = zip(student.neck, teacher.neck, strict=True)
    masks = [np.asarray(attention(layer, teacher.neck[0], TARGETS)) for layer in teacher.layers]
    apart = sum(np.mean((mask[..., None] * (s - t)) ** 2) for s, t in maps for mask in masks)
    assert found["detrdistill/features"] == pytest.approx(apart, rel=1e-4)


def test_the_attention_of_detrdistill():
    """Cosines weighted by score and overlap, of an image without objects by score alone; the scale of states is no
    matter."""
    teacher = with_states("t", 1)
    layer, x = teacher.layers[-1], teacher.neck[0]
    targets = TARGETS._replace(valid=TARGETS.valid & np.array([[True], [False]]))
    found = np.asarray(attention(layer, x, targets))
    assert np.all(found > 0) and found.max((1, 2)) == pytest.approx(np.ones(BATCH))
    scaled = layer._replace(hidden=layer.hidden * np.linspace(0.1, 9, layer.hidden.shape[1])[:, None])
    np.testing.assert_allclose(attention(scaled, x, targets), found, rtol=2e-4, atol=1e-5)
    truth = np.asarray(queries.truth(targets))
    wanted = np.zeros_like(found)
    for image in range(BATCH):
        for q, h in enumerate(layer.hidden[image]):
            u = sigmoid(layer.logits[image, q]).max()
            if targets.valid[image].any():
                u *= max(iou(layer.boxes[image, q], box) for box in truth[image][targets.valid[image]])
            wanted[image] += u * (x[image] @ h) / np.linalg.norm(x[image], axis=-1) / np.linalg.norm(h)
    wanted = np.maximum(wanted, 0.01)
    np.testing.assert_allclose(found, wanted / wanted.max((1, 2), keepdims=True), rtol=1e-4, atol=1e-5)


def test_the_prior_of_detrdistill_learns_what_the_teacher_found():
    """Against a loop: the student's answers to the teacher's boxes, with the objects of the teacher's last layer."""
    student, teacher = with_states("s", 0), with_states("t", 1)
    made = Distiller(detector(student), detector(teacher), [methods.detrdistill(feature_weight=0)])
    spied = dataclasses.replace(student, ask=jax.tree_util.Partial(apart, MATRICES["s"]))
    found = jax.device_get(quick_jit(lambda s, t: term_sums(made, s, t))(spied, teacher))["detrdistill/prior"]
    boxes = np.asarray(teacher.selected.boxes)
    truth, last, total = np.asarray(queries.truth(TARGETS)), teacher.layers[-1], 0.0
    seen = boxes + boxes.mean(1, keepdims=True)
    for image in range(BATCH):
        objects = np.flatnonzero(TARGETS.valid[image])
        cost = np.array([[_cost(last, image, q, m, truth) for m in objects] for q in range(boxes.shape[1])])
        partner = dict(zip(*linear_sum_assignment(cost), strict=True))
        for matrix in MATRICES["s"]:
            out = seen[image] @ matrix
            p, b = sigmoid(out[:, :CLASSES]), sigmoid(out[:, CLASSES:])
            for q in range(boxes.shape[1]):
                target, weight = np.zeros(CLASSES), 0.75 * p[q] ** 2
                if q in partner:
                    m = objects[partner[q]]
                    overlap = iou(b[q], truth[image, m])
                    target[TARGETS.labels[image, m]], weight[TARGETS.labels[image, m]] = overlap, overlap
                    total += 5 * np.abs(b[q] - truth[image, m]).sum() + 2 * (1 - giou(b[q], truth[image, m]))
                total -= np.sum(weight * (target * np.log(p[q]) + (1 - target) * np.log(1 - p[q])))
    assert found == pytest.approx(total / TARGETS.valid.sum(), rel=1e-4)


def apart(matrices, asked):
    assert not asked.sees_own and asked.labels is None and asked.blocked is None
    return answer(matrices, asked)


def iou(a, b) -> float:
    a, b = (np.concatenate([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2]) for x in (a, b))
    inner = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return inner / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner)


def _cost(last: Queries, image: int, q: int, m: int, truth) -> float:
    p, box = sigmoid(last.logits[image, q])[TARGETS.labels[image, m]], last.boxes[image, q]
    focal = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    return 2 * focal + 5 * np.abs(box - truth[image, m]).sum() - 2 * giou(box, truth[image, m])


def test_what_is_no_transformer_is_refused():
    _, of_grid = grid(0)
    query, d_fine = detector(STUDENT), detector(D_FINE)
    for name, student, teacher, words in (
        ("kd_detr", of_grid, query, "kd_detr: the student is no transformer"),
        ("kd_detr", query, of_grid, "kd_detr: the teacher is no transformer"),
        ("kd_detr", query, detector(dataclasses.replace(STUDENT, ask=None)), "the teacher's decoder cannot be asked"),
        ("detrdistill", query, of_grid, "detrdistill: the teacher is no transformer"),
        ("detrdistill", query, query, "set feature_weight=0"),
        ("go_lsd", query, d_fine, "go_lsd: the student predicts no distributions of edges"),
        ("go_lsd", d_fine, of_grid, "go_lsd: the teacher is no transformer"),
    ):
        with pytest.raises(UserError, match=words):
            Distiller(student, teacher, [methods.build(name)]).init(jax.random.key(0), SIZE)
    for student, teacher, words in (
        (query, query, "rows.location"),
        (of_grid, of_grid, "the teacher is no transformer whose decoder can be asked"),
    ):
        with pytest.raises(UserError, match=words):
            Distiller(student, teacher, [methods.kd_detr(dense=True)]).init(jax.random.key(0), SIZE)
    with pytest.raises(UserError, match="kd_detr: specific is False"):
        methods.kd_detr(general=0, specific=False)
    with pytest.raises(UserError, match="go_lsd: scale is 0"):
        methods.go_lsd(scale=0)
