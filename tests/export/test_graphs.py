"""The exported functions, without any converter."""

from pathlib import Path

import numpy as np
import pytest

from kdjax import nn
from kdjax.boxes.convert import clip
from kdjax.boxes.iou import pairwise_iou
from kdjax.detectors import build, layers
from kdjax.export import graphs
from kdjax.inference.model import Model
from tests.support.models import OTHERS


def greedy(boxes, scores, *, iou_threshold: float, max_detections: int):
    """ONNX's NonMaxSuppression and the choice behind it, slowly: rows (score, class, candidate), best first."""
    found, overlap = [], np.asarray(pairwise_iou(boxes, boxes))
    for k, row in enumerate(scores):
        kept = []
        for i in sorted(np.flatnonzero(row > 0), key=lambda i: -row[i]):
            if all(overlap[i, j] <= iou_threshold for j in kept):
                kept.append(i)
        found += [(row[i], k, i) for i in kept]
    return sorted(found, reverse=True)[:max_detections]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("retinanet_r18", "fcos_r18"))) for name in OTHERS]
)
def test_candidates_are_those_of_decode(name):
    """Of random maps, so that nothing has to be compiled but the decoding."""
    detector = build(name, 3, **OTHERS[name])
    loaded = Model(
        path=Path("."),
        detector=detector,
        variables=detector.shapes,
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
        image_size=(64, 64),
    )
    rng = np.random.default_rng(0)
    bins = name.startswith("gfl")  # whose average is in the middle unless they differ much
    maps = [
        (rng.normal(size=level.shape) * spread - shift).astype(np.float32)
        for what, spread, shift in (
            ("cls_logits", 2, 2),
            ("box_reg", 8 if bins else 1, -1),
            ("quality", 2, 0),
            ("kernels", 1, 0),
        )
        for level in getattr(graphs.spec(loaded), what)
    ]
    if detector.masks:
        maps.append(rng.normal(size=graphs.spec(loaded).prototypes.shape).astype(np.float32))
    assert len(graphs.map_names(loaded)) == len(maps)
    limits, size = {}, np.array([[64, 48]])
    found = graphs.output(loaded, maps)
    boxes, scores = graphs.candidates(loaded, limits, found, size)
    expected = greedy(np.asarray(boxes[0]), np.asarray(scores[0]).T, **limits)
    boxes = clip(boxes, size)
    wanted = detector.decode(found, size)
    if detector.masks:
        assert wanted.masks.shape == (1, limits["max_detections"], 8, 8) and np.ptp(wanted.masks[0, 0]) > 0
    assert len(expected) == int(wanted.valid.sum()) > 10
    np.testing.assert_allclose([row[0] for row in expected], wanted.scores[0][: len(expected)], atol=1e-6)
    np.testing.assert_array_equal([row[1] for row in expected], wanted.labels[0][: len(expected)])
    np.testing.assert_allclose(
        np.asarray(boxes)[0, [row[2] for row in expected]], wanted.boxes[0][: len(expected)], atol=1e-4
    )


def test_portable_forms_are_the_others(made):
    """What is traced for other runtimes computes the same; both forms are also compared through ONNX above."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 6, 4)).astype(np.float32)
    kernel, wise = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 1, 4, 5), (5, 5, 1, 4)))
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 4)).astype(np.float32)
    for function in (
        lambda: nn.conv2d(x, kernel),
        lambda: nn.conv2d(x, wise, groups=4, stride=2),
        lambda: nn.batch_norm(x, scale, bias, mean, var),
        lambda: layers.max_pool(x, 5, padding=2),
        lambda: layers.max_pool(x, 3, stride=2, padding=1),
        lambda: nn.upsample_nearest(x),
    ):
        wanted = function()
        with nn.portable():
            np.testing.assert_allclose(function(), wanted, rtol=1e-4, atol=1e-5)
