"""How transformers learn: one-to-one matching, and the losses of RT-DETR and D-FINE on every layer of the decoder.

Boxes here are `cx cy w h` as shares of the sides of the network input. S outputs are matched and scored: the layers of
the decoder, first to last, D-FINE's first boxes, and the encoder's selection.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.boxes import assign as assigners
from kdjax.boxes import convert, edges, matching
from kdjax.boxes.iou import box_iou
from kdjax.detectors import denoising, levels
from kdjax.detectors.api import Assign
from kdjax.errors import UserError
from kdjax.losses import box, classification, distance, divergence
from kdjax.structs import AnyArray, Array, Asked, Assignment, Decoded, Denoising, DetectorOutput, Queries, Targets

WEIGHTS = {"cls": 1.0, "l1": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
TEMPERATURE = 5.0  # of D-FINE's self-distillation
EPS = 1e-12  # keeps the IoU of boxes without area finite; the peers have none


class Truth(NamedTuple):
    """The objects of a batch."""

    boxes: Array  # f32[B, M, 4], cx cy w h
    labels: Array  # i32[B, M]
    count: Array  # f32[], of the global batch, at least 1
    weights: Array | None = None  # f32[B, M + 1], `Targets.weights`


def sides(output: DetectorOutput) -> Array:
    """f32[4], width, height, width, height of the network input in pixels."""
    height, width = levels.input_size(output)
    return jnp.array([width, height, width, height], jnp.float32)


def truth_of(output: DetectorOutput, targets: Targets) -> Truth:
    """The objects as the losses have them."""
    boxes = convert.to_cxcywh(targets.boxes / sides(output))
    count = jnp.maximum(jnp.sum(targets.valid, dtype=jnp.float32), 1)
    return Truth(boxes, targets.labels, count, targets.weights)


def outputs_of(output: DetectorOutput) -> tuple[Queries, ...]:
    """What is matched, in turn."""
    assert output.selected is not None, "an output of a transformer"
    return (*output.layers, *(() if output.first is None else (output.first,)), output.selected)


def assigner(
    num_classes: int,
    *,
    num_denoising: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    inverted: denoising.Inverted = "clamp",
) -> Assign:
    """Returns the function `assign` of a transformer.

    Args:
      num_classes: K.
      num_denoising: 0, or the pairs of denoising queries (`denoising.contrastive`, also for the other options).
      label_noise, box_noise, inverted: of the denoising queries.
    """

    def assign(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
        """Matches the queries of every output with the objects, and draws the denoising queries.

        Args:
          output: of `apply`.
          targets: ground truth.
          key: PRNG key of the denoising queries; not needed without them.

        Returns:
          The assignment of the last layer's queries; the matchings of all outputs are its `queries`. Without gradient.

        Raises:
          UserError: no key.
        """
        if num_denoising and key is None:
            raise UserError("assign: denoising queries are drawn: pass a PRNG key")
        truth, last = truth_of(output, targets), output.layers[-1]
        found = match(outputs_of(output), truth, targets.valid)
        queries = last.logits.shape[1]
        matched = matching.objects_of(found[len(output.layers) - 1][None], queries)
        quality = _quality(last.boxes, _of_matched(truth.boxes, matched))
        result = assigners.assignment_of(matched, jnp.zeros(matched.shape, bool), quality, num_classes, targets)
        if not num_denoising:
            return result._replace(queries=found)
        batch, objects = targets.valid.shape
        assert key is not None
        draws = denoising.draw(key, batch, denoising.places(num_denoising, objects), num_classes)
        noised = denoising.contrastive(
            draws,
            targets.boxes / sides(output),
            targets.labels,
            targets.valid,
            number=num_denoising,
            num_classes=num_classes,
            label_noise=label_noise,
            box_noise=box_noise,
            inverted=inverted,
        )
        return result._replace(queries=found, denoising=noised)

    return assign


def match(outputs: Sequence[Queries], truth: Truth, valid: Array) -> Array:
    """The query of each object in each output, i32[S, B, M], -1 for none; all matchings are found in one loop."""
    logits, boxes = _stacked(outputs)
    cost = jax.vmap(matching.matching_cost, (0, 0, None, None))(logits, boxes, truth.labels, truth.boxes)
    return matching.hungarian(cost, jnp.broadcast_to(valid, (len(outputs), *valid.shape)))


def rt_detr_loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """The losses of RT-DETR and RT-DETRv2, each summed over the outputs: those of `rt_detr_terms`.

    Args:
      output: of `apply`; its decoder is asked about the denoising queries.
      targets: ground truth.
      assignment: what to learn, of `assign`.

    Returns:
      loss_cls, loss_l1 and loss_giou, and with denoising queries loss_dn_cls, loss_dn_l1 and loss_dn_giou: f32[] >= 0.

    Scope: the global batch.

    Peers: the criterion of RT-DETR on one device, with its weights.

    Reference: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024, section 4.
    """
    return _total(rt_detr_terms(output, targets, assignment))


def d_fine_loss(
    output: DetectorOutput, targets: Targets, assignment: Assignment, *, up: float = 0.5, scale: float = 4.0
) -> dict[str, Array]:
    """The losses of D-FINE, each summed over the outputs: those of `d_fine_terms`.

    Args:
      output: of `apply`; its decoder is asked about the denoising queries.
      targets: ground truth.
      assignment: what to learn, of `assign`.
      up, scale: of the bins (`kdjax.boxes.edge_bins`).

    Returns:
      loss_cls, loss_l1, loss_giou, loss_fgl and loss_ddf, and with denoising queries the same with loss_dn: f32[] >= 0.

    Scope: the global batch.

    Peers: `DFINECriterion` of the authors on one device, with its weights; not the loss of transformers, which compares
      the logits and boxes of a layer with the distances of the next one.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.
    """
    return _total(d_fine_terms(output, targets, assignment, up=up, scale=scale))


def rt_detr_terms(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """The weighted losses of each output.

    Varifocal loss of the classes, L1 and GIoU of the boxes, each output by its own matching, divided by the number of
    objects of the batch; for denoising queries by that number times the groups.

    Args:
      output, targets, assignment: as in `rt_detr_loss`.

    Returns:
      cls, l1 and giou: f32[S]; dn_cls, dn_l1 and dn_giou: f32[L], of the decoder's layers.
    """
    truth = truth_of(output, targets)
    matched = objects(output, assignment)
    outputs = outputs_of(output)
    terms = class_losses(outputs, matched, truth, truth.count) | box_losses(outputs, matched, truth, truth.count)
    if assignment.denoising is not None:
        noised, layers = assignment.denoising, _asked(output, assignment.denoising).layers
        found, count = _repeated(noised, len(layers)), truth.count * noised.groups
        of_noised = class_losses(layers, found, truth, count, noised.live) | box_losses(layers, found, truth, count)
        terms |= {f"dn_{name}": value for name, value in of_noised.items()}
    return weighted(terms)


def d_fine_terms(
    output: DetectorOutput,
    targets: Targets,
    assignment: Assignment,
    *,
    up: float = 0.5,
    scale: float = 4.0,
    union: Array | None = None,
) -> dict[str, Array]:
    """The weighted losses of each output.

    Varifocal loss of the classes by each output's own matching. L1 and GIoU of the boxes, and the losses of the
    distributions (`edge_losses`), by the union of all matchings: a query learns the object that it was matched with
    most often, and the sums are divided by the number of queries that learn one.

    Args:
      output, targets, assignment, up, scale: as in `d_fine_loss`.
      union: i32[B, Q], that union; None: `kdjax.boxes.objects_of` all matchings.

    Returns:
      cls, l1 and giou: f32[S]; fgl and ddf: f32[L], 0 in the last entry of ddf; dn_cls, dn_l1 and dn_giou: f32[L + 1],
      of the layers and the first boxes; dn_fgl and dn_ddf: f32[L].
    """
    truth, layers, outputs = truth_of(output, targets), output.layers, outputs_of(output)
    assert assignment.queries is not None, "an assignment of a transformer"
    if union is None:
        union = matching.objects_of(assignment.queries, layers[-1].logits.shape[1])
    pairs = jnp.sum(union >= 0, dtype=jnp.float32)
    balance = jnp.sqrt(jnp.stack([pairs, union.size - pairs]))
    bins = functools.partial(edges.edge_bins, up=up, scale=scale)
    settings = {"truth": truth, "balance": balance, "bins": bins, "scale": scale}

    count = jnp.maximum(pairs, 1)
    terms = class_losses(outputs, objects(output, assignment), truth, truth.count)
    terms |= box_losses(outputs, jnp.broadcast_to(union, (len(outputs), *union.shape)), truth, count)
    terms |= edge_losses(layers, union, count=count, **settings)
    if assignment.denoising is not None:
        noised, decoded = assignment.denoising, _asked(output, assignment.denoising)
        assert decoded.first is not None, "an output of D-FINE"
        outputs, count = (*decoded.layers, decoded.first), truth.count * noised.groups
        found = _repeated(noised, len(outputs))
        of_noised = class_losses(outputs, found, truth, count, noised.live) | box_losses(outputs, found, truth, count)
        of_noised |= edge_losses(decoded.layers, noised.matched, noised.live, count=count, **settings)
        terms |= {f"dn_{name}": value for name, value in of_noised.items()}
    return weighted(terms)


def objects(output: DetectorOutput, assignment: Assignment) -> Array:
    """The object of each query by each output's own matching, i32[S, B, Q], -1 for none."""
    assert assignment.queries is not None, "an assignment of a transformer"
    queries = output.layers[-1].logits.shape[1]
    return jax.vmap(lambda found: matching.objects_of(found[None], queries))(assignment.queries)


