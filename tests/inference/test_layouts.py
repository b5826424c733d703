"""Descriptions of ONNX files: their options, and what outputs mean by them."""

import dataclasses

import numpy as np
import pytest

from kdjax.boxes.priors import grid_priors
from kdjax.errors import UserError
from kdjax.inference import layouts
from kdjax.inference.layouts import Outputs, layout, read

SIZE, CLASSES, STRIDES = (32, 64), 3, (8, 16)  # 32 + 8 cells
PRIORS = grid_priors(SIZE, STRIDES)


def truth(rows: int = len(PRIORS)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes f32[2, N, 4] x1 y1 x2 y2, probabilities f32[2, N, 3] and objectness f32[2, N]."""
    rng = np.random.default_rng(5)
    first = rng.uniform(0, 20, (2, rows, 2))
    boxes = np.concatenate([first, first + rng.uniform(2, 12, (2, rows, 2))], -1)
    probs, objectness = rng.uniform(0.01, 0.99, (2, rows, CLASSES)), rng.uniform(0.01, 0.99, (2, rows))
    return boxes.astype(np.float32), probs.astype(np.float32), objectness.astype(np.float32)


def centred(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def sigmoid(x) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def written(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The same predictions as a file of each layout has them, and options."""
    boxes, probs, objectness = truth()
    centre, logits = centred(boxes), np.log(probs / (1 - probs))
    if name == "yolox":
        cells = np.concatenate(
            [(centre[..., :2] - PRIORS[:, :2]) / PRIORS[:, 2:], np.log(centre[..., 2:] / PRIORS[:, 2:])], -1
        )
        return {"output": np.concatenate([cells, objectness[..., None], probs], -1)}, {"strides": STRIDES}
    if name == "yolov5":
        return {"output": np.concatenate([centre, objectness[..., None], probs], -1)}, {"strides": STRIDES}
    if name == "yolov8":
        return {"output0": np.swapaxes(np.concatenate([centre, probs], -1), 1, 2)}, {"strides": STRIDES}
    if name == "detr":
        return {"logits": logits, "pred_boxes": centre / np.array([64, 32, 64, 32], np.float32)}, {}
    if name == "detr, softmax":
        others = np.log(probs), np.zeros((2, len(PRIORS), 1), np.float32)  # of K classes and the background
        return {"boxes": centre / np.array([64, 32, 64, 32], np.float32), "z": np.concatenate(others, -1)}, {
            "scores": "softmax",
            "outputs": ("z", "boxes"),  # both have four columns
        }
    corner = np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)
    return {"scores": probs, "boxes": corner}, {"boxes": "xywh", "std": 1}


@pytest.mark.parametrize("name", ["yolox", "yolov5", "yolov8", "detr", "detr, softmax", "rows"])
def test_rows_are_the_same_whatever_the_layout(name):
    arrays, options = written(name)
    described = layout(name.partition(",")[0], options)
    output = read(described, Outputs({key: value.astype(np.float32) for key, value in arrays.items()}, SIZE))
    boxes, probs, objectness = truth()
    if name == "detr, softmax":
        probs = probs / (1 + probs.sum(-1, keepdims=True))
    np.testing.assert_allclose(output.rows.boxes, boxes, atol=1e-4)
    np.testing.assert_allclose(sigmoid(output.rows.logits), probs, atol=1e-6)
    assert output.rows.logits.dtype == output.rows.boxes.dtype == np.float32 and output.rows.form == "sigmoid"
    if name in ("yolox", "yolov5"):
        np.testing.assert_allclose(sigmoid(output.rows.quality), objectness, atol=1e-6)
    else:
        assert output.rows.quality is None
    if "strides" in options:  # on a grid, so that the logits are maps too
        assert output.rows.level_sizes == (32, 8) and output.strides == STRIDES
        assert [x.shape for x in output.cls_logits] == [(2, 4, 8, 3), (2, 2, 4, 3)]
        np.testing.assert_array_equal(output.cls_logits[1][1, 1, 2], output.rows.logits[1, 32 + 6])
    else:
        assert output.rows.level_sizes == () and output.strides == () == output.cls_logits


def test_rows_of_another_number_than_the_grid_lie_on_none():
    """YOLOv5's three anchors of a cell."""
    boxes, probs, objectness = truth(120)
    rows = np.concatenate([centred(boxes), objectness[..., None], probs], -1)
    output = read(layout("yolov5", {"strides": STRIDES}), Outputs({"output": rows}, SIZE))
    assert output.rows.level_sizes == () and output.rows.logits.shape == (2, 120, 3)


