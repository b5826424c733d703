"""ONNX files compute what the JAX model computes."""

import json
import re

import numpy as np
import pytest

from kdjax import cli
from kdjax.data import records
from kdjax.export import onnx
from kdjax.inference import load
from kdjax.inference import predict as prediction
from tests.support.models import CLASSES, save_noisy


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


@pytest.mark.parametrize("name", ["fcos_r18", "yolox_pico"])
def test_onnx_of_other_families(name, tmp_path, capsys):
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    command = ["export", f"--model={tmp_path / 'm'}", "--format=onnx", f"--out={tmp_path / 'm.onnx'}", "--raw"]
    assert cli.main(command) == 0 and re.search(r"difference from the JAX model \S+e-0[5-9]", capsys.readouterr().out)
    found = [entry.name for entry in onnx.session(tmp_path / "m.onnx").get_outputs()]
    assert found[0] == "cls_logits_8" and found[-1].startswith("quality_")


def test_an_image_without_detections_gives_empty_arrays(exported):
    session = onnx.session(exported[0])
    feed = {"image": np.zeros((1, 64, 64, 3), np.uint8), "image_size": np.zeros((1, 2), np.int32)}
    assert [value.shape for value in session.run(None, feed)] == [(0, 4), (0,), (0,)]
