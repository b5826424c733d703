"""`ops/deform_attn_*` and `ops/detr_encoding_*`: deformable attention, embeddings, anchors, detections of queries."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import nn
from kdjax.boxes import nms
from kdjax.detectors import api, query_decoder, transformer
from kdjax.weights.torch_names import from_torch_layout, to_torch_layout, torch_name
from tests.golden_checks.api import Check, Checks, UnknownCase, below, each_case, mismatches, relative_error

Arrays = Mapping[str, np.ndarray]
VALUE, GRADIENT = 1e-5, 1e-4


def shapes_of(params: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in params["shapes"]]


def core(params: Mapping[str, Any], arrays: Arrays) -> Checks:
    """The function, and its gradients. One case has an axis of levels, the others all points in one."""
    shapes, places = shapes_of(params), arrays["weights"].shape[:3]
    method = params.get("method", "default")
    if method not in ("default", "discrete"):
        raise UnknownCase(f"method {method!r}")
    points = params.get("points") or [arrays["weights"].shape[-1]] * len(shapes)
    inputs = (arrays["value"], arrays["locations"].reshape(*places, -1, 2), arrays["weights"].reshape(*places, -1))
    attend = partial(nn.deformable_attention, shapes=shapes, points=points, discrete=method == "discrete")

    def run(inputs, upstream):
        out, back = jax.vjp(attend, *inputs)
        return out, back(upstream)

    out, gradients = run(inputs, arrays["upstream"])
    yield Check("out", relative_error(out, arrays["out"]), VALUE)
    for name, gradient in zip(("value", "locations", "weights"), gradients, strict=True):
        if f"grad_{name}" in arrays:
            want = arrays[f"grad_{name}"]
            yield Check(f"grad_{name}", relative_error(gradient.reshape(want.shape), want), GRADIENT)
        else:
            yield Check(f"grad_{name} is 0", float(jnp.abs(gradient).max()), 0)


def filled(construct, arrays: Arrays):
    """A module with a file's weights `w/`, and a function from a tree of its parameters to their PyTorch names."""
    module = api.pure(construct)
    paths = api.flatten(module.shapes[0])
    names = {path: torch_name(path) for path in paths}
    weights = below(dict(arrays), "w")
    if set(weights) != set(names.values()):
        raise ValueError(f"the weights {sorted(weights)} are not {sorted(names.values())}")
    params = api.unflatten({path: jnp.asarray(from_torch_layout(weights[names[path]], path)) for path in paths})

    def by_name(tree):
        return {names[path]: to_torch_layout(np.asarray(value), path) for path, value in api.flatten(tree).items()}

    return module, params, by_name


def weight_gradients(gradient: Mapping[str, np.ndarray], arrays: Arrays) -> Checks:
    want = below(dict(arrays), "gw")
    for name, value in gradient.items():
        if name in want:
            yield Check(f"gw/{name}", relative_error(value, want[name]), GRADIENT)
        else:
            yield Check(f"gw/{name} is 0", float(np.abs(value).max()), 0)