def test_certain_scores_have_finite_logits():
    rows = np.zeros((1, 40, 7), np.float32)
    rows[..., 4] = 1
    output = read(layout("yolov8", {"strides": STRIDES}), Outputs({"o": np.swapaxes(rows, 1, 2)}, SIZE))
    assert np.isfinite(output.rows.logits).all()
    np.testing.assert_allclose(sigmoid(output.rows.logits[0, 0]), [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("form", ["mmdeploy", "apart", "six columns", "one image"])
def test_detections_come_best_first_and_padded(form):
    boxes = np.array([[0, 0, 8, 8], [4, 4, 20, 20], [0, 0, 0, 0], [1, 1, 9, 5]], np.float32)
    scores, labels = np.array([0.2, 0.9, 0, 0.5], np.float32), np.array([1, 0, -1, 2])
    joined = np.column_stack([boxes, scores])
    arrays = {
        "mmdeploy": {"dets": joined[None], "labels": labels[None]},
        "apart": {"labels": labels[None], "boxes": boxes[None], "scores": scores[None]},
        "six columns": {"output0": np.column_stack([joined, labels])[None].astype(np.float32)},
        "one image": {"boxes": boxes, "scores": scores, "labels": labels},
    }[form]
    found = read(
        layout("mmdeploy" if form == "mmdeploy" else "detections", {"std": 1}), Outputs(arrays, SIZE)
    ).detections
    assert found.boxes.shape == (1, layouts.PLACES, 4) and found.valid.sum() == 3
    np.testing.assert_array_equal(found.boxes[0, :4], [boxes[1], boxes[3], boxes[0], [0] * 4])
    np.testing.assert_array_equal(found.scores[0, :4], np.array([0.9, 0.5, 0.2, 0], np.float32))
    np.testing.assert_array_equal(found.labels[0, :4], [0, 2, 1, 0])


def test_of_many_detections_the_best_are_kept():
    scores = np.linspace(0.1, 0.9, 400, dtype=np.float32)[None]
    boxes = np.tile(np.array([0, 0, 8, 8], np.float32), (1, 400, 1))
    arrays = {"boxes": boxes, "scores": scores, "labels": np.zeros((1, 400), np.int64)}
    found = read(layout("detections", {"std": 1}), Outputs(arrays, SIZE)).detections
    np.testing.assert_array_equal(found.scores[0], scores[0, ::-1][: layouts.PLACES])


def test_maps_of_either_arrangement_and_tokens():
    rng = np.random.default_rng(0)
    fine, coarse = (rng.normal(size=(2, *side, 5)).astype(np.float32) for side in ((4, 8), (2, 4)))
    first = np.moveaxis(fine, 3, 1)
    tokens = np.concatenate([rng.normal(size=(2, 5, 5)), coarse.reshape(2, 8, 5)], 1).astype(
        np.float32
    )  # 5 of registers
    for arrays, options in (
        ({"a": coarse, "b": first}, {}),
        ({"b": first, "a": tokens}, {"strides": (8, 16)}),
        ({"b": first, "other": fine, "a": coarse}, {"maps": ["b", "a"]}),
    ):
        output = read(layout("maps", options), Outputs(arrays, SIZE))
        assert output.strides == (8, 16) and output.rows is None
        np.testing.assert_array_equal(output.neck[0], fine)
        np.testing.assert_array_equal(output.neck[1], coarse)


def test_maps_beside_rows():
    arrays, options = written("yolov8")
    maps = {"p3": np.zeros((2, 6, 4, 8), np.float32), "p4": np.zeros((2, 6, 2, 4), np.float32)}
    described = layout("yolov8", options | {"maps": ("p3", "p4")})
    output = read(described, Outputs(arrays | maps, SIZE))
    assert [x.shape for x in output.neck] == [(2, 4, 8, 6), (2, 2, 4, 6)] and output.rows.level_sizes == (32, 8)


@pytest.mark.user_input(
    "Models and exports",
    "a teacher's ONNX file whose outputs do not fit its description",
    "refused, with the output's name and shape",
)
@pytest.mark.parametrize(
    ("name", "options", "arrays", "told"),
    [
        ("yolox", {}, {"output": np.zeros((1, 40, 8))}, r"'output' .*40, 8\] has 40 rows, but the grid .* 42 cells"),
        ("yolox", {}, {"a": np.zeros((1, 42, 5))}, r"'a' f32\[1, 42, 5\] .* 5 columns of box and objectness before"),
        ("yolov8", {}, {"a": np.zeros((1, 42, 7))}, r"'a' f32\[1, 42, 7\] has its rows .* must be joined"),
        ("yolov5", {}, {"a": np.zeros((1, 8, 42))}, r"'a' f32\[1, 8, 42\] has its rows .* must be transposed"),
        ("yolov5", {}, {"a": np.zeros((1, 5, 9)), "b": np.zeros(3)}, r"one output of rows, the file 'a' .*5, 9\], 'b'"),
        ("yolov8", {}, {"a": np.full((1, 7, 42), 3.0)}, r"'a' holds scores of 3 \.\. 3, which are no probabilities"),
        ("detr", {}, {"a": np.zeros((1, 5, 9))}, r"\[B, N, 4\] of boxes, the file 'a' float64\[1, 5, 9\]"),
        ("detr", {}, {"a": np.zeros((1, 5, 9)), "b": np.zeros((1, 6, 4))}, "different numbers of rows"),
        ("mmdeploy", {}, {"dets": np.zeros((1, 5, 7)), "labels": np.zeros((1, 5))}, r"'dets' float64\[1, 5, 7\]"),
        ("mmdeploy", {}, {"dets": np.zeros((1, 5, 5))}, "boxes with scores and labels"),
        ("maps", {}, {"a": np.zeros((1, 9))}, r"'a' f32\[1, 9\] is no map"),
        ("maps", {}, {"a": np.zeros((1, 9, 7))}, r"'a' f32\[1, 9, 7\] holds tokens: options.strides"),
        ("maps", {"strides": 16}, {"a": np.zeros((1, 40, 7))}, "40 tokens, but patches of 16 px of 32x64 are 8"),
        ("maps", {}, {"a": np.zeros((1, 5, 4, 5))}, r"'a' f32\[1, 5, 4, 5\] is no map of one stride"),
        ("maps", {"strides": 8}, {"a": np.zeros((1, 5, 2, 4))}, "is no map of the stride 8 of an input of 32x64 px"),
        ("maps", {"strides": (8, 16)}, {"a": np.zeros((1, 5, 2, 4))}, r"2 strides for 1 maps \(a\)"),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_are_named_with_their_shape(name, options, arrays, told):
    with pytest.raises(UserError, match=told):
        read(layout(name, options), Outputs(arrays, SIZE))


@pytest.mark.user_input(
    "Config and flags",
    "options of a teacher's ONNX file that do not exist or have impossible values",
    "refused, with the option and what it must be",
)
@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("yolov9", {}, "layout must be one of kdjax, yolox, .*, not 'yolov9'"),
        ("rows", {"colours": "BGR"}, r"options.colours: there is no such option \(did you mean colors\?\)"),
        ("rows", {"kind": "maps"}, "options.kind: there is no such option"),
        ("kdjax", {"colors": "BGR"}, "options.colors: there is no such option for the layout kdjax"),
        ("rows", {"colors": "GBR"}, "options.colors must be one of 'RGB', 'BGR', not 'GBR'"),
        ("rows", {"std": 0}, "options.std must be three numbers above 0"),
        ("rows", {"mean": (1, 2)}, "options.mean must be three numbers, not"),
        ("rows", {"mean": "1"}, "options.mean must be numbers, not '1'"),
        ("rows", {"image_size": (640,)}, "options.image_size must be height and width in pixels"),
        ("rows", {"strides": (16, 8)}, "options.strides must run from fine to coarse"),
        ("rows", {"strides": (0.5,)}, "options.strides must be whole numbers above 0"),
        ("rows", {"nms": 1.5}, r"options.nms must be in \[0, 1\), not 1.5"),
        ("rows", {"objectness": 1}, "options.objectness must be True or False, not 1"),
        ("rows", {"outputs": 3}, "options.outputs must be names, not 3"),
        ("rows", {"boxes": "cells"}, "options.strides: boxes in cells need the strides"),
    ],
)
def test_options_are_checked(name, options, told):
    with pytest.raises(UserError, match=told):
        layout(name, options)


def test_ready_layouts_are_what_their_options_say():
    for name, given in layouts.READY.items():
        assert dataclasses.asdict(layout(name)).items() >= given.items()
    assert layout("rows", {"mean": 127, "std": [1, 2, 3]}).mean == (127.0, 127.0, 127.0)
