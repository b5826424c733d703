"""ONNX files compute what the JAX model computes."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import cli, nn
from kdjax.boxes import roi
from kdjax.data import records
from kdjax.export import graphs, onnx, operators, stablehlo
from kdjax.inference import load
from kdjax.inference import predict as prediction
from kdjax.inference.masks import from_boxes, from_canvas
from tests.export import tensorrt
from tests.support.models import CLASSES, random_output, read, save_noisy


def test_onnx_is_the_jax_model(made, exported):
    file, told = exported
    assert re.search(r"largest difference from the JAX model \S+e-0[5-9]", told) and "(+0.00)" in told
    session = onnx.session(file)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == CLASSES and json.loads(facts["image_size"]) == [64, 64]
    assert facts["normalisation"].endswith("BGR, minus 103.53 116.28 123.675, divided by 57.375 57.12 58.395")
    assert facts["AP of JAX"] == facts["AP of this file, float32"] and "6 images" in facts["AP measured on"]
    assert [entry.name for entry in session.get_outputs()] == ["boxes", "scores", "labels"]
    # Without the export's own check: as a user of the file runs it, against `Model.detect`.
    loaded = load(made / "model")
    image = records.decode((made / "data" / "images" / "val" / "val_00001.png").read_bytes())
    found = loaded.detect(image)
    canvas, placed = prediction.on_canvas(image, (64, 64))
    boxes, scores, labels = session.run(None, {"image": canvas[None], "image_size": placed[None]})
    assert len(scores) == len(found)
    np.testing.assert_allclose(scores, found.scores, atol=1e-5)
    # The canvas is half as large as the image.
    np.testing.assert_allclose(2 * boxes[:20], found.boxes[:20], atol=1e-3)
    np.testing.assert_array_equal(labels[:20], found.labels[:20])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos_r18", "yolox_pico"])
def test_onnx_of_other_families(name, tmp_path, capsys):
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    command = ["export", f"--model={tmp_path / 'm'}", "--format=onnx", f"--out={tmp_path / 'm.onnx'}", "--raw"]
    assert cli.main(command) == 0 and re.search(r"difference from the JAX model \S+e-0[5-9]", capsys.readouterr().out)
    assert tensorrt.complaints(tmp_path / "m.onnx") == []
    found = [entry.name for entry in onnx.session(tmp_path / "m.onnx").get_outputs()]
    assert found[0] == "cls_logits_8" and found[-1].startswith("quality_")


def test_an_image_without_detections_gives_empty_arrays(exported):
    session = onnx.session(exported[0])
    feed = {"image": np.zeros((1, 64, 64, 3), np.uint8), "image_size": np.zeros((1, 2), np.int32)}
    assert [value.shape for value in session.run(None, feed)] == [(0, 4), (0,), (0,)]


SLOW = [pytest.param(f"{name}_rcnn_r18", marks=pytest.mark.slow) for name in ("faster", "cascade")]


@pytest.mark.parametrize("name", ["rtmdet_ins_pico", "gfl_r18", "mask_rcnn_r18", *SLOW])
def test_exported_decoding_is_that_of_jax(name, tmp_path, monkeypatch):
    """Of random maps, so that no network has to be converted; StableHLO too."""
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    loaded = load(tmp_path / "m")
    output = random_output(loaded)
    monkeypatch.setattr(graphs, "network", lambda model, images: output)
    onnx.write(loaded, tmp_path / "m.onnx")
    size = np.array([[64, 48]], np.int32)
    wanted = jax.device_get(jax.jit(loaded.detector.decode)(output, size))
    stablehlo.write(loaded, tmp_path / "m.stablehlo")
    valid = wanted.valid[0]
    assert valid.sum() > 50 and len(set(wanted.labels[0][valid])) > 3
    for runner in (onnx.runner(tmp_path / "m.onnx"), stablehlo.runner(tmp_path / "m.stablehlo")):
        found = runner(np.zeros((1, 64, 64, 3), np.uint8), size)
        assert len(found) == (4 if loaded.detector.masks else 3)
        atol = 1e-3 if name.startswith("cascade") else 1e-4  # boxes move three times
        for own, exported in zip([v for v in wanted if v is not None and v.dtype != bool], found, strict=True):
            np.testing.assert_allclose(exported, own[0][valid], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("form", [{}, {"aligned": False}, {"sampling_ratio": 0, "max_samples": 8, "size": 3}])
def test_roi_align_of_onnx(form, tmp_path):
    """On three levels, one without a region, with a box of no area and boxes that end outside."""
    jax2onnx = pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(1, side, side + 2, 4)).astype(np.float32) for side in (16, 8, 4)]
    corner = rng.uniform(0, 60, (1, 9, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 40, corner.shape)], -1).astype(np.float32)
    boxes[0, 4, 2:] = boxes[0, 4, :2]
    level = np.array([[2, 0, 0, 2, 0, 2, 0, 2, 0]], np.int32)

    def align(*inputs):
        return roi.roi_align(inputs[:3], *inputs[3:], strides=(4, 8, 16), **form)

    operators.register()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*maps, boxes, level)]
    with onnx.quiet(), nn.replaced(**operators.REPLACED):
        graph = jax2onnx.to_onnx(align, shapes, opset=onnx.OPSET)
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    [found] = onnx.runner(tmp_path / "m.onnx")(*maps, boxes, level)
    np.testing.assert_allclose(found, align(*maps, boxes, level), rtol=1e-4, atol=1e-5)


def test_both_kinds_of_upsampling_are_those_of_jax(tmp_path):
    jax2onnx = pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    x = np.random.default_rng(0).normal(size=(1, 3, 5, 2)).astype(np.float32)

    def both(x):
        x = x + 1.0
        return nn.upsample_nearest(x), nn.resize_bilinear(x, (6, 10)), nn.resize_bilinear(x, (12, 20))

    operators.register()
    with onnx.quiet(), nn.replaced(**operators.REPLACED):
        graph = jax2onnx.to_onnx(both, [jax.ShapeDtypeStruct(x.shape, x.dtype)], opset=onnx.OPSET)
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    for found, wanted in zip(onnx.runner(tmp_path / "m.onnx")(x), both(x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtmdet_ins_pico", "mask_rcnn_r18"])
def test_masks_are_those_of_the_jax_model(name, made, tmp_path, capsys):
    """By both APs, and the lines of the page make of an exported file the masks that `Model.detect` finds."""
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    cv2 = pytest.importorskip("cv2")
    save_noisy(name, tmp_path / "m")
    truth = read(made / "data" / "annotations" / "instances_val.json")
    for row in truth["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (tmp_path / "masks.json").write_text(json.dumps(truth))
    file = tmp_path / "model.onnx"
    command = ["export", f"--model={tmp_path / 'm'}", "--format=onnx", f"--out={file}", f"--data={made / 'data'}"]
    assert cli.main([*command, f"--annotations={tmp_path / 'masks.json'}"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"smallest IoU with those of the JAX model (1\.0|0\.99)", told) and told.count("(+0.00)") == 2, (
        told
    )
    assert "mask AP of this file, float32" in onnx.session(file).get_modelmeta().custom_metadata_map
    image = cv2.imread(str(made / "data" / "images" / "val" / "val_00001.png"))[..., ::-1]
    loaded = load(tmp_path / "m")
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    lines = re.search(r"```python\n(import cv2.*?)```", page, re.DOTALL)[1].replace("model.onnx", str(file))
    names = {"image": image}
    exec(lines.replace("114", str(loaded.detector.pad_value)), names)
    np.testing.assert_allclose(names["scores"], loaded.detect(image).scores, atol=1e-4)
    masks, boxes, size = names["masks"], names["boxes"], image.shape[:2]
    if loaded.detector.masks == "canvas":
        mine, wanted = map(names["of_canvas"], masks), from_canvas(masks, (64, 64), (64, 64), size)
    else:  # the image is twice as large as the canvas
        mine, wanted = map(names["of_box"], masks, boxes), from_boxes(masks, 2 * boxes, size)
    filled = 0
    for one, other in zip(mine, wanted, strict=True):
        assert (one != other).sum() <= 0.01 * (one | other).sum()
        filled += one.any()
    assert filled > 20
