"""Every config resolves, and so does every command of the docs and configs that trains."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kdjax import methods
from kdjax.commands.settings import read
from kdjax.detectors import build
from kdjax.distill import Distiller
from kdjax.errors import UserError
from kdjax.training import checks, optim
from kdjax.training import config as settings
from kdjax.training.models import named_detector

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
TEXTS = [
    *CONFIGS,
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*")),
]


def load(path: Path, *args: str):
    return read(":".join([str(path), *args]))


def commands() -> list[str]:
    """The flags of every command that trains, with continuation lines joined."""
    found = []
    for path in TEXTS:
        if path.is_file() and path.suffix in (".py", ".md"):
            text = re.sub(r"\\+\n\s*", " ", path.read_text())
            found += [m[1].split("#")[0] for m in re.finditer(r"(?:train\.py|kdjax train)((?: --[^\s`]+)+)", text)]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_has_known_keys_and_a_possible_schedule(path):
    config = load(path)
    assert settings.unknown_keys(config) == []
    optim.learning_rate(config)
    for name, options in config.methods.items():
        methods.build(name, **options)
    has_teacher = bool(config.teacher.detector or config.teacher.weights)
    assert bool(config.methods) == has_teacher or path.parent.name == "distill", "there the command names the teacher"
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    assert f"--config={name}" in path.read_text(), "the docstring shows the command"


@pytest.mark.parametrize("command", commands())
def test_documented_command(command):
    flags = shlex.split(command)
    if any("NAME" in flag for flag in flags):
        pytest.skip("a pattern, not a command")
    [config] = [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")]
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    others = {flag.partition("=")[0] for flag in flags if not flag.startswith("--config")}
    assert others <= {"--workdir", "--multihost", "--coordinator", "--hosts", "--host"}
    read(config, overrides)


def test_several_methods_add_up():
    config = load(ROOT / "configs" / "quickstart.py", "mkd+rtmdet_cwd")
    assert set(config.methods) == {"mkd", "rtmdet_cwd"}


SIZES = ("tiny", "s", "m", "l", "x")


@pytest.mark.parametrize("pair", [(None, "tiny"), *zip(SIZES[1:], SIZES, strict=False)], ids=str)
def test_the_published_recipe(pair):
    """Every number of MKD's training (its section 4.1) and of the RTMDet recipe under it, on the resolved config."""
    teacher, student = pair
    config = (
        load(ROOT / "configs/distill/mkd_rtmdet.py", f"{student},{teacher}")
        if teacher
        else load(ROOT / "configs/supervised/rtmdet.py", student)
    )
    data = config.data.to_dict()
    assert config.student.detector == f"rtmdet_{student}"
    assert config.teacher.detector == (f"rtmdet_{teacher}" if teacher else "")
    assert list(config.methods) == (["mkd"] if teacher else []) and config.twin == bool(teacher)
    assert (data["source"], data["image_size"]) == ("tfds", (640, 640))
    assert config.batch_size == 256
    assert config.steps == round(300 * 118287 / 256) == 138618
    assert data["stage2"]["start"] == round(280 * 118287 / 256) == 129376
    optimizer = dict(name="adamw", lr=0.004, weight_decay=0.05, clip_norm=0.0, warmup=1000, flat=0.5, end=0.05)
    assert config.optimizer.to_dict() == optimizer | dict(momentum=0.0, drops=(), backbone=1.0)
    assert 1 - config.ema.momentum == 0.9998 and config.ema.ramp == 2000
    rate = optim.learning_rate(config)
    at = [float(rate(step)) for step in (0, 1000, 69309, 138618)]
    assert at == pytest.approx([4e-8, 4e-3, 4e-3, 2e-4], rel=2e-3)
    small = student == "tiny"
    scale = (0.5, 2.0) if student in ("tiny", "s") else (0.1, 2.0)
    single = dict(mosaic=False, mixup=0.0, cache=40, flip=0.5, scale=scale, crop=True, hsv=(5.0, 30.0, 30.0))
    single |= dict(distort=0.0, zoom_out=0.0, iou_crop=0.0)
    assert data["stage2"]["augment"] == single
    assert data["augment"] == single | dict(mosaic=True, mixup=0.5 if small else 1.0, cache=20 if small else 40)
    if teacher:
        other = load(ROOT / "configs/distill/mkd_rtmdet.py", f"{student},{teacher},rtmdet_cwd")
        assert list(other.methods) == ["rtmdet_cwd"] and other.steps == config.steps
        mkd = config.methods.mkd.to_dict()
        assert (mkd["weight"], mkd["scales"], mkd["start"], mkd["stop"]) == (1.0, (1, 2, 4), 0, 0)