def class_losses(
    outputs: Sequence[Queries], matched: Array, truth: Truth, count: Array, live: AnyArray | bool = True
) -> dict[str, Array]:
    """Varifocal loss against the IoU of the predicted box, summed and divided by `count`: cls f32[S].

    Args:
      outputs: S of them, Q queries each.
      matched: i32[S, B, Q], the object of each query, -1 for none.
      truth: the objects.
      count: what the sums are divided by.
      live: bool[Q], which queries are scored.
    """

    def one(logits: Array, boxes: Array, matched: Array) -> Array:
        labels = jnp.where(matched >= 0, _of_matched(truth.labels[..., None], matched)[..., 0], logits.shape[-1])
        rows = classification.varifocal(logits, labels, _quality(boxes, _of_matched(truth.boxes, matched)))
        return jnp.sum(jnp.where(live, rows * levels.row_weights(truth.weights, matched), 0.0)) / count

    return {"cls": jax.vmap(one)(*_stacked(outputs), matched)}


def box_losses(outputs: Sequence[Queries], matched: Array, truth: Truth, count: Array) -> dict[str, Array]:
    """L1 and GIoU losses of matched queries, summed and divided by `count`: l1 and giou f32[S].

    Args:
      outputs, matched, truth, count: as in `class_losses`.
    """

    def one(boxes: Array, matched: Array) -> dict[str, Array]:
        wanted, positive = _of_matched(truth.boxes, matched), matched >= 0
        l1 = jnp.sum(distance.l1(boxes, wanted), -1)
        giou = box.giou(matching.corners(boxes), matching.corners(wanted), eps=EPS)
        weights = levels.row_weights(truth.weights, matched)
        rows = {"l1": l1 * weights, "giou": giou * weights}
        return {name: jnp.sum(jnp.where(positive, values, 0.0)) / count for name, values in rows.items()}

    return jax.vmap(one)(_stacked(outputs)[1], matched)


