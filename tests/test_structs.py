"""`Detections` as the types of other programs: by stand-ins, and with the programs where they are installed."""

import importlib.util
import sys
import types

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle

from kdjax.errors import UserError
from kdjax.evals import coco
from kdjax.structs import Detections

MASKS = np.zeros((2, 20, 40), bool)
MASKS[0, 5:10, 4:12], MASKS[1, 3, 7] = True, True
FOUND = Detections(
    np.array([[4.0, 5, 12, 10], [6.5, 2.5, 8.5, 4]]),
    np.array([0.75, 0.5], np.float32),
    np.array([1, 0], np.int32),
    ("cat", "dog"),
    (3, 9),
    tuple(rle.encode(np.asfortranarray(mask, np.uint8)) for mask in MASKS),
)
NONE = Detections(np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int32), ("cat", "dog"), (3, 9), ())


def needs(name):
    absent = importlib.util.find_spec(name) is None
    return pytest.param(name, marks=[pytest.mark.slow, pytest.mark.skipif(absent, reason=f"{name} is not installed")])


def test_rows_of_detections():
    for rows, kept in ((0, [0]), (-1, [1]), (slice(1, None), [1]), ([1, 0], [1, 0]), (FOUND.scores > 0.6, [0])):
        found = FOUND[rows]
        assert len(found) == len(kept) and found.boxes.tolist() == FOUND.boxes[kept].tolist()
        assert found.masks == tuple(FOUND.masks[i] for i in kept) and found.labels.shape == (len(kept),)
    assert len(FOUND[[]]) == 0


@pytest.fixture
def package(request, monkeypatch):
    """A module that has the classes as plain records, or the package itself."""
    if request.param != "stand-in":
        return importlib.import_module(request.param)
    for name in ("supervision", "fiftyone"):
        module = types.ModuleType(name)
        module.Detections = module.Detection = lambda **fields: types.SimpleNamespace(**fields)
        monkeypatch.setitem(sys.modules, name, module)
    return None


@pytest.mark.parametrize("package", ["stand-in", needs("supervision")], indirect=True)
@pytest.mark.filterwarnings("default")
def test_to_supervision(package):
    made = FOUND.to_supervision()
    assert package is None or isinstance(made, package.Detections)
    np.testing.assert_array_equal(made.xyxy, FOUND.boxes)
    np.testing.assert_array_equal(made.confidence, FOUND.scores)
    assert made.class_id.tolist() == [1, 0] and made.class_id.dtype == int
    assert made.data["class_name"].tolist() == ["dog", "cat"]
    np.testing.assert_array_equal(made.mask, MASKS)
    assert made.mask.dtype == bool
    unnamed = Detections(FOUND.boxes, FOUND.scores, FOUND.labels).to_supervision()
    assert unnamed.mask is None and not unnamed.data
    empty = NONE.to_supervision()
    assert empty.xyxy.shape == (0, 4) and empty.mask is None
    if package is not None:
        assert len(made) == 2 and len(empty) == 0
        strong = made[made.confidence > 0.6]
        assert strong.data["class_name"].tolist() == ["dog"] and strong.mask.shape == (1, 20, 40)
        assert len(package.Detections.merge([made, empty])) == 2
        drawn = package.MaskAnnotator().annotate(np.zeros((20, 40, 3), np.uint8), made)
        assert (drawn[MASKS.any(0)] > 0).any() and not drawn[~MASKS.any(0)].any()


@pytest.mark.parametrize("package", ["stand-in", needs("fiftyone")], indirect=True)
@pytest.mark.filterwarnings("default")
def test_to_fiftyone(package):
    made = FOUND.to_fiftyone(40, 20)
    assert package is None or isinstance(made, package.Detections)
    first, second = made.detections
    assert (first.label, second.label) == ("dog", "cat")
    assert first.bounding_box == [0.1, 0.25, 0.2, 0.25] and (first.confidence, second.confidence) == (0.75, 0.5)
    assert first.mask.shape == (5, 8) and first.mask.all()
    assert second.mask.tolist() == [[False, False], [False, True]]  # x 6 and 7, y 2 and 3
    without = Detections(FOUND.boxes, FOUND.scores, FOUND.labels + 1, ("cat", "dog")).to_fiftyone(40, 20)
    assert [one.label for one in without.detections] == ["class 2", "dog"]
    assert package is not None or not hasattr(without.detections[0], "mask")
    assert NONE.to_fiftyone(40, 20).detections == []
    if package is not None:  # it makes the same of the COCO results that `kdjax predict` writes
        rows = coco.to_coco(FOUND, 1)
        read = importlib.import_module("fiftyone.utils.coco").COCOObject.from_anno_dict
        for row, same in zip(rows, made.detections, strict=True):
            one = read(row).to_detection((40, 20), {3: "cat", 9: "dog"}, load_segmentation=True)
            assert (one.label, one.confidence) == (same.label, same.confidence)
            assert one.bounding_box == same.bounding_box
            np.testing.assert_array_equal(one.mask, same.mask)
    with pytest.raises(UserError, match="must have a positive size, not 0x20"):
        FOUND.to_fiftyone(0, 20)


@pytest.mark.user_input(
    "Config and flags", "`to_supervision` or `to_fiftyone` without the package", "refused: how to install it"
)
def test_a_package_that_is_missing_is_named(monkeypatch):
    for name in ("supervision", "fiftyone"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"to_supervision: supervision cannot be imp.*install 'kdjax\[supervision\]'"):
        FOUND.to_supervision()
    with pytest.raises(UserError, match=r"to_fiftyone: fiftyone cannot be imported .*: pip install 'fiftyone'"):
        FOUND.to_fiftyone(4, 4)