@pytest.mark.user_input(
    "Config and flags", "a wrong argument of a recipe", "refused: must be STUDENT,TEACHER or STUDENT,TEACHER,METHODS"
)
@pytest.mark.parametrize("chosen", ["tiny", "tiny,s,mkd,pkd"])
def test_the_recipe_says_what_its_argument_is(chosen):
    with pytest.raises(ValueError, match="must be STUDENT,TEACHER or STUDENT,TEACHER,METHODS, not '" + chosen):
        load(ROOT / "configs/distill/mkd_rtmdet.py", chosen)


DENSE = [
    "retinanet,ssim",
    "retinanet,rm+pfi",
    *(f"retinanet,{name}" for name in ("fgd", "mgd", "cwd", "crosskd", "pkd")),
]
DENSE += ["fcos,fgd", "fcos,crosskd", "gfl,ld", "gfl,crosskd", "gfl,bckd", "gfl,cwd", "atss,crosskd"]


@pytest.mark.parametrize("chosen", DENSE)
def test_the_dense_recipes(chosen):
    """mmdetection's schedule on the resolved config, and methods with options that run on these detectors."""
    config = load(ROOT / "configs/distill/dense.py", chosen)
    family, names = chosen.split(",")
    epochs = 24 if chosen in ("retinanet,fgd", "retinanet,mgd", "retinanet,cwd", "retinanet,pkd", "fcos,fgd") else 12
    assert config.steps == round(epochs * 118287 / 16) and config.batch_size == 16
    rate = optim.learning_rate(config)
    drops = (round(epochs * 2 / 3 * 118287 / 16), round(epochs * 11 / 12 * 118287 / 16))
    at = [float(rate(step)) for step in (0, 500, drops[0] - 1, drops[0], drops[1], config.steps)]
    assert at == pytest.approx([1e-7, 0.01, 0.01, 0.001, 0.0001, 0.0001], rel=4e-3)
    assert sorted(config.methods) == sorted(names.split("+")) and config.twin
    pair = [build(config[role].detector, 80) for role in ("student", "teacher")]
    assert [detector.name.split("-")[0] for detector in pair] == [f"{family}_r50", f"{family}_r101"]
    distiller = Distiller(*pair, {name: methods.build(name, **options) for name, options in config.methods.items()})
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    assert jax.eval_shape(lambda key: distiller.init(key, (64, 64)), key).keys() == set(config.methods)


TWO_STAGES = ["faster_rcnn,ssim", "faster_rcnn,dkd+fgfi+gid", "mask_rcnn,fgd+mgd+pkd", "mask_rcnn,mkd"]


