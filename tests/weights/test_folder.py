"""The folder of weights: saving, loading, damage."""

import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file as load_safetensors

from kdjax import weights
from kdjax.detectors import build
from kdjax.files import sealed
from kdjax.weights.folder import SEAL
from tests.support.checkpoints import CLASSES


@pytest.fixture
def folder(tmp_path, detector, variables):
    weights.save(tmp_path / "student", detector, *variables, classes=CLASSES, image_size=(64, 96), extra={"AP": 0.5})
    return tmp_path / "student"


def test_folder(folder, detector, variables):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["detector"], config["num_classes"], config["options"]) == ("rtmdet_pico", 3, {})
    assert (config["classes"], config["image_size"], config["extra"]) == (CLASSES, [64, 96], {"AP": 0.5})
    assert set(config["versions"]) == {"kdjax", "jax", "flax", "numpy"}
    names = load_safetensors(folder / "model.safetensors")
    assert "params/backbone/stem/0/conv/kernel" in names and "stats/backbone/stem/0/bn/var" in names
    for path, given in ((folder, None), (folder / "model.safetensors", detector), (folder, build("rtmdet_pico", 9))):
        loaded, params, stats, classes = weights.load(path, given)
        assert (loaded.name, loaded.num_classes, classes) == ("rtmdet_pico", 3, CLASSES)
        chex.assert_trees_all_equal((params, stats), variables)


def test_half_precision(tmp_path, variables):
    detector = build("rtmdet_pico", 3, exp_on_reg=True)
    variables = detector.init(jax.random.key(5))
    sizes = {}
    for dtype in ("float32", "float16"):
        weights.save(tmp_path / dtype, detector, *variables, classes=CLASSES, image_size=(64, 64), dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["float16"] < 0.55 * sizes["float32"]
    loaded, params, stats, _ = weights.load(tmp_path / "float16")
    assert loaded.options == {"exp_on_reg": True}
    chex.assert_trees_all_equal_dtypes((params, stats), variables)
    chex.assert_trees_all_close((params, stats), variables, rtol=1e-3, atol=1e-6)


def test_saving_again_replaces(folder, detector):
    other = detector.init(jax.random.key(8))
    weights.save(folder, detector, *other, classes=CLASSES, image_size=(64, 64))
    chex.assert_trees_all_equal(weights.load(folder)[1:3], other)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.user_input(
    "Weights", "weights without the name of their detector", "refused: the file does not name its detector"
)
def test_pytorch_weights_need_a_detector(tmp_path, detector, variables, state):
    np.savez(tmp_path / "weights.npz", **state)
    loaded, params, stats, classes = weights.load(tmp_path / "weights.npz", detector)
    assert loaded is detector and classes is None
    chex.assert_trees_all_equal((params, stats), variables)
    with pytest.raises(ValueError, match="the file does not name its detector"):
        weights.load(tmp_path / "weights.npz")


@pytest.mark.user_input("Weights", "NaN or infinite values", "refused with the array: a diverged run?")
def test_weights_that_are_not_finite_are_refused(tmp_path, detector, variables, state):
    broken = jax.tree.map(np.array, variables[0])
    broken["backbone"]["stage1"]["0"]["bn"]["bias"][3] = np.nan
    weights.save(tmp_path / "w", detector, broken, variables[1], classes=CLASSES, image_size=(64, 64))
    with pytest.raises(ValueError, match=r"w: params/backbone/stage1/0/bn/bias contains NaN \(a diverged run\?\)"):
        weights.load(tmp_path / "w")
    name = next(name for name in state if name.endswith("running_var"))
    np.savez(tmp_path / "w.npz", **state | {name: np.full_like(state[name], np.inf)})
    with pytest.raises(
        ValueError, match=rf"w.npz: the values of 1 array cannot be used:\s+{name} contains infinite val"
    ):
        weights.load(tmp_path / "w.npz", detector)


def test_save_errors(tmp_path, detector, variables):
    def save(params=variables[0], **options):
        options = {"classes": CLASSES, "image_size": (64, 64)} | options
        weights.save(tmp_path / "w", detector, params, variables[1], **options)

    with pytest.raises(ValueError, match="dtype must be float32 or float16, not 'int8'"):
        save(dtype="int8")
    with pytest.raises(ValueError, match="classes must hold 3 names, not 2"):
        save(classes=["a", "b"])
    large = jax.tree.map(np.asarray, variables[0])
    large["backbone"]["stage1"]["0"]["bn"]["bias"] = np.full(16, 1e6, np.float32)
    with pytest.raises(ValueError, match="backbone/stage1/0/bn/bias holds values beyond float16"):
        save(large, dtype="float16")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def flip_a_bit(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.user_input(
    "Models and exports",
    "a `student/` folder with a flipped bit or a missing file",
    "refused: its SHA-256 differs; there is no config.json",
)
@pytest.mark.user_input(
    "Models and exports",
    "a `config.json` that is no json or does not fit the weights",
    "refused with the entry and what it is",
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "its SHA-256 differs"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "its SHA-256 differs"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: it cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: it cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json: it cannot be read"),
        (lambda folder: edit(folder, detector="rtmdet_huge"), "unknown detector 'rtmdet_huge'"),
        (lambda folder: edit(folder, num_classes=4, classes=list("abcd")), "it does not fit rtmdet_pico"),
        (lambda folder: edit(folder, num_classes=4), "3 names for 4 classes"),
        (lambda folder: edit(folder, num_classes="3"), "num_classes is '3'"),
        (
            lambda folder: edit(folder, options=["x"]),
            "it cannot be read as the config of weights.*options",
        ),
        (lambda folder: edit(folder, options={"depth": 1}), r"config.json: rtmdet_pico has no option depth"),
        (lambda folder: edit(folder, image_size=None), "config.json: it cannot be read"),
        (lambda folder: edit(folder, image_size=["64", "64"]), "image_size is"),
        (lambda folder: edit(folder, extra=None), "extra is None"),
        (lambda folder: edit(folder, options={"stacked_convs": 1}), "it does not fit rtmdet_pico"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


@pytest.mark.user_input(
    "Models and exports", "a folder of the former `rtmdet_nano`", "read, as rtmdet_micro, with a warning"
)
@pytest.mark.parametrize("family", ["rtmdet", "rtmdet_ins"])
def test_folders_with_a_former_name(tmp_path, family):
    detector = build(f"{family}_micro", 2, widen=0.0625)
    variables = detector.init(jax.random.key(1))
    weights.save(tmp_path / "old", detector, *variables, classes=["a", "b"], image_size=(64, 64))
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(sealed(config | {"detector": f"{family}_nano"}, SEAL)))
    with pytest.warns(UserWarning, match=f"old: it names {family}_nano, .* it is loaded as {family}_micro"):
        loaded, params, stats, _ = weights.load(tmp_path / "old")
    assert loaded is detector
    chex.assert_trees_all_equal((params, stats), variables)


def test_unknown_names_tell_what_they_are_now():
    with pytest.raises(ValueError, match="unknown detector 'rtmdet_ins_nano': it is called rtmdet_ins_micro now"):
        build("rtmdet_ins_nano", 3)


@pytest.mark.user_input(
    "Models and exports", "a folder of another detector, or none", "refused: for rtmdet_pico, not for rtmdet_micro"
)
def test_folder_of_another_detector(folder, tmp_path):
    with pytest.raises(ValueError, match=r"for rtmdet_pico with options {}, not for rtmdet_micro"):
        weights.load(folder, build("rtmdet_micro", 3))
    with pytest.raises(ValueError, match="nowhere: there are no weights"):
        weights.load(tmp_path / "nowhere")