def edge_losses(
    layers: Sequence[Queries],
    matched: Array,
    live: AnyArray | bool = True,
    *,
    truth: Truth,
    count: Array,
    balance: Array,
    bins: Callable[[int], Array],
    scale: float,
) -> dict[str, Array]:
    """D-FINE's losses of the distributions of the edges: fgl and ddf f32[L].

    fgl: `losses.fine_grained_localization` of the four edges of matched queries, weighted by the IoU of the box, summed
    and divided by `count`. ddf: what a layer learns from the last one, the KL divergence of their distributions
    (temperature 5) weighted by the IoU where matched and by the last layer's best score elsewhere; the means over
    matched and other edges, in the proportion `balance`.

    Args:
      layers: L of them, Q queries each.
      matched: i32[B, Q], the object of each query in all layers, -1 for none.
      live: bool[Q], which queries are scored.
      truth: the objects.
      count: what the sums of fgl are divided by.
      balance: f32[2], shares of matched and of other queries in ddf.
      bins: number -> f32[number + 1], the distances that the bins stand for.
      scale: of the distances.
    """
    logits, boxes = _stacked(layers)
    corners = jnp.stack([layer.corners for layer in layers if layer.corners is not None])
    reference, wanted, positive = layers[-1].reference, _of_matched(truth.boxes, matched), matched >= 0
    assert reference is not None, "layers of D-FINE"
    others, last = ~positive & live, jax.lax.stop_gradient(corners[-1])
    reference = jax.lax.stop_gradient(reference).astype(jnp.float32)
    target = edges.edge_distance(reference, wanted, scale=scale)
    score = jax.lax.stop_gradient(jnp.max(jax.nn.sigmoid(logits[-1]), -1))
    weights = levels.row_weights(truth.weights, matched)

    def one(boxes: Array, corners: Array) -> dict[str, Array]:
        quality = _quality(boxes, wanted) * weights
        fgl = box.fine_grained_localization(corners, target, bins(corners.shape[-1] - 1)) * quality[..., None]
        apart = divergence.softmax_kl(corners, last, temperature=TEMPERATURE)
        apart = jnp.sum(apart, -1) / 4 * jnp.where(positive, quality, score * weights)
        means = [jnp.sum(jnp.where(rows, apart, 0.0)) / jnp.maximum(jnp.sum(rows), 1) for rows in (positive, others)]
        return {
            "fgl": jnp.sum(jnp.where(positive[..., None], fgl, 0.0)) / count,
            "ddf": jnp.sum(jnp.stack(means) * balance) / jnp.sum(balance),
        }

    return jax.vmap(one)(boxes, corners)