@pytest.mark.parametrize("chosen", TWO_STAGES)
def test_the_recipes_of_two_stages(chosen):
    """mmdetection's schedule, the authors' values for two stages, and methods that run on these detectors."""
    config = load(ROOT / "configs/distill/two_stage.py", chosen)
    family, names = chosen.split(",")
    epochs = 24 if family == "mask_rcnn" else 12
    assert config.steps == round(epochs * 118287 / 16) and (config.batch_size, config.optimizer.lr) == (16, 0.02)
    assert sorted(config.methods) == sorted(names.split("+")) and config.twin
    assert config.optimizer.clip_norm == (35 if "fgd" in names else 0)
    built = {name: methods.build(name, **options) for name, options in config.methods.items()}
    if "fgd" in names:  # the tables of the methods' authors
        weights = {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7}
        assert built["fgd"].weights == weights and config.methods.fgd.temperature == 0.5
        assert (built["mgd"].weights, config.methods.mgd.drop) == ({"generation": 5e-7}, 0.45)
        assert built["pkd"].weights == {"correlation": 6} and built["pkd"].reads.teacher == ("neck.0:4",)
    pair = [build(config[role].detector, 80) for role in ("student", "teacher")]
    assert [detector.name for detector in pair] == [f"{family}_r50", f"{family}_r101"]
    assert config.data.masks == bool(pair[0].masks)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    made = jax.eval_shape(lambda key: Distiller(*pair, built).init(key, (64, 64)), key)
    assert made.keys() == set(config.methods)
    with pytest.raises(ValueError, match=r"must be FAMILY,METHODS with a family of faster_rcnn, .*, not 'fcos,"):
        load(ROOT / "configs/distill/two_stage.py", "fcos,ssim")


def test_the_recipe_of_masks_reads_them():
    config = load(ROOT / "configs/distill/mkd_rtmdet.py", "ins_tiny,ins_s")
    plain = load(ROOT / "configs/distill/mkd_rtmdet.py", "tiny,s")
    assert (config.student.detector, config.teacher.detector) == ("rtmdet_ins_tiny", "rtmdet_ins_s")
    assert config.data.masks and not plain.data.masks
    assert (config.data.source, config.data.train_split) == ("coco_folder", "train2017")
    assert config.data.augment == plain.data.augment and config.optimizer == plain.optimizer
    checks.check_settings(config)


