"""Loading models and detecting objects."""

import json
import re
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from kdjax import cli
from kdjax.commands import latency, predict
from kdjax.data import records, scenes
from kdjax.detectors import build
from kdjax.detectors.api import flatten
from kdjax.export import packages
from kdjax.files import sealed
from kdjax.inference import load
from kdjax.weights import checkpoint
from kdjax.weights.folder import SEAL
from tests.support.models import CLASSES, read, refused


@pytest.mark.user_input(
    "Models and exports",
    "an impossible image size or category ids in a model's config",
    "refused: what it must be, what it is",
)
def test_a_damaged_config_of_a_model_is_refused(made, tmp_path, capsys):
    shutil.copytree(made / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    whole = read(file)
    for change, told in (
        ({"image_size": [0, 0]}, "image_size is [0, 0]"),
        ({"image_size": [10**6, 10**6]}, "image_size must be multiples of 32 up to 16,384 px for rtmdet_pico, not"),
        ({"image_size": [64, 65]}, "image_size must be multiples of 32 up to 16,384 px for rtmdet_pico, not 64x65"),
        ({"extra": {"category_ids": [1, 2]}}, "category_ids must be one integer per class, not [1, 2]"),
        ({"extra": {"category_ids": [1, 1, 2, 3, 4, 5]}}, "must be one integer per class"),
        ({"extra": {"category_ids": [[1], 1, 2, 3, 4, 5]}}, "must be one integer per class"),
        ({"extra": {"category_ids": "123456"}}, "must be one integer per class"),
    ):
        file.write_text(json.dumps(sealed(whole | change, SEAL)))
        assert told in refused(capsys, "evaluate", "--data=scenes", f"--model={tmp_path / 'model'}"), change


@pytest.mark.user_input(
    "Models and exports",
    "a model's `config.json` changed by hand",
    "refused: its SHA-256 differs; `import-weights` renames classes",
)
def test_an_edited_config_of_a_model_is_refused(made, tmp_path, capsys):
    """A class name, or a category id, is believed as the weights are."""
    shutil.copytree(made / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace(CLASSES[0], f"{CLASSES[0]}s"))
    told = refused(capsys, "evaluate", "--data=scenes", f"--model={tmp_path / 'model'}")
    assert told == (
        f"kdjax: --model: {file}: it was changed after it was written (its SHA-256 differs): restore it; to rename "
        "classes, use `kdjax import-weights --classes`"
    )


@pytest.mark.user_input(
    "Models and exports",
    "a model of a run on upright images, without `--exif`",
    "read: its images too are turned upright",
)
@pytest.mark.user_input(
    "Models and exports",
    "two models of runs with other EXIF settings to compare",
    "refused: choose what the data's boxes refer to",
)
def test_a_model_reads_images_as_it_was_trained(made, tmp_path, capsys):
    """With EXIF's orientation applied, unless it is said otherwise; two models that differ are asked about."""
    shutil.copytree(made / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    whole = read(file)
    turned = Image.Exif()
    turned[274] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    for exif in ("stored", "upright"):
        file.write_text(json.dumps(sealed(whole | {"extra": whole["extra"] | {"exif_orientation": exif}}, SEAL)))
        model = load(tmp_path / "model")
        assert model.exif_orientation == exif
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = model.detect(tmp_path / "turned.png")
        assert bool(caught) == (exif == "stored")
        expected = model.detect(np.rot90(pixels, -1).copy() if exif == "upright" else pixels)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    told = refused(capsys, "evaluate", "--data=scenes", f"--model={made / 'model'}", f"--against={tmp_path / 'model'}")
    assert told == (
        f"kdjax: --exif: the models were trained differently ({made / 'model'} on stored images, {tmp_path / 'model'} "
        "on upright images): choose what the data's boxes refer to"
    )
    file.write_text(json.dumps(sealed(whole | {"extra": {"exif_orientation": "left"}}, SEAL)))
    told = refused(capsys, "evaluate", "--data=scenes", f"--model={tmp_path / 'model'}")
    assert told == f"kdjax: --model: {file}: exif_orientation must be one of stored, upright, not 'left'"


@pytest.mark.user_input(
    "Models and exports",
    "an .onnx or .tflite as the model to evaluate",
    "refused: give the folder that it was made from",
)
def test_an_exported_model_is_not_loaded(tmp_path, capsys):
    for name in ("a.onnx", "a.tflite", "a.xml", "a.param"):
        (tmp_path / name).write_bytes(b"content")
        told = refused(capsys, "evaluate", "--data=scenes", f"--model={tmp_path / name}")
        assert "an exported model cannot be loaded: give the folder of the model that it was made from" in told


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "`--out` that is the folder of a model or of a run",
    "refused: choose another folder",
)
def test_outputs_are_not_mixed_with_a_model_or_a_run(made, tmp_path, capsys):
    shutil.copytree(made / "model", tmp_path / "run" / "student")
    for folder, kind in ((tmp_path / "run" / "student", "model"), (tmp_path / "run", "run")):
        (tmp_path / "run" / "metrics.jsonl").touch()
        before = sorted(folder.iterdir())
        for command in (
            ("evaluate", "--data=scenes", f"--model={made / 'model'}"),
            ("predict", str(made / "data" / "images"), f"--model={made / 'model'}"),
        ):
            told = refused(capsys, *command, f"--out={folder}")
            assert told == f"kdjax: --out: {folder} is the folder of a {kind}: choose another folder"
        assert sorted(folder.iterdir()) == before


def test_the_model_card_is_true_and_its_example_runs(made, finished, tmp_path, monkeypatch, capsys):
    text = (finished[0] / "student" / "README.md").read_text()
    assert f"initial weights: `{made / 'model'}`" in text and "no teacher" in text and "gain" not in text
    shutil.copytree(finished[0] / "student", tmp_path / "student")
    Image.fromarray(records.decode(next(scenes.stream("val", 1))[1])).save(tmp_path / "image.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(block, {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 10 and all(line.split()[0] in CLASSES for line in told)
    [command] = re.findall(r"^    kdjax (.*)$", text, re.MULTILINE)
    monkeypatch.setattr(
        predict, "run", lambda *, paths, model, **rest: 7 * (Path(paths[0]).exists() and model == "student")
    )
    assert cli.main(command.replace("IMAGES", "image.jpg").split()) == 7


@pytest.mark.user_input(
    "Models and exports", "an unfinished run, or its `checkpoints/`, as a model", "read from a checkpoint"
)
@pytest.mark.user_input(
    "Models and exports", "an unfinished run whose checkpoints are damaged", "refused: no checkpoint can be used"
)
def test_an_unfinished_run_is_read_from_its_checkpoint(made, finished, tmp_path, capsys, monkeypatch):
    half = finished[0].parent / "half"
    loaded, given = load(str(half)), load(str(made / "model"))
    assert loaded.detector.name == "rtmdet_pico" and loaded.class_names == tuple(CLASSES)
    assert loaded.image_size == (64, 64) and loaded.category_ids == (2, 3, 5, 7, 11, 13)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, given.variables)
    for path in (half / "checkpoints", half / "checkpoints" / "1"):
        again = load(str(path))
        jax.tree.map(np.testing.assert_array_equal, again.variables, given.variables)
        assert again.path == half
    told = refused(capsys, "latency", f"--model={half / 'checkpoints' / '7'}")
    assert "there is no such file or folder" in told
    with monkeypatch.context() as patched:
        note, arrays = checkpoint.arrays(half / "checkpoints", "student/ema/")
        note["run"]["options"] = {"exp_on_reg": False}
        patched.setattr(checkpoint, "arrays", lambda *_, **__: (note, arrays))
        assert load(str(half)).detector.options == {"exp_on_reg": False} != loaded.detector.options
        patched.undo()
        patched.setattr(latency, "clock", lambda *_: dict(median=1.0, p25=1.0, p75=2.0))
        patched.setattr(packages, "missing", lambda: ["onnx"])
        assert cli.main(["latency", f"--model={half}"]) == 0
    shutil.copytree(half, tmp_path / "half")
    for file in (tmp_path / "half" / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    told = refused(capsys, "evaluate", f"--model={tmp_path / 'half'}", "--data=scenes")
    assert "no checkpoint can be used" in told
    told = refused(capsys, "evaluate", f"--model={tmp_path / 'half' / 'checkpoints' / '1'}", "--data=scenes")
    assert "checkpoint 1 cannot be used" in told


def test_checkpoints_with_a_former_name(tmp_path, monkeypatch):
    detector = build("rtmdet_micro", 2, widen=0.0625)
    trees = dict(zip(("params", "stats"), detector.init(jax.random.key(1)), strict=True))
    note = {
        "run": {"student": "rtmdet_nano", "options": {"widen": 0.0625}, "classes": ["a", "b"]},
        "config": {"data": {"image_size": [64, 64]}},
    }
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(checkpoint, "arrays", lambda *_, **__: (note, flatten(trees)))
    with pytest.warns(UserWarning, match="it names rtmdet_nano, but .* it is loaded as rtmdet_micro"):
        assert load(tmp_path).detector is detector