def weighted(terms: dict[str, Array]) -> dict[str, Array]:
    """The terms times their weights."""
    return {name: WEIGHTS[name.removeprefix("dn_")] * value for name, value in terms.items()}


def _total(terms: dict[str, Array]) -> dict[str, Array]:
    return {f"loss_{name}": jnp.sum(value) for name, value in terms.items()}


def _stacked(outputs: Sequence[Queries]) -> tuple[Array, Array]:
    """Logits and boxes of several outputs in float32, with an axis before the batch."""
    logits, boxes = (jnp.stack([getattr(output, name) for output in outputs]) for name in ("logits", "boxes"))
    return logits.astype(jnp.float32), boxes.astype(jnp.float32)


def _of_matched(values: Array, matched: Array) -> Array:
    """f32[B, M, C], i32[B, Q] -> f32[B, Q, C]: of each query's object; of the first one where there is none."""
    return jnp.take_along_axis(values, jnp.maximum(matched, 0)[..., None], 1)


def _quality(boxes: Array, wanted: Array) -> Array:
    """IoU without gradient."""
    return jax.lax.stop_gradient(box_iou(matching.corners(boxes), matching.corners(wanted), eps=EPS))


def _repeated(noised: Denoising, outputs: int) -> Array:
    return jnp.broadcast_to(noised.matched, (outputs, *noised.matched.shape))


def _asked(output: DetectorOutput, noised: Denoising) -> Decoded:
    assert output.ask is not None, "an output of a transformer"
    return output.ask(Asked(noised.boxes, noised.labels, noised.blocked))