def test_sgd_drops_its_rate_and_decays_what_decays():
    config = settings.base()
    config.steps = 10
    config.optimizer.update(dict(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.2, warmup=0, drops=(1,)))
    params = {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
    optimizer = optim.optimizer(config, lambda tree: {"kernel": False, "bias": True})
    state, gradient = optimizer.init(params), {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
    first, state = optimizer.update(gradient, state, params)
    assert (float(first["kernel"][0]), float(first["bias"][0])) == pytest.approx((-0.12, -0.1))
    second, _ = optimizer.update(gradient, state, params)  # momentum: 0.5 of before and the new; a tenth of the rate
    assert (float(second["kernel"][0]), float(second["bias"][0])) == pytest.approx((-0.018, -0.015))
    for drops in ((5, 3), (0,), (10,)):
        config.optimizer.drops = drops
        with pytest.raises(ValueError, match="drops must be ascending steps between the end of the warm-up"):
            optim.learning_rate(config)


def test_the_dense_recipe_says_what_its_argument_is():
    with pytest.raises(ValueError, match=r"must be FAMILY,METHODS with a family of retinanet.*, not 'rtmdet"):
        load(ROOT / "configs/distill/dense.py", "rtmdet,mkd")


@pytest.mark.user_input("Config and flags", "an option that the detector does not have", "refused with its options")
def test_options_of_a_detector():
    config = load(ROOT / "configs" / "supervised" / "coco_folder.py", "fcos_r18")
    config.student.options.update(base_channels=32, norm_eval=False)
    checks.check_settings(config)
    checks.check_models(config)
    assert named_detector(config.student, 1).options == {"base_channels": 32, "norm_eval": False}
    config.student.detector = "rtmdet_tiny"
    with pytest.raises(
        UserError, match=r"config.student: rtmdet_tiny has no option base_channels, norm_eval: its opti"
    ):
        checks.check_models(config)
    config.student.update(detector="", weights="x")
    with pytest.raises(UserError, match=r"config.student.options has no effect unless config.student.detector is set"):
        checks.check_models(config)


@pytest.mark.user_input(
    "Config and flags",
    "a value of the wrong type in a config file",
    "refused: config.optimizer.lr must be a number, not '1'",
)
@pytest.mark.user_input(
    "Config and flags", "a mistake of Python in a config file", "refused: FILE: line 4: invalid syntax"
)
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("config.data.augment.hsv = ('x',)", "config.data.augment.hsv must be a tuple of numbers, not ('x',)"),
        (
            "config.data.image_size = ('64', '64')",
            "config.data.image_size must be a tuple of numbers, not ('64', '64')",
        ),
        ("config.data = dict(config.data.to_dict(), check='no')", "config.data.check must be True or False, not 'no'"),
        ("config.optimizer = dict(config.optimizer, lr='1')", "config.optimizer.lr must be a number, not '1'"),
        (
            "config.optimizer = dict(config.optimizer, warmup=1.5)",
            "config.optimizer.warmup must be an integer, not 1.5",
        ),
        ("config.steps = 'many'", r"FILE: line 4: TypeError: .*override field 'steps' .*"),
        ("config.optimizer.lr()", "FILE: line 4: TypeError: 'float' object is not callable"),
        ("import nowhere", "FILE: line 4: ModuleNotFoundError: No module named 'nowhere'"),
        ("config.steps =", "FILE: line 4: invalid syntax"),
    ],
    ids=str,
)
def test_mistakes_in_a_config_file_get_a_sentence(line, told, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from kdjax.training.config import base\ndef get_config():\n"
        f"    config = base()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError) as caught:
        checks.check_settings(read(str(file)))
    expected = (
        told.replace("FILE", re.escape(str(file))) if ".*" in told else re.escape(told.replace("FILE", str(file)))
    )
    assert re.fullmatch(expected, str(caught.value).splitlines()[0])


def test_a_config_file_may_be_named_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def get_config():\n    return 1 + ''\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^own.py: line 2: TypeError: unsupported operand"):
        read("own.py")


@pytest.mark.user_input("Config and flags", "an option of the wrong type", "refused: must be float | None, not 'wide'")
@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_options_of_a_detector_are_flags():
    flags = ["--config.student.detector=fcos_r18", "--config.student.options.style=pytorch"]
    config = read("configs/quickstart.py", [*flags, "--config.student.options.frozen_stages=-1"])
    assert named_detector(config.student, 1).options == {"style": "pytorch", "frozen_stages": -1}
    config = read("configs/quickstart.py", ["--config.student.options.widen=wide"])
    with pytest.raises(UserError, match=r"config.student: rtmdet_pico: option widen must be float \| None, not 'wide'"):
        checks.check_models(config)
    with pytest.raises(UserError, match=r"unknown setting config.optimizer.lrr \(did you mean config.optimizer.lr\?"):
        read("configs/quickstart.py", ["--config.optimizer.lrr=1"])


def test_the_recipes_of_transformers_are_the_authors():
    config = load(ROOT / "configs/supervised/transformers.py", "dfine_l")
    epoch = 118287 / 32
    assert (config.batch_size, config.steps, config.data.stage2.start) == (32, int(80 * epoch), int(72 * epoch))
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup) == (2.5e-4, 1.25e-4, 0.1, 500)
    assert optimizer.backbone == pytest.approx(0.05)
    rate = optim.learning_rate(config)
    assert [float(rate(step)) for step in (500, config.steps - 1)] == pytest.approx([2.5e-4] * 2)
    strong, plain = config.data.augment, config.data.stage2.augment
    assert (strong.distort, strong.zoom_out, strong.iou_crop) == (1.0, 0.5, 0.8)
    assert (plain.distort, plain.zoom_out, plain.iou_crop) == (0.0, 0.0, 0.0)
    assert 1 - config.ema.momentum == 0.9999 and config.ema.ramp == 1000
    plain = load(ROOT / "configs/supervised/transformers.py")
    assert (plain.steps, plain.data.stage2.start, plain.optimizer.warmup) == (72 * 118287 // 16, 0, 0)
    with pytest.raises(ValueError, match=r"the detector must be one of rtdetr_r18, .*, not 'detr'"):
        load(ROOT / "configs/supervised/transformers.py", "detr")
