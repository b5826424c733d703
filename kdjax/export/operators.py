"""Operators of ONNX in the place of what JAX writes as loops: NMS and RoIAlign, for one image.

Traced with `REPLACED`, a program has the primitives of this file, and jax2onnx asks the functions `_nms` and
`_roi_align` for their nodes.

Reference: ONNX's operators NonMaxSuppression and RoiAlign, https://onnx.ai/onnx/operators/.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive

from kdjax.export import graphs
from kdjax.structs import AnyArray, Array, PaddedDetections

_NONE = float(np.finfo(np.float32).min)  # candidates have scores above it
_INT32 = 6  # of onnx.TensorProto

nms_p, roi_align_p = Primitive("kdjax_nms"), Primitive("kdjax_roi_align")
nms_p.multiple_results = True


@nms_p.def_abstract_eval
def _shapes_of_nms(*_: object, most: int, **__: float) -> tuple[ShapedArray, ShapedArray]:
    """Boxes f32[G, N, 4] and scores f32[G, k, N] -> kept i32[most, 3], group, class and box; valid bool[most]."""
    return ShapedArray((most, 3), jnp.dtype("int32")), ShapedArray((most,), jnp.dtype("bool"))


@roi_align_p.def_abstract_eval
def _shape_of_roi_align(*inputs: AnyArray, size: int, **_: object) -> ShapedArray:
    """Maps f32[1, H, W, C], boxes f32[R, 4] and levels i32[R] -> f32[R, size, size, C]."""
    return ShapedArray((inputs[-1].shape[0], size, size, inputs[0].shape[-1]), jnp.dtype("float32"))


def _greedy_nms(
    boxes: AnyArray, scores: AnyArray, labels: AnyArray | None = None, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """`kdjax.boxes.nms.greedy_nms`; the labels must be known when it is traced."""
    if labels is not None:
        of_label = np.asarray(labels) == np.arange(np.max(labels) + 1)[:, None]  # [k, C]
        scores = jnp.where(of_label, scores, -jnp.inf)
    kept, valid = nms_p.bind(boxes, scores[None], iou_threshold=iou_threshold, most=max_detections)
    return kept[None, :, 2], valid[None]


def _select_rows(boxes: Array, scores: Array, **settings: Any) -> tuple[PaddedDetections, Array]:
    """`kdjax.boxes.nms.select_rows`."""
    boxes, scores = graphs.dense(boxes, scores, **settings)
    of_class, candidates = boxes.ndim == 4, jnp.where(scores > 0, scores, -jnp.inf)
    # Boxes of classes are groups, each with one class; boxes that classes share are one group.
    kept, valid = nms_p.bind(
        jnp.swapaxes(boxes[0], 0, 1) if of_class else boxes,
        jnp.swapaxes(candidates, 1, 2) if not of_class else jnp.swapaxes(candidates[0], 0, 1)[:, None],
        iou_threshold=settings["iou_threshold"],
        most=settings["max_detections"],
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
    return roi_align_p.bind(*maps, boxes[0], level[0], **form)[None]


REPLACED = {"greedy_nms": _greedy_nms, "select_rows": _select_rows, "roi_align": _roi_align}


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


def _roi_align_nodes(
    add: Add, constant: Add, *inputs: object, strides: Sequence[float], size: int, ratio: int, aligned: bool
) -> tuple[Any, ...]:
    """The nodes of `roi_align_p`: RoiAlign of the regions of each level, then in the order of the regions."""
    *maps, boxes, level = inputs
    found, places = [], []
    for i, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        here = add("NonZero", add("Equal", level, constant(i, np.int32)))
        places.append(add("Squeeze", here, constant([0], np.int64)))
        features = add(
            "RoiAlign",
            add("Transpose", x, perm=[0, 3, 1, 2]),
            add("Gather", boxes, places[-1], axis=0),
            add("Mul", places[-1], constant(0, np.int64)),  # the number of the image
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=size,
            output_width=size,
            sampling_ratio=ratio,
            spatial_scale=1 / stride,
        )
        found.append(features)
    _, order = add("TopK", add("Concat", *places, axis=0), add("Shape", level), largest=0, _outputs=2)
    return (add("Transpose", add("Gather", add("Concat", *found, axis=0), order, axis=0), perm=[0, 2, 3, 1]),)


_NODES: dict[Primitive, Callable[..., tuple[Any, ...]]] = {nms_p: _nms, roi_align_p: _roi_align_nodes}


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
