"""Lost and tiny objects and absent classes are noticed."""

import dataclasses

import pytest

from kdjax.data.coco import CLIPPED, LEAVES
from kdjax.data.dataset import Split
from kdjax.data.images import NOT_TURNED
from kdjax.doctor.data import check_data
from kdjax.doctor.findings import ERROR, OK, WARNING
from tests.support.findings import errors


@pytest.mark.user_input(
    "COCO json", "many dropped, clipped or tiny objects, an absent class", "reported by `kdjax doctor`"
)
@pytest.mark.user_input(
    "COCO json",
    "many boxes that reach beyond their image, as corners do",
    "reported by `kdjax doctor`: must be x, y, width, height",
)
@pytest.mark.user_input(
    "Images and videos",
    "images whose EXIF orientation is not applied",
    "reported by `kdjax doctor`, with the setting that applies it",
)
def test_lost_and_tiny_objects_and_absent_classes_are_noticed(tiny):
    setup, _ = tiny
    assert not errors(check_data(setup))
    split = setup.dataset.splits["train"]
    truth = split.truth
    small = [dict(a, bbox=[1, 1, 3, 3]) for a in truth["annotations"] if a["category_id"] > 1]
    dropped = dict(file="a", annotation=1, action="dropped", reason="r")

    class Spoilt(Split):
        truth, log = {**split.truth, "annotations": small}, None

    spoilt = Spoilt(split.name, split.size, split.records, split.folder, split.categories)
    object.__setattr__(spoilt, "log", 2 * len(truth["annotations"]) * [dropped])
    setup = setup._replace(dataset=dataclasses.replace(setup.dataset, splits=setup.dataset.splits | {"train": spoilt}))
    findings = check_data(setup)
    assert "--config.data.check=True lists them" in errors(findings)["train data"]
    warnings = {finding.subject: finding.message for finding in findings if finding.level == WARNING}
    assert "100% of the objects are smaller than 4 px" in warnings["small objects"]
    assert f"no training image has objects of {setup.dataset.classes[0]}" in warnings["classes"]
    for share, level in ((0.02, OK), (0.3, WARNING), (0.7, ERROR)):
        times = int(share * len(truth["annotations"])) + 1
        clipped = dict(dropped, action="repaired", reason=CLIPPED)
        object.__setattr__(spoilt, "log", times * [clipped])
        finding = {finding.subject: finding for finding in check_data(setup)}["train data"]
        assert finding.level == level and f"; {times} repaired: {CLIPPED}" in finding.message
        assert ("x, y, width, height in pixels" in finding.message) == (level != OK)
    object.__setattr__(spoilt, "log", 2 * [dict(file="/a", annotation=None, action="noted", reason=LEAVES)])
    finding = {finding.subject: finding for finding in check_data(setup)}["train data"]
    assert finding.level == OK
    assert finding.message.endswith(f"; 2 noted: {LEAVES}")
    object.__setattr__(spoilt, "log", 3 * [dict(file="a", annotation=None, action="noted", reason=NOT_TURNED)])
    finding = {finding.subject: finding for finding in check_data(setup)}["train orientation"]
    assert finding.level == WARNING
    assert finding.message == f"3 images: {NOT_TURNED}; config.data.exif_orientation=upright applies it"
