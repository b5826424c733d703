"""The comparison of an exported file with the JAX model, on detections that are made up."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.export import graphs, verify
from kdjax.structs import PaddedDetections


def model(count, monkeypatch):
    """A model that detects `count` squares, of one class, and those squares as boxes."""
    boxes = np.float32([[i, i, i + 4, i + 4] for i in range(count)]).reshape(-1, 4)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    places = np.arange(count + 1) < count  # one is free
    found = PaddedDetections(
        boxes=jnp.asarray(np.pad(boxes, [(0, 1), (0, 0)]))[None], scores=jnp.asarray(np.pad(scores, (0, 1)))[None],
        labels=jnp.zeros((1, count + 1), jnp.int32), valid=jnp.asarray(places)[None], masks=None,
    )  # fmt: skip
    monkeypatch.setattr(graphs, "network", lambda model, canvas: canvas)
    monkeypatch.setattr(graphs, "candidates", lambda model, limits, *given: (found.boxes, found.scores[..., None]))
    detector = SimpleNamespace(decode=lambda output, placed: found, fit="round", pad_value=114, masks=None)
    return SimpleNamespace(detector=detector, image_size=(64, 64)), (boxes, scores, np.zeros(count, int))


def difference(count, wrong, monkeypatch):
    """Of a file that has moved the boxes of the last `wrong` detections."""
    loaded, (boxes, scores, labels) = model(count, monkeypatch)
    moved = boxes + np.where(np.arange(count) >= count - wrong, 9.0, 0.0)[:, None]
    images = [np.zeros((64, 64, 3), np.uint8)]
    return verify.compare(loaded, lambda *_: (moved, scores, labels), images, raw=False)


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (2, 0), (49, 0), (50, 1), (99, 1), (100, 2)])
def test_one_of_fifty_detections_is_left_out(count, left_out, monkeypatch):
    assert difference(count, left_out, monkeypatch) == verify.Agreement(0.0, 1.0, 2 * count)
    assert difference(count, left_out + 1, monkeypatch).difference > 0.01


@pytest.mark.user_input(
    "Models and exports", "an export whose model detects nothing on the images", "refused: nothing was compared"
)
def test_nothing_is_not_an_agreement(monkeypatch):
    loaded, found = model(0, monkeypatch)
    with pytest.raises(UserError, match="nothing can be compared: give images of its classes, --data=DIR"):
        verify.check(loaded, lambda *_: found, [np.zeros((64, 64, 3), np.uint8)], raw=False)