def module(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    """The whole attention with its projections; `out` is what it adds to the queries."""
    shapes, family = shapes_of(params), what.removeprefix("module ").split(":")[0].split()[0]
    if params["offset_scale"] != 0.5:
        raise UnknownCase(f"offset_scale {params['offset_scale']}")
    points = params["points"] if isinstance(params["points"], list) else [params["points"]] * len(shapes)
    attention, weights, by_name = filled(
        lambda: transformer.DeformableAttention(
            arrays["hidden"].shape[-1],
            params["heads"],
            tuple(points),
            projected=family != "dfine",
            discrete=params["method"] == "discrete",
        ),
        arrays,
    )

    def attend(weights, hidden, memory):
        def whole(module):
            return module(hidden + arrays["pos"], arrays["reference"], module.values(memory), shapes)

        return attention.call(weights, {}, whole)[0]

    def run(weights, hidden, memory, upstream):
        out, back = jax.vjp(attend, weights, hidden, memory)
        return out, back(upstream)

    out, gradients = run(weights, arrays["hidden"], arrays["memory"], arrays["upstream"])
    yield Check("out", relative_error(out, arrays["out"]), VALUE)
    yield from weight_gradients(by_name(gradients[0]), arrays)
    for name, gradient in zip(("hidden", "memory"), gradients[1:], strict=True):
        yield Check(f"grad_{name}", relative_error(gradient, arrays[f"grad_{name}"]), GRADIENT)


def deform_attn(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    if what.startswith("core"):
        yield from core(params, arrays)
    elif what.startswith("module"):
        yield from module(what, params, arrays)


def gate(arrays: Arrays) -> Checks:
    layer, weights, by_name = filled(lambda: transformer.Gate(arrays["residual"].shape[-1]), arrays)

    def run(weights, residual, attention):
        return layer.call(weights, {}, lambda module: module(residual, attention))[0]

    value, back = jax.vjp(run, weights, arrays["residual"], arrays["attention"])
    yield Check("value", relative_error(value, arrays["value"]), VALUE)
    of_weights, *gradients = back(jnp.asarray(arrays["upstream"]))
    yield from weight_gradients(by_name(of_weights), arrays)
    for name, gradient in zip(("residual", "attention"), gradients, strict=True):
        yield Check(f"grad_{name}", relative_error(gradient, arrays[f"grad_{name}"]), GRADIENT)


def detections(arrays: Arrays) -> Checks:
    """Rows of equal scores may come in any order: there are none in the files."""
    scores = jax.nn.sigmoid(arrays["logits"])
    centre, sides = np.split(arrays["boxes"], 2, -1)
    corners = np.concatenate([centre - sides / 2, centre + sides / 2], -1)
    corners = corners * arrays["size_hw"][:, None, [1, 0, 1, 0]]
    found = nms.best_pairs(corners, scores, score_threshold=-1.0, max_detections=corners.shape[1])
    for i in range(len(corners)):
        yield Check(f"boxes of image {i}", relative_error(found.boxes[i], arrays[f"out/{i}/bboxes"]), VALUE)
        yield Check(f"scores of image {i}", relative_error(found.scores[i], arrays[f"out/{i}/scores"]), VALUE)
        yield Check(f"labels of image {i}", mismatches(found.labels[i], arrays[f"out/{i}/labels"]), 0)


def detr_encoding(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    if what.startswith("2-d sine embedding"):
        shape = params["height"], params["width"]
        got = transformer.sine_embedding(shape, params["dim"], temperature=params["temperature"])
        yield Check("sine embedding", relative_error(got, arrays["value"]), VALUE)
    elif what.startswith("anchors"):
        if (params["eps"], params["grid_size"]) != (query_decoder.MARGIN, query_decoder.SIZE):
            raise UnknownCase(f"anchors with {params}")
        anchors, valid = query_decoder.grid_anchors(tuple(shapes_of(params)))
        got = np.where(valid[:, None], anchors, 0)
        yield Check("anchors", relative_error(got, arrays["anchors"]), VALUE)
        yield Check("valid", mismatches(valid, arrays["valid"].reshape(valid.shape)), 0)
    elif what.startswith("inverse_sigmoid"):
        value, back = jax.vjp(transformer.inverse_sigmoid, arrays["x"])
        yield Check("value", relative_error(value, arrays["value"]), VALUE)
        yield Check("grad", relative_error(back(jnp.ones_like(value))[0], arrays["grad"]), GRADIENT)
    elif what.startswith("post-processing"):
        yield from detections(arrays)
    elif what.startswith("D-FINE gate"):
        yield from gate(arrays)
    elif what.startswith("D-FINE LQE"):
        yield Check("LQE", skip="not in kdjax yet: D-FINE")


def replay(cases):
    def run(path: Path) -> Checks:
        yield from each_case(path, cases)

    return run


CHECKS = [("ops/deform_attn_*.npz", replay(deform_attn)), ("ops/detr_encoding_*.npz", replay(detr_encoding))]
