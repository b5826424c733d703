"""What the tests of methods share: random outputs of two made-up detectors, ground truth, a `Distiller` over them."""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.detectors import levels
from kdjax.detectors.api import Detector
from kdjax.distill import Distiller, Method
from kdjax.structs import Assignment, DetectorOutput, Targets
from tests.support.arrays import quick_jit

STRIDES, CLASSES, BOXES = (8, 16, 32), 3, 4


@functools.partial(jax.jit, static_argnames=("channels", "size", "batch", "dtype", "constant", "bins"))
def output(
    key, channels: int, size: int, *, batch: int = 2, dtype=jnp.float32, constant: bool = False, bins: int = 1
) -> DetectorOutput:
    """Every tap of an RTMDet-like detector, random or constant; with `bins`, box edges are logits as GFL has them."""
    count = iter(range(1000))

    def maps(width):
        sides = [max(size // stride, 1) for stride in STRIDES]
        if constant:
            return tuple(jnp.full((batch, side, side, width), 0.5, dtype) for side in sides)
        return tuple(
            jax.random.normal(jax.random.fold_in(key, next(count)), (batch, side, side, width), dtype) for side in sides
        )

    return DetectorOutput(
        strides=STRIDES,
        backbone_strides=STRIDES,
        backbone=maps(2 * channels),
        neck=maps(channels),
        neck_conv=maps(channels),
        cls_tower=(maps(channels), maps(channels)),
        reg_tower=(maps(channels), maps(channels)),
        cls_logits=maps(CLASSES),
        box_reg=maps(4 * bins) if bins > 1 else tuple(4 * jnp.exp(m) for m in maps(4)),
    )


def ground(size: int, *, objects: bool = True, batch: int = 2) -> tuple[Targets, Assignment, np.ndarray]:
    """Two boxes an image, with the priors nearest to their centres as positives; or none."""
    cells = [max(size // stride, 1) for stride in STRIDES]
    priors = np.concatenate(
        [[(x * s, y * s, s, s) for y in range(n) for x in range(n)] for n, s in zip(cells, STRIDES, strict=True)]
    ).astype(np.float32)
    boxes = np.zeros((batch, BOXES, 4), np.float32)
    boxes[:, 0], boxes[:, 1] = (2, 2, size * 0.5, size * 0.5), (size * 0.4, size * 0.3, size - 2, size - 4)
    labels = np.tile(np.array([0, 2, 0, 0], np.int32), (batch, 1))
    valid = np.tile(np.array([objects, objects, False, False]), (batch, 1))
    sides = np.full((batch, 2), size, np.int32)
    matched = np.full((batch, len(priors)), -1, np.int32)
    if objects:
        for j in (1, 0):
            centre = (boxes[0, j, :2] + boxes[0, j, 2:]) / 2
            near = np.argsort(np.square(priors[:, :2] - centre).sum(1), kind="stable")[: max(2, len(priors) // 12)]
            matched[:, near] = j
    positive = matched >= 0
    rows = np.take_along_axis(boxes, np.maximum(matched, 0)[..., None], 1) * positive[..., None]
    assignment = Assignment(
        matched=jnp.array(matched),
        positive=jnp.array(positive),
        ignore=jnp.zeros_like(jnp.array(positive)),
        labels=jnp.array(np.where(positive, np.take_along_axis(labels, np.maximum(matched, 0), 1), CLASSES)),
        boxes=jnp.array(rows, jnp.float32),
        quality=jnp.array(positive, jnp.float32),
    )
    targets = Targets(*(jnp.array(a) for a in (boxes * valid[..., None], labels, valid, sides, sides)))
    return targets, assignment, priors


def decode(priors):
    """Distances left, top, right, bottom to boxes, as RTMDet has them; of distributions the mean, times the stride."""

    def boxes(out: DetectorOutput):
        bins = out.box_reg[0].shape[-1] // 4
        reg = jnp.concatenate([m.reshape(m.shape[0], -1, 4, bins) for m in out.box_reg], 1).astype(jnp.float32)
        mean = jax.nn.softmax(reg) @ jnp.arange(bins, dtype=jnp.float32) * priors[:, 2:3]
        reg = mean if bins > 1 else reg[..., 0]
        return jnp.concatenate([priors[:, :2] - reg[..., :2], priors[:, :2] + reg[..., 2:]], -1)

    return boxes


def assign(priors):
    """An assigner that matches a prior to the first box around it."""

    def assignment(targets: Targets) -> Assignment:
        low, high = targets.boxes[:, :, None, :2], targets.boxes[:, :, None, 2:]
        inside = jnp.all((priors[:, :2] > low) & (priors[:, :2] < high), -1) & targets.valid[..., None]
        positive, owner = jnp.any(inside, 1), jnp.argmax(inside, 1)
        return Assignment(
            matched=jnp.where(positive, owner, -1),
            positive=positive,
            ignore=jnp.zeros_like(positive),
            labels=jnp.where(positive, jnp.take_along_axis(targets.labels, owner, 1), CLASSES),
            boxes=jnp.take_along_axis(targets.boxes, owner[..., None], 1) * positive[..., None],
            quality=positive.astype(jnp.float32),
        )

    return assignment


def head(features, *, branch: str, start: int):
    """A stand-in for the teacher's head: activation, then a fixed linear predictor."""
    width = CLASSES if branch == "cls" else 4
    return tuple(
        jax.nn.silu(f) @ jnp.cos(jnp.arange(f.shape[-1] * width, dtype=f.dtype)).reshape(-1, width) for f in features
    )


class Scene(NamedTuple):
    """The outputs of a student and a teacher on a batch, and the functions of these two made-up detectors."""

    student: DetectorOutput
    teacher: DetectorOutput
    targets: Targets
    assignment: Assignment
    key: Any
    canvas: tuple[int, int]  # height and width of the images
    priors: Any  # f32[N, 4]
    decode_student: Any
    decode_teacher: Any
    teacher_head: Any  # (features, *, branch, start) -> predictions by level
    assign: Any  # (targets) -> Assignment


def scene(student, teacher, *, size: int, objects: bool = True, seed: int = 7) -> Scene:
    """A scene on square images of `size` pixels."""
    targets, assignment, priors = ground(size, objects=objects, batch=len(jax.tree.leaves(student)[0]))
    return Scene(
        student=student,
        teacher=teacher,
        targets=targets,
        assignment=assignment,
        key=jax.random.PRNGKey(seed),
        canvas=(size, size),
        priors=jnp.array(priors),
        decode_student=decode(priors),
        decode_teacher=decode(priors),
        teacher_head=head,
        assign=assign(jnp.array(priors)),
    )


def distiller(seen: Scene, *methods: Method) -> Distiller:
    """A `Distiller` of the scene's two detectors; rows are made of the maps, as those of a `Detector`."""

    def detector(of_image: DetectorOutput, decode_boxes):
        own: Any = types.SimpleNamespace(
            class_logits=levels.class_logits, decode_boxes=decode_boxes, priors=lambda size: seen.priors
        )

        def rows(out: DetectorOutput):
            return Detector.rows(own, out) if out.cls_logits and out.box_reg else None

        def observe(variables, batch):
            del variables, batch
            return with_rows(of_image, rows)

        return types.SimpleNamespace(
            spec=lambda image_size: jax.eval_shape(lambda out: with_rows(out, rows), of_image),
            observe=observe,
            rows=rows,
            assign=lambda out, targets, key: seen.assign(targets),
            head=lambda params, stats, features, **where: seen.teacher_head(features, **where),
            decode_boxes=decode_boxes,
        )

    return Distiller(detector(seen.student, seen.decode_student), detector(seen.teacher, seen.decode_teacher), methods)


def with_rows(out: DetectorOutput, rows) -> DetectorOutput:
    """The output with the rows that a function makes of its maps."""
    return DetectorOutput(**vars(out) | {"rows": rows(out)})


def batch_of(seen: Scene) -> dict:
    """What the loader would give: the targets, and images that nobody reads."""
    images = np.zeros((len(jax.tree.leaves(seen.student)[0]), *seen.canvas, 3), np.uint8)
    return {"image": images, **seen.targets._asdict()}


def init(method: Method, seen: Scene, key=None) -> dict:
    """What a method trains beside the student."""
    return distiller(seen, method).init(jax.random.PRNGKey(3) if key is None else key, seen.canvas)[method.name]


def apply(method: Method, params, seen: Scene, *, observed: DetectorOutput | None = None) -> dict:
    """The terms of a method, {term: f32[]}, without their weights; by default the distiller observes the teacher."""
    terms = distiller(seen, method).terms(
        {method.name: params}, seen.student, batch_of(seen), ((), ()),
        observed=observed, assignment=seen.assignment, key=seen.key,
    )  # fmt: skip
    return {name.partition("/")[2]: value for name, value in terms.items()}


def values(method: Method, params, seen: Scene) -> dict[str, float]:
    """The same as numbers, computed by one program."""
    return jax.tree.map(float, quick_jit(lambda: apply(method, params, seen))())
