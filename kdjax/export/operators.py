"""Operators of ONNX in the place of what JAX writes as loops, NMS and RoIAlign, of resizing and of fake quantisation.

Traced with `REPLACED`, a program has the primitives of this file, and jax2onnx asks the functions of `_NODES` for
their nodes. None of them reads the number of images, so that it may be left open.

Reference: ONNX's operators NonMaxSuppression, RoiAlign, QuantizeLinear and DequantizeLinear,
https://onnx.ai/onnx/operators/.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive

from kdjax.export import graphs
from kdjax.structs import AnyArray, Array, PaddedDetections

_NONE = float(np.finfo(np.float32).min)  # candidates have scores above it
_FLOAT, _INT32, _INT64 = 1, 6, 7  # of onnx.TensorProto

nms_p, nms_of_batch_p = Primitive("kdjax_nms"), Primitive("kdjax_nms_of_batch")
pick_p, roi_align_p, resize_p = Primitive("kdjax_pick"), Primitive("kdjax_roi_align"), Primitive("kdjax_resize")
quantise_p = Primitive("kdjax_quantise")
nms_p.multiple_results = nms_of_batch_p.multiple_results = True


@nms_p.def_abstract_eval
def _shapes_of_nms(*_: object, most: int, **__: float) -> tuple[ShapedArray, ShapedArray]:
    """Boxes f32[G, N, 4] and scores f32[G, k, N] -> kept i32[most, 3], group, class and box; valid bool[most]."""
    return ShapedArray((most, 3), jnp.dtype("int32")), ShapedArray((most,), jnp.dtype("bool"))


@nms_of_batch_p.def_abstract_eval
def _shapes_of_nms_of_batch(
    boxes: AnyArray, scores: AnyArray, *, most: int, iou_threshold: float
) -> tuple[ShapedArray, ShapedArray, ShapedArray]:
    """Boxes f32[B, G, N, 4], scores f32[B, G, k, N] -> kept: i32[B, most] of N, i32[B, most] of G k, scores f32."""
    shape = (boxes.shape[0], most)
    index, score = ShapedArray(shape, jnp.dtype("int32")), ShapedArray(shape, jnp.dtype("float32"))
    return index, index, score


@pick_p.def_abstract_eval
def _shape_of_pick(x: AnyArray, rows: AnyArray) -> ShapedArray:
    """Rows of f32[B, N, C] by i32[B, D] -> f32[B, D, C]."""
    return ShapedArray((*rows.shape, x.shape[2]), x.dtype)


@resize_p.def_abstract_eval
def _shape_of_resize(x: AnyArray, *, factors: tuple[float, float], mode: str) -> ShapedArray:
    """f32[B, H, W, C] -> f32[B, H', W', C]."""
    batch, *sides, channels = x.shape
    height, width = (round(side * factor) for side, factor in zip(sides, factors, strict=True))
    return ShapedArray((batch, height, width, channels), x.dtype)


@roi_align_p.def_abstract_eval
def _shape_of_roi_align(*inputs: AnyArray, size: int, **_: object) -> ShapedArray:
    """Maps f32[B, H, W, C], boxes f32[B, R, 4] and levels i32[B, R] -> f32[B, R, size, size, C]."""
    return ShapedArray((*inputs[-1].shape, size, size, inputs[0].shape[-1]), jnp.dtype("float32"))


def _one(images: object) -> bool:
    """Whether a batch is of one image; its number is no integer where it is left open."""
    return isinstance(images, int) and images == 1


@quantise_p.def_abstract_eval
def _shape_of_quantise(x: AnyArray, **_: float) -> ShapedArray:
    return ShapedArray(x.shape, jnp.dtype("float32"))


def _fake_quantise(x: AnyArray, scale: float, zero: float) -> Array:
    """`kdjax.nn.fake_quantise`."""
    return quantise_p.bind(x, scale=scale, zero=zero)


def _greedy_nms(
    boxes: AnyArray, scores: AnyArray, labels: AnyArray | None = None, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """`kdjax.boxes.nms.greedy_nms`; the labels must be known when it is traced, and those of all images alike."""
    settings = dict(iou_threshold=iou_threshold, most=max_detections)
    if labels is not None:
        of_image = np.asarray(labels)[:1]
        of_label = of_image == np.arange(of_image.max() + 1)[:, None]  # [k, C]
        scores = jnp.where(of_label, scores[:, None], -jnp.inf)
    else:
        scores = scores[:, None]  # [B, k, C]
    if _one(boxes.shape[0]):
        kept, valid = nms_p.bind(boxes, scores, **settings)
        return kept[None, :, 2], valid[None]
    rows, _, best = nms_of_batch_p.bind(boxes[:, None], scores[:, None], **settings)
    return rows, best > _NONE


def _select_rows(boxes: Array, scores: Array, **settings: Any) -> tuple[PaddedDetections, Array]:
    """`kdjax.boxes.nms.select_rows`."""
    boxes, scores = graphs.dense(boxes, scores, **settings)
    of_class, candidates = boxes.ndim == 4, jnp.where(scores > 0, scores, -jnp.inf)
    form = dict(iou_threshold=settings["iou_threshold"], most=settings["max_detections"])
    if not _one(scores.shape[0]):
        return _select_rows_of_batch(boxes, candidates, **form)
    # Boxes of classes are groups, each with one class; boxes that classes share are one group.
    kept, valid = nms_p.bind(
        jnp.swapaxes(boxes[0], 0, 1) if of_class else boxes,
        jnp.swapaxes(candidates, 1, 2) if not of_class else jnp.swapaxes(candidates[0], 0, 1)[:, None],
        **form,
    )
    rows, labels = kept[:, 2], kept[:, 0] + kept[:, 1]
    pairs = rows * scores.shape[2] + labels
    boxes = jnp.take(boxes.reshape(-1, 4), pairs if of_class else rows, axis=0, mode="clip")
    found = PaddedDetections(
        boxes=jnp.where(valid[:, None], boxes, 0.0)[None],
        scores=jnp.where(valid, jnp.take(scores.reshape(-1), pairs, mode="clip"), 0.0)[None],
        labels=labels[None],
        valid=valid[None],
    )
    return found, rows[None]


def _select_rows_of_batch(boxes: Array, candidates: Array, **form: Any) -> tuple[PaddedDetections, Array]:
    """`_select_rows` of several images; candidates are scores, -inf where a class is left out."""
    batch, priors, classes = candidates.shape
    of_class, of_pairs = boxes.ndim == 4, jnp.swapaxes(candidates, 1, 2)
    groups = jnp.swapaxes(boxes, 1, 2) if of_class else boxes[:, None]
    rows, labels, best = nms_of_batch_p.bind(groups, of_pairs[:, :, None] if of_class else of_pairs[:, None], **form)
    valid = best > _NONE
    flat = groups.reshape(batch, classes * priors, 4) if of_class else boxes
    taken = pick_p.bind(flat, labels * priors + rows if of_class else rows)
    found = PaddedDetections(
        boxes=jnp.where(valid[..., None], taken, 0.0),
        scores=jnp.where(valid, best, 0.0),
        labels=jnp.where(valid, labels, 0),
        valid=valid,
    )
    return found, rows


def _roi_align(
    maps: Sequence[Array],
    boxes: Array,
    level: Array,
    *,
    strides: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Array:
    """`kdjax.boxes.roi.roi_align`, but the number of samples is not bounded."""
    form = dict(strides=tuple(strides), size=size, ratio=sampling_ratio, aligned=aligned)
    return roi_align_p.bind(*maps, boxes, level, **form)


def _upsample_nearest(x: Array, factor: int = 2) -> Array:
    """`kdjax.nn.upsample_nearest`."""
    return resize_p.bind(x, factors=(float(factor), float(factor)), mode="nearest")


def _resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """`kdjax.nn.resize_bilinear`."""
    return resize_p.bind(x, factors=(size[0] / x.shape[1], size[1] / x.shape[2]), mode="linear")


REPLACED = {
    "greedy_nms": _greedy_nms,
    "select_rows": _select_rows,
    "roi_align": _roi_align,
    "upsample_nearest": _upsample_nearest,
    "resize_bilinear": _resize_bilinear,
    "fake_quantise": _fake_quantise,
}


# `add(operator, *inputs, **attributes)` adds a node and returns its output, `constant(value, dtype)` an initializer.
Add = Callable[..., Any]


def _nms(add: Add, constant: Add, boxes: object, scores: object, *, iou_threshold: float, most: int) -> tuple[Any, ...]:
    """The nodes of `nms_p`: NonMaxSuppression, the best of all groups and classes, padded."""
    limit = constant([most], np.int64)
    thresholds = (constant([value], np.float32) for value in (iou_threshold, _NONE))
    kept = add("NonMaxSuppression", boxes, scores, limit, *thresholds)
    found = add("GatherND", scores, kept)
    places = add("Min", add("Shape", found), limit)
    _, order = add("TopK", found, places, _outputs=2)
    pads = add("Concat", constant([0, 0], np.int64), add("Sub", limit, places), constant([0], np.int64), axis=0)
    padded = add("Pad", add("Gather", kept, order, axis=0), pads, constant(0, np.int64))
    return add("Cast", padded, to=_INT32), add("Less", constant(range(most), np.int64), places)


def _nms_of_batch(
    add: Add, constant: Add, boxes: object, scores: object, *, iou_threshold: float, most: int
) -> tuple[Any, ...]:
    """The nodes of `nms_of_batch_p`: NonMaxSuppression, then the best of each image among all scores."""
    groups, classes, rows = (int(side) for side in cast(Any, scores).shape[1:])
    boxes = add("Reshape", boxes, constant([-1, rows, 4], np.int64))
    scores = add("Reshape", scores, constant([-1, classes, rows], np.int64))
    thresholds = (constant([value], np.float32) for value in (iou_threshold, _NONE))
    kept = add("NonMaxSuppression", boxes, scores, constant([most], np.int64), *thresholds)
    nothing = add("Expand", constant(-np.inf, np.float32), add("Shape", scores))
    dense = add("ScatterND", nothing, kept, add("GatherND", scores, kept))
    places = groups * classes * rows
    flat, count = add("Reshape", dense, constant([-1, places], np.int64)), min(most, places)
    best, index = add("TopK", flat, constant([count], np.int64), _outputs=2)
    if count < most:
        pads = constant([0, 0, 0, most - count], np.int64)
        best = add("Pad", best, pads, constant(-np.inf, np.float32))
        index = add("Pad", index, pads, constant(0, np.int64))
    # Mod of integers is not among the operators that every runtime takes.
    of_group = add("Div", index, constant(rows, np.int64))
    of_rows = add("Sub", index, add("Mul", of_group, constant(rows, np.int64)))
    return add("Cast", of_rows, to=_INT32), add("Cast", of_group, to=_INT32), best


def _pick(add: Add, constant: Add, x: object, rows: object) -> tuple[Any, ...]:
    """The nodes of `pick_p`."""
    at = add("Cast", add("Unsqueeze", rows, constant([2], np.int64)), to=_INT64)
    return (add("GatherND", x, at, batch_dims=1),)


def _resize(add: Add, constant: Add, x: object, *, factors: tuple[float, float], mode: str) -> tuple[Any, ...]:
    """The nodes of `resize_p`: by factors, which onnxruntime computes faster than sizes, and with channels first.

    onnxruntime's basic optimisations cancel the transpositions between convolutions.
    """
    form: dict[str, str] = {"mode": mode}
    if mode == "nearest":
        form |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    x = add("Transpose", x, perm=[0, 3, 1, 2])
    x = add("Resize", x, constant([], np.float32), constant([1.0, 1.0, *factors], np.float32), **form)
    return (add("Transpose", x, perm=[0, 2, 3, 1]),)


def _roi_align_nodes(
    add: Add, constant: Add, *inputs: object, strides: Sequence[float], size: int, ratio: int, aligned: bool
) -> tuple[Any, ...]:
    """The nodes of `roi_align_p`: RoiAlign of the regions of each level, then in the order of the regions."""
    *maps, boxes, level = inputs
    regions, channels = int(cast(Any, level).shape[1]), int(cast(Any, maps[0]).shape[3])
    boxes, level = add("Reshape", boxes, constant([-1, 4], np.int64)), add("Reshape", level, constant([-1], np.int64))
    found, places = [], []
    for i, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        here = add("NonZero", add("Cast", add("Equal", level, constant(i, np.int32)), to=_FLOAT))
        places.append(add("Squeeze", here, constant([0], np.int64)))
        features = add(
            "RoiAlign",
            add("Transpose", x, perm=[0, 3, 1, 2]),
            add("Gather", boxes, places[-1], axis=0),
            add("Div", places[-1], constant(regions, np.int64)),  # the number of the image
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=size,
            output_width=size,
            sampling_ratio=ratio,
            spatial_scale=1 / stride,
        )
        found.append(features)
    _, order = add("TopK", add("Concat", *places, axis=0), add("Shape", level), largest=0, _outputs=2)
    flat = add("Transpose", add("Gather", add("Concat", *found, axis=0), order, axis=0), perm=[0, 2, 3, 1])
    return (add("Reshape", flat, constant([-1, regions, size, size, channels], np.int64)),)


def _quantise(add: Add, constant: Add, x: object, *, scale: float, zero: float) -> tuple[Any, ...]:
    """The nodes of `quantise_p`: to bytes and back."""
    form = constant(scale, np.float32), constant(zero, np.uint8)
    return (add("DequantizeLinear", add("QuantizeLinear", x, *form), *form),)


_NODES: dict[Primitive, Callable[..., tuple[Any, ...]]] = {
    nms_p: _nms,
    nms_of_batch_p: _nms_of_batch,
    pick_p: _pick,
    roi_align_p: _roi_align_nodes,
    resize_p: _resize,
    quantise_p: _quantise,
}


def register() -> None:
    """Tells jax2onnx how the primitives are written."""
    from jax2onnx.plugins import plugin_system

    for primitive, nodes in _NODES.items():

        class Plugin(plugin_system.PrimitiveLeafPlugin):
            make = staticmethod(nodes)

            def lower(self, ctx: Any, eqn: Any) -> None:  # noqa: ANN401
                def add(operator: str, *inputs: object, **attributes: object) -> object:
                    return getattr(ctx.builder, operator)(*inputs, **attributes)

                def constant(value: object, dtype: np.dtype) -> object:
                    return ctx.builder.add_initializer_from_array(ctx.fresh_name("constant"), np.asarray(value, dtype))

                inputs = [ctx.get_value_for_var(variable) for variable in eqn.invars]
                for variable, value in zip(eqn.outvars, self.make(add, constant, *inputs, **eqn.params), strict=True):
                    known = ctx.get_value_for_var(variable)
                    value.type, value.shape = known.type, known.shape
                    ctx.bind_value_for_var(variable, value)

        plugin_system.register_primitive(jaxpr_primitive=primitive.name)(Plugin)
