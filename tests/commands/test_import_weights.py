"""`kdjax import-weights`."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax import cli, inference, weights
from kdjax.detectors import build
from kdjax.detectors.api import flatten
from tests.support.checkpoints import spoilt
from tests.support.models import CLASSES, mmyolo_names, refused


@pytest.mark.user_input("Weights", "the names of mmdetection, mmyolo and mmrazor", "read")
@pytest.mark.parametrize("source", ["mmdetection", "mmyolo", "mmrazor"])
def test_import_weights(tmp_path, capsys, state, source):
    detector, arrays = state
    arrays = dict(arrays)
    if source == "mmyolo":
        arrays = mmyolo_names(arrays)
        assert not set(arrays) & {name for name in state[1] if name.startswith(("neck.", "bbox_head."))}
    if source == "mmrazor":
        other = weights.to_torch(detector, *detector.init(jax.random.key(4)))
        arrays = {f"teacher.{k}": v for k, v in other.items()} | {f"architecture.{k}": v for k, v in arrays.items()}
    save_file({f"state_dict.{name}": np.array(value) for name, value in arrays.items()}, tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    command = ["import-weights", str(tmp_path / "w.safetensors"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"]
    command += [f"--classes={tmp_path / 'names.txt'}", "--image-size=64,96"]
    assert cli.main(command) == 0 and "550,882" in capsys.readouterr().out
    loaded, params, stats, classes = weights.load(tmp_path / "m")
    assert (loaded.name, classes) == ("rtmdet_pico", CLASSES)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["image_size"] == [64, 96]
    for mine, theirs in zip((params, stats), detector.init(jax.random.key(3)), strict=True):
        for path, value in flatten(theirs).items():
            np.testing.assert_array_equal(flatten(mine)[path], value, err_msg=path)


def test_mmyolos_large_models_have_no_exponential(tmp_path):
    for name, options in (("rtmdet_m", {}), ("rtmdet_m", {"exp_on_reg": True}), ("rtmdet_s", {})):
        detector = build(name, 3, widen=0.0625, deepen=0.1, **options)
        state = weights.to_torch(detector, *detector.init(jax.random.key(3)))
        for theirs in (False, True):
            np.savez(tmp_path / "w.npz", **(mmyolo_names(state) if theirs else state))
            loaded = weights.load(tmp_path / "w.npz", detector)[0]
            told = {"exp_on_reg": False} if theirs and (name, options) == ("rtmdet_m", {}) else {}
            assert loaded.options == detector.options | told


@pytest.mark.user_input(
    "Weights", "class names that are missing, too few, twice or blank", "refused: every class needs a name of its own"
)
@pytest.mark.user_input("Config and flags", "an image size that is no multiple of 32", "refused: multiples of 32")
def test_import_weights_refuses(tmp_path, capsys, state):
    file = tmp_path / "w.npz"
    np.savez(file, **state[1])
    (tmp_path / "names.txt").write_text("a\nb\n")
    base = ("import-weights", str(file), f"--out={tmp_path / 'm'}")
    assert "does not name its 6 classes" in refused(capsys, *base, "--detector=rtmdet_pico")
    names = f"--classes={tmp_path / 'names.txt'}"
    told = refused(capsys, *base, "--detector=rtmdet_pico", names)
    assert told.endswith("w.npz: it has 6 classes, but class_names names 2: a, b")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    told = refused(capsys, *base, "--detector=rtmdet_pico", f"--classes={tmp_path / 'twice.txt'}")
    assert told.endswith("twice.txt:3 has the name 'a' twice: every class needs a name of its own")
    (tmp_path / "void.txt").write_text("\n \n")
    told = refused(capsys, *base, "--detector=rtmdet_pico", f"--classes={tmp_path / 'void.txt'}")
    assert told.endswith("void.txt has no names of classes")
    for name in (None, 3, " "):
        coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": name}]}
        (tmp_path / "coco.json").write_text(json.dumps(coco))
        told = refused(capsys, *base, "--detector=rtmdet_pico", f"--classes={tmp_path / 'coco.json'}")
        assert told.endswith(f"coco.json has the name {name!r} for a class: every class needs a name of its own")
    assert "unknown detector 'rtmdet_big'" in refused(capsys, *base, "--detector=rtmdet_big", names)
    assert "multiples of 32" in refused(capsys, *base, "--detector=rtmdet_pico", names, "--image-size=100,64")
    (tmp_path / "six.txt").write_text("\n".join(CLASSES))
    assert "do not fit rtmdet_micro" in refused(
        capsys, *base, "--detector=rtmdet_micro", f"--classes={tmp_path / 'six.txt'}"
    )
    assert "there is no such file or folder" in refused(
        capsys, "import-weights", str(tmp_path / "no.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert "give --detector=NAME" in refused(capsys, *base)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    other = ("import-weights", str(tmp_path / "other.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}")
    told = "it holds no classifier of rtmdet_pico: its names (a) are not those of rtmdet_pico: choose"
    assert told in refused(capsys, *other)
    np.savez(tmp_path / "other.npz", **{f"net.{name}": value for name, value in state[1].items()})
    assert "rtmdet_pico: its names have the unknown prefix 'net.' (net.backbone." in refused(capsys, *other)
    assert not (tmp_path / "m").exists()


@pytest.mark.user_input(
    "Weights", "a negative variance, values beyond float32, integers", "refused with the array and the reason"
)
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("backbone.stem.0.conv.weight", np.nan, "contains NaN (a diverged run?)"),
        ("bbox_head.reg_convs.1.0.conv.weight", -np.inf, "contains infinite values (a diverged run?)"),
        ("backbone.stem.0.bn.running_var", -0.5, "has a negative variance (-0.5)"),
        ("backbone.stem.0.bn.weight", 1e39, "contains values beyond float32"),
        ("backbone.stem.0.bn.weight", 3, "holds integers (int64): weights that are quantised are not read"),
    ],
)
def test_values_that_cannot_be_used(tmp_path, capsys, state, name, value, told):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    np.savez(tmp_path / "w.npz", **state[1] | {name: np.full(state[1][name].shape, value)})
    command = ("import-weights", str(tmp_path / "w.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}")
    found = refused(capsys, *command, f"--classes={tmp_path / 'names.txt'}")
    assert found == f"kdjax: {tmp_path / 'w.npz'}: the values of 1 array cannot be used: {name} {told}"


FOREIGN = "it holds no classifier of rtmdet_pico: its names ({}) are not those of rtmdet_pico: choose "


@pytest.mark.user_input("Weights", "a safetensors file without arrays", "refused: it holds no arrays by name")
@pytest.mark.user_input("Weights", "arrays of other names: bool, uint16, a list as npz", "refused: names what it holds")
@pytest.mark.user_input("Weights", "an npz of Python objects", "refused: kdjax never runs code from a file")
@pytest.mark.user_input("Weights", "weights without running statistics", "refused: names those that are missing")
@pytest.mark.user_input("Weights", "weights without `num_batches_tracked`", "read")
def test_arrays_that_are_no_weights(tmp_path, capsys, state):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))

    def command(file: str) -> tuple[str, ...]:
        flags = ("--detector=rtmdet_pico", f"--out={tmp_path / 'm'}", f"--classes={tmp_path / 'names.txt'}")
        return "import-weights", str(tmp_path / file), *flags

    def told(file: str) -> str:
        return refused(capsys, *command(file)).removeprefix(f"kdjax: {tmp_path / file}: ")

    save_file({}, tmp_path / "empty.safetensors")
    assert told("empty.safetensors") == "it holds no arrays by name"
    save_file({"a": np.zeros(3, bool), "b": np.array(3, np.uint16)}, tmp_path / "strange.safetensors")
    assert told("strange.safetensors") == FOREIGN.format("a, b") + "the detector that they are of"
    np.savez(tmp_path / "nested.npz", state_dict=np.array([1]), epoch=np.array(3))
    assert told("nested.npz") == FOREIGN.format("epoch, state_dict") + "the detector that they are of"
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    assert told("objects.npz") == "a holds Python objects, and kdjax never runs code from a file"
    arrays = {name: np.array(value) for name, value in state[1].items()}
    rest = {name: value for name, value in arrays.items() if "running" not in name}
    save_file(rest, tmp_path / "no_stats.safetensors")
    first = next(name for name in arrays if "running" in name)
    assert told("no_stats.safetensors").startswith(
        f"the weights do not fit rtmdet_pico with 6 classes and options {{}}; {len(arrays) - len(rest)} differences: "
        f"{first} is missing; "
    )
    assert not (tmp_path / "m").exists()
    save_file({n: v for n, v in arrays.items() if "num_batches" not in n}, tmp_path / "no_counters.safetensors")
    assert cli.main(command("no_counters.safetensors")) == 0


@pytest.mark.user_input(
    "Weights", "a list of classes that is neither text nor COCO json", "refused: cannot be read as class names"
)
def test_import_weights_of_damaged_files(tmp_path, capsys, state):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    names = f"--classes={tmp_path / 'names.txt'}"
    told = spoilt(tmp_path, state[1])
    for name, words in told.items():
        command = ("import-weights", str(tmp_path / name), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}", names)
        assert words in refused(capsys, *command), name
    (tmp_path / "x.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1}]}')
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("x.json", "x.txt"):
        command = ("import-weights", str(tmp_path / "whole.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}")
        assert f"{name} cannot be read as class names" in refused(capsys, *command, f"--classes={tmp_path / name}")
    assert not (tmp_path / "m").exists() and not (tmp_path / "executed").exists()


@pytest.mark.user_input("Weights", "class names in another order than the file's own", "refused: in another order")
def test_pth_tells_its_classes(tmp_path, state):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    arrays = {name: torch.tensor(value) for name, value in state[1].items()}
    for key, meta in (("new", {"dataset_meta": {"classes": tuple(CLASSES)}}), ("old", {"CLASSES": CLASSES})):
        torch.save({"meta": meta, "state_dict": arrays}, tmp_path / f"{key}.pth")
        assert weights.read_checkpoint(tmp_path / f"{key}.pth")[1] == CLASSES
    with pytest.raises(
        ValueError, match=r"old\.pth: its own metadata has the classes of class_names in another order: di"
    ):
        inference.load(tmp_path / "old.pth", "rtmdet_pico", class_names=CLASSES[::-1])
    renamed = [f"{name}s" for name in CLASSES]
    assert inference.load(tmp_path / "old.pth", "rtmdet_pico", class_names=renamed).class_names == tuple(renamed)


@pytest.mark.user_input(
    "Models and exports", "a model of a run whose classes get other names", "read: canvas, ids and EXIF setting stay"
)
def test_the_classes_of_a_model_are_renamed(tmp_path, capsys):
    detector = build("rtmdet_pico", 2)
    variables = detector.init(jax.random.key(3))
    extra = {"category_ids": [7, 9], "exif_orientation": "upright", "steps": 5}
    saved = {"classes": ["cat", "dog"], "image_size": (64, 96), "dtype": "float16", "extra": extra}
    weights.save(tmp_path / "m", detector, *variables, **saved)
    names = tmp_path / "names.txt"
    names.write_text("tom cat\ndog\n")
    command = ["import-weights", str(tmp_path / "m"), f"--out={tmp_path / 'n'}"]
    assert cli.main([*command, f"--classes={names}"]) == 0
    assert "rtmdet_pico with" in capsys.readouterr().out
    old, new = inference.load(tmp_path / "m"), inference.load(tmp_path / "n")
    assert new.class_names == ("tom cat", "dog")
    assert (new.category_ids, new.exif_orientation, new.image_size) == ((7, 9), "upright", (64, 96))
    assert (new.detector.name, new.detector.options) == (old.detector.name, old.detector.options)
    for one, other in zip(jax.tree.leaves(new.variables), jax.tree.leaves(old.variables), strict=True):
        np.testing.assert_array_equal(one, other)
    stored = json.loads((tmp_path / "n" / "config.json").read_text())
    assert (stored["extra"], stored["dtype"]) == (extra | {"source": "m"}, "float16")
    assert "n is the folder of a model: choose" in refused(capsys, *command, f"--classes={names}")
    command[-1] = f"--out={tmp_path / 'o'}"
    assert "give --classes=FILE to rename its classes: cat, dog" in refused(capsys, *command)
    file = str(tmp_path / "m" / "model.safetensors")
    for wrong, words in (("a\n", "1 names, "), ("DOG\nkitten\n", "another order than that of")):
        names.write_text(wrong)
        assert words in refused(capsys, "import-weights", file, f"--out={tmp_path / 'o'}", f"--classes={names}")
    assert "leave --detector out" in refused(capsys, *command, "--detector=rtmdet_pico")
    flags = (f"--classes={names}", "--image-size=64,64")
    assert "--image-size and --network have no effect" in refused(capsys, *command, *flags)
    state = weights.to_torch(detector, *variables)  # another program's config.json lies beside the weights
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    save_file({name: np.array(value) for name, value in state.items()}, tmp_path / "other" / "model.safetensors")
    names.write_text("tom cat\ndog\n")
    foreign = ("import-weights", str(tmp_path / "other"), f"--out={tmp_path / 'o'}", f"--classes={names}")
    assert "its config.json is not of kdjax" in refused(capsys, *foreign)
    command = ["import-weights", str(tmp_path / "other" / "model.safetensors"), "--detector=rtmdet_pico"]
    assert cli.main([*command, f"--out={tmp_path / 'p'}", f"--classes={names}"]) == 0
    assert inference.load(tmp_path / "p").class_names == ("tom cat", "dog")
    capsys.readouterr()
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    told = refused(capsys, "import-weights", str(tmp_path / "w.npz"), f"--out={tmp_path / 'o'}")
    assert "give --detector=NAME" in told and not (tmp_path / "o").exists()
    before = (tmp_path / "other" / "model.safetensors").read_bytes()
    for there in ("m", "other"):
        told = refused(capsys, *command, f"--out={tmp_path / there}", f"--classes={names}")
        assert f"--out: {tmp_path / there} is the folder of a model: choose another folder" in told
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == before
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")  # beside weights of another format
    told = refused(capsys, *command, f"--out={tmp_path / 'bin'}", f"--classes={names}")
    assert "bin has a config.json, which would be replaced: choose another folder" in told
    told = refused(capsys, "import-weights", file, "--detector=rtmdet_pico", f"--out={tmp_path / 'o'}")
    assert "it is the file of a kdjax model, which names its detector: give its folder, without a detector" in told


def test_the_classes_of_a_checkpoint_are_renamed(finished, tmp_path):
    half = finished[0].parent / "half" / "checkpoints"
    old = inference.load(half)
    names = [f"{name}s" for name in old.class_names]
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert (
        cli.main(["import-weights", str(half), f"--classes={tmp_path / 'names.txt'}", f"--out={tmp_path / 'n'}"]) == 0
    )
    new = inference.load(tmp_path / "n")
    assert (new.class_names, new.category_ids) == (tuple(names), old.category_ids)
    for one, other in zip(jax.tree.leaves(new.variables), jax.tree.leaves(old.variables), strict=True):
        np.testing.assert_array_equal(one, other)
