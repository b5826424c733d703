"""ONNX files for several images find in each what they find in it alone."""

import re

import jax
import numpy as np
import pytest

from kdjax import cli
from kdjax.errors import UserError
from kdjax.export import graphs, onnx, verify
from kdjax.inference import load
from tests.export import tensorrt
from tests.support.models import random_output, save_noisy


def images(count: int) -> dict[str, np.ndarray]:
    """The inputs of files of 64x64, the images of different sizes on the canvas."""
    rng = np.random.default_rng(0)
    sizes = np.array([[64 - 4 * i, 40 + 4 * i] for i in range(count)], np.int32)
    return {"image": rng.integers(0, 255, (count, 64, 64, 3), np.uint8), "image_size": sizes}


def each(session, feed):
    """The outputs of every image of a batch on its own."""
    return [
        session.run(None, {key: value[i : i + 1] for key, value in feed.items()}) for i in range(len(feed["image"]))
    ]


def check_batch(found, alone) -> int:
    """Padded outputs against those of files for one image; returns the number of detections."""
    for row, (boxes, scores, labels, *masks) in enumerate(alone):
        kept = found[1][row] > 0
        assert kept.sum() == len(scores) and np.all(found[0][row][~kept] == 0)
        np.testing.assert_allclose(found[1][row][kept], scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[2][row][kept], labels)
        np.testing.assert_allclose(found[0][row][kept], boxes, rtol=1e-4, atol=1e-3)
        for one, other in zip(found[3:], masks, strict=True):
            np.testing.assert_allclose(one[row][kept], other, rtol=1e-4, atol=1e-4)
    return sum(len(scores) for _, scores, *_ in alone)


def test_a_file_for_any_number_of_images(made, exported, tmp_path, capsys):
    file = tmp_path / "m.onnx"
    command = ["export", f"--model={made / 'model'}", "--format=onnx", "--batch=dynamic", f"--out={file}"]
    assert cli.main([*command, f"--data={made / 'data'}"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"JAX model \S+e-0[5-9] \(float32, 6 images, batches of 1, 2, 5\)", told) and "(+0.00)" in told
    assert tensorrt.complaints(file) == []
    session, one = onnx.session(file), onnx.session(exported[0])
    assert [entry.shape[0] for entry in session.get_inputs()] == ["batch", "batch"]
    assert "boxes f32[B, 300, 4]" in session.get_modelmeta().custom_metadata_map["output"]
    for count in (1, 2, 5):
        feed = images(count)
        assert check_batch(session.run(None, feed), each(one, feed)) > 10 * count


SLOW = [("gfl_r18", 0), ("gfl_r18", 2), ("yolox_pico", 2), ("rtmdet_ins_pico", 0)]


@pytest.mark.parametrize(
    ("name", "batch"),
    [("fcos_r18", 0), ("yolox_pico", 0), ("rtmdet_ins_pico", 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_decoding_in_batches(name, batch, tmp_path, monkeypatch):
    """Of random maps that are not those of other images, so that no network has to be converted."""
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    loaded = load(tmp_path / "m")
    maps = graphs.named_maps(random_output(loaded))

    def network(model, images):
        share = images.astype(np.float32).mean((1, 2, 3), keepdims=True) / 128
        return graphs.output(model, [level * share for level in maps.values()])

    monkeypatch.setattr(graphs, "network", network)
    onnx.write(loaded, tmp_path / "m.onnx", batch=batch)
    onnx.write(loaded, tmp_path / "one.onnx")
    session, one = onnx.session(tmp_path / "m.onnx"), onnx.session(tmp_path / "one.onnx")
    for count in [batch] if batch else [1, 2, 5]:
        feed = images(count)
        feed["image"][-1] //= 2
        alone = each(one, feed)
        assert check_batch(session.run(None, feed), alone) > 20
        assert count == 1 or not np.array_equal(alone[0][1], alone[-1][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster_rcnn_r18", "mask_rcnn_r18", "cascade_rcnn_r18", "rtdetr_pico"])
def test_two_stages_and_queries_in_batches(name, tmp_path):
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    loaded = load(tmp_path / "m")
    onnx.write(loaded, tmp_path / "m.onnx", batch=2)
    onnx.write(loaded, tmp_path / "one.onnx")
    feed = images(2)
    found = onnx.session(tmp_path / "m.onnx").run(None, feed)
    assert check_batch(found, each(onnx.session(tmp_path / "one.onnx"), feed)) > 20
    with pytest.raises(UserError, match=f"{name} cannot be written for any number of images, .*--batch=1"):
        onnx.write(loaded, tmp_path / "any.onnx", batch=0)


def test_an_image_has_others_beside_it():
    """What `verify.in_batches` runs: batches of the images before, and the row of the last."""
    ran = []

    def call(x, sizes):
        ran.append(x[:, 0].tolist())
        return [x[:, None, :] * np.ones((1, 3, 4)), np.where(np.arange(3) < x, 0.5, 0.0), x * np.ones((1, 3), int)]

    one = verify.in_batches(call, 3, raw=False)
    found = [one(np.array([[i]]), None if i < 0 else np.zeros((1, 2)))[2].tolist() for i in (1, 2, 3)]
    assert ran == [[1, 1, 1], [1, 2, 1], [1, 3, 2]] and found == [[1], [2, 2], [3, 3, 3]]


def test_a_program_of_a_fixed_number_of_images_fills_the_last_batch_up(made):
    loaded, seen = load(made / "model"), []

    def call(x, sizes):
        seen.append(len(x))
        value = x[:, 0, 0, 0].astype(np.float32)
        return [np.zeros((len(x), 5, 4)), np.repeat(value[:, None] / 10, 5, 1), np.zeros((len(x), 5), np.int64)]

    run = verify.as_program(loaded, call, raw=False, batch=2)
    x = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    found = run(loaded.variables, x, np.full((5, 2), 64))
    assert seen == [2, 2, 2] and found.scores.shape == (5, 5)
    np.testing.assert_allclose(found.scores[:, 0], [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    assert jax.tree.leaves(found.valid)[0].sum(1).tolist() == [0, 5, 5, 5, 5]
