"""Random outputs of a transformer with a decoder that answers with random numbers, and objects for it."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.detectors import denoising
from kdjax.structs import Asked, Decoded, DetectorOutput, Queries, Targets

SIZE, CLASSES, QUERIES, LAYERS, BINS, NUMBER = (64, 96), 3, 12, 3, 8, 6


def some_queries(rng, batch: int, queries: int, *, corners: bool = False) -> Queries:
    boxes = np.concatenate([rng.uniform(0.2, 0.8, (batch, queries, 2)), rng.uniform(0.1, 0.5, (batch, queries, 2))], -1)
    logits = rng.normal(-1, 2, (batch, queries, CLASSES)).astype(np.float32)
    bins = rng.normal(0, 1, (batch, queries, 4, BINS + 1)).astype(np.float32) if corners else None
    return Queries(logits, boxes.astype(np.float32), None, bins)


def answer(decoded: Decoded, asked: Asked) -> Decoded:
    assert asked.boxes.shape[:2] == decoded.layers[0].logits.shape[:2]
    return decoded


def some_output(seed: int, batch: int, objects: int, *, d_fine: bool = False, number: int = NUMBER) -> DetectorOutput:
    """With `d_fine`, what D-FINE has beside."""
    rng = np.random.default_rng(seed)

    def decoded(queries: int) -> Decoded:
        layers = tuple(some_queries(rng, batch, queries, corners=d_fine) for _ in range(LAYERS))
        if not d_fine:
            return Decoded(layers)
        first = some_queries(rng, batch, queries)
        return Decoded(tuple(layer._replace(reference=first.boxes) for layer in layers), first)

    own, further = decoded(QUERIES), decoded(denoising.places(number, objects))
    return DetectorOutput(
        strides=(8,),
        neck=(jnp.zeros((batch, SIZE[0] // 8, SIZE[1] // 8, 1)),),
        layers=own.layers,
        first=own.first,
        selected=some_queries(rng, batch, QUERIES),
        ask=jax.tree_util.Partial(answer, further),
    )


def some_targets(seed: int, counts: list[int], objects: int) -> Targets:
    """Images with so many objects each, in pixels."""
    rng = np.random.default_rng(seed)
    batch = len(counts)
    height, width = SIZE
    centre = rng.uniform(0.2, 0.8, (batch, objects, 2)) * [width, height]
    half = rng.uniform(4, 20, (batch, objects, 2))
    valid = np.arange(objects) < np.array(counts)[:, None]
    boxes = np.clip(np.concatenate([centre - half, centre + half], -1), 0, [width, height] * 2)
    labels = rng.integers(0, CLASSES, (batch, objects))
    sizes = np.broadcast_to(np.int32(SIZE), (batch, 2))
    return Targets(
        np.where(valid[..., None], boxes, 0).astype(np.float32),
        np.where(valid, labels, 0).astype(np.int32),
        valid,
        sizes,
        sizes,
    )


def reordered(targets: Targets, order: np.ndarray) -> Targets:
    """The same objects at other places, perhaps with padding between them."""
    return targets._replace(**{name: getattr(targets, name)[:, order] for name in ("boxes", "labels", "valid")})


def soiled(targets: Targets) -> Targets:
    """With numbers in the padding that would show."""
    return targets._replace(
        boxes=np.where(targets.valid[..., None], targets.boxes, np.float32(33)),
        labels=np.where(targets.valid, targets.labels, 1).astype(np.int32),
    )


def widened(targets: Targets, more: int) -> Targets:
    """With more padding, which holds numbers that would show."""
    return targets._replace(
        boxes=np.pad(targets.boxes, [(0, 0), (0, more), (0, 0)], constant_values=33),
        labels=np.pad(targets.labels, [(0, 0), (0, more)], constant_values=1),
        valid=np.pad(targets.valid, [(0, 0), (0, more)]),
    )
