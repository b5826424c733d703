"""What methods between transformers share: layers that are compared, one-to-one pairs, terms of pairs of boxes.

Boxes here are `cx cy w h` as shares of the sides of the network input.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.boxes import convert, matching
from kdjax.errors import UserError
from kdjax.losses import box, distance
from kdjax.structs import Array, DetectorOutput, Queries, Targets

EPS = 1e-12  # of the area of shares


def check(student: DetectorOutput, teacher: DetectorOutput, *, asks: Sequence[str] = ()) -> None:
    """Checks that both sides are transformers that know equally many classes.

    Args:
      student, teacher: outputs or their shapes.
      asks: which of "student" and "teacher" are asked about further queries.

    Raises:
      UserError: they are not.
    """
    for role, output in (("student", student), ("teacher", teacher)):
        if not output.layers:
            raise UserError(f"the {role} is no transformer: layers of decoders are compared")
        if role in asks and (output.ask is None or output.selected is None):
            raise UserError(f"the {role}'s decoder cannot be asked about further queries (`DetectorOutput.ask`)")
    classes = [output.layers[-1].logits.shape[-1] for output in (student, teacher)]
    if classes[0] != classes[1]:
        raise UserError(f"the student has {classes[0]} classes and the teacher {classes[1]}: they must be the same")


def layer_pairs(student: Sequence[Queries], teacher: Sequence[Queries]) -> list[tuple[Queries, Queries]]:
    """Each layer of the student with the teacher's at the same relative depth: the last one with the last one."""
    share = len(teacher) / len(student)
    return [(layer, teacher[max(int((i + 1) * share + 0.5), 1) - 1]) for i, layer in enumerate(student)]


def scores(queries: Queries) -> Array:
    """The best class score of each query, f32[..., Q], without gradient."""
    return jax.lax.stop_gradient(jnp.max(jax.nn.sigmoid(queries.logits.astype(jnp.float32)), -1))


def box_terms(student: Array, teacher: Array) -> tuple[Array, Array]:
    """L1 and 1 - GIoU of pairs of boxes f32[..., 4]: f32[...] each."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    giou = box.giou(matching.corners(student), matching.corners(teacher), eps=EPS)
    return jnp.sum(distance.l1(student, teacher), -1), giou


def cost(student: Queries, teacher: Queries) -> Array:
    """What it costs to pair two queries, f32[B, S, T]: cross-entropy with the scores + 5 L1 - 2 GIoU."""
    logits, probs = student.logits.astype(jnp.float32), jax.nn.sigmoid(teacher.logits.astype(jnp.float32))
    product = jnp.einsum("bsk,btk->bst", logits, probs, precision="highest")
    entropy = jnp.sum(jax.nn.softplus(logits), -1)[:, :, None] - product
    l1, giou = box_terms(*(jnp.broadcast_arrays(student.boxes[:, :, None], teacher.boxes[:, None])))
    return jax.lax.stop_gradient(entropy + 5 * l1 - 2 * (1 - giou))


def one_to_one(costs: Array) -> tuple[Array, Array]:
    """The pairs of least total cost, as many as the fewer have: i32[..., P] of the student's and of the teacher's.

    Args:
      costs: f32[..., S, T].
    """
    of_student, of_teacher = costs.shape[-2:]
    fewer = min(of_student, of_teacher)
    there = jnp.ones((*costs.shape[:-2], fewer), bool)
    own = jnp.broadcast_to(jnp.arange(fewer, dtype=jnp.int32), there.shape)
    if of_student >= of_teacher:
        return matching.hungarian(costs, there), own
    return own, matching.hungarian(jnp.swapaxes(costs, -1, -2), there)


def paired(pairs: Sequence[tuple[Queries, Queries]]) -> list[tuple[Queries, Queries]]:
    """The queries of each pair of layers in the order of `one_to_one` of their `cost`; all are found in one loop."""
    found = one_to_one(jnp.stack([cost(*pair) for pair in pairs]))
    return [(taken(student, found[0][i]), taken(teacher, found[1][i])) for i, (student, teacher) in enumerate(pairs)]


def taken(queries: Queries, index: Array) -> Queries:
    """The queries of an index i32[B, P]."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), 1), queries)


def truth(targets: Targets) -> Array:
    """The boxes of the objects as the decoder has them, f32[B, M, 4]."""
    return convert.to_cxcywh(targets.boxes / jnp.tile(targets.pad_size[:, None, ::-1], 2))


def weighted_mean(values: Array, weight: Array) -> Array:
    """sum(weight * values) / sum(weight) over the global batch, 0 where nothing has a weight."""
    return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1e-6)
