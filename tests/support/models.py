"""Models, data and runs that the tests of the commands, of inference and of export share.

The fixtures are made known by tests/conftest.py, which imports them: kdjax is imported inside them alone.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

CLASSES = ["disc", "wedge", "star", "cross", "striped", "checked"]
SMALL = {"base_channels": 8, "neck_channels": 8, "head_channels": 8, "stacked_convs": 1}
TWO_STAGES = {
    "faster_rcnn_r18": {"base_channels": 8, "neck_channels": 8, "head_channels": 16, "proposals": 100},
}
TWO_STAGES["mask_rcnn_r18"] = TWO_STAGES["faster_rcnn_r18"] | {"mask_channels": 8, "mask_convs": 1}
TWO_STAGES["cascade_rcnn_r18"] = TWO_STAGES["mask_rcnn_r18"] | {"masks": True}
_DECODER = dict(encoder_channels=8, encoder_hidden=8, channels=8, heads=2, hidden=8, layers=2, queries=10, denoising=4)
_RTDETR = _DECODER | dict(stem=4, widths=[4, 8, 8, 8], blocks=[1, 1, 1, 1], points=2)
TRANSFORMERS = {"rtdetr_pico": _RTDETR, "rtdetrv2_pico": _RTDETR}
TRANSFORMERS["dfine_n"] = _DECODER | dict(
    stem=[4, 4], middle=[4, 4, 4, 4], widths=[4, 8, 8, 8], blocks=[1, 1, 1, 1], block_layers=[1, 1, 1, 1], repeats=1,
    bins=8, points=[2, 1],
)  # fmt: skip
OTHERS = {
    "retinanet_r18": SMALL,
    "fcos_r18": SMALL | {"groups": 4},
    "gfl_r18": SMALL | {"groups": 4},
    "atss_r18": SMALL | {"groups": 4},
    "yolox_pico": {},
    "rtmdet_ins_pico": {"widen": 0.0625, "stacked_convs": 1, "attention": False},
}


def refused(capsys, *arguments: str) -> str:
    """The one sentence of a command that is refused."""
    from kdjax import cli

    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr().err.strip()
    assert code == 2 and len(told.splitlines()) == 1, told
    return told


def refused_at_the_end(capsys, *arguments: str) -> str:
    """As `refused`, of a command that has shown a progress bar before."""
    from kdjax import cli

    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert sum("kdjax:" in line for line in lines) == 1, lines
    return lines[-1]


def read(path):
    return json.loads(path.read_text())


def mmyolo_names(state: dict) -> dict:
    """The state under mmyolo's names, written down here by its module tree."""
    parts = [("bbox_head.", "bbox_head.head_module."), ("neck.reduce_layers.0.", "neck.reduce_layers.2.")]
    parts += [("neck.reduce_layers.1.", "neck.top_down_layers.0.1."), ("neck.out_convs.", "neck.out_layers.")]
    parts += [
        ("neck.top_down_blocks.0.", "neck.top_down_layers.0.0."),
        ("neck.downsamples.", "neck.downsample_layers."),
    ]
    parts += [
        ("neck.top_down_blocks.1.", "neck.top_down_layers.1."),
        ("neck.bottom_up_blocks.", "neck.bottom_up_layers."),
    ]
    found = {}
    for name, value in state.items():
        old, new = next((pair for pair in parts if name.startswith(pair[0])), ("", ""))
        found[new + name.removeprefix(old)] = value
    return found


def lively(params, seed: int):
    """Kernels through which signals pass: of the detector's own draws all scores are 0.01."""
    from kdjax.detectors.api import flatten, unflatten

    rng = np.random.default_rng(seed)
    flat = flatten(params)
    for path, value in flat.items():
        if path.endswith("kernel"):
            gain = 0.3 if "rtm_reg" in path else 3.0
            flat[path] = rng.normal(0, (gain / np.prod(value.shape[:-1])) ** 0.5, value.shape).astype(np.float32)
    return unflatten(flat)


def save_noisy(name: str, folder: Path) -> None:
    """Weights of another family that find something."""
    import jax

    from kdjax import weights
    from kdjax.detectors import build
    from kdjax.detectors.api import flatten, unflatten

    detector = build(name, 6, **(OTHERS | TWO_STAGES | TRANSFORMERS)[name])
    params, stats = detector.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    noisy = flatten(params)
    for path, value in noisy.items():
        if "_head" in path:  # and the focal prior taken back
            noisy[path] = value + rng.normal(size=value.shape, scale=0.3).astype(np.float32) + 4 * (value < -4)
        elif name in TRANSFORMERS and value.ndim > 1 and path.startswith(("backbone", "encoder")):
            noisy[path] = 2 * value  # else all cells score alike, and rounding decides which are the queries
    weights.save(folder, detector, unflatten(noisy), stats, classes=CLASSES, image_size=(64, 64))


def random_output(model):
    """A detector's output from which many detections come, so that no network has to be compiled."""
    import dataclasses

    import jax

    from kdjax.export import graphs

    rng, found, spec = np.random.default_rng(0), [], graphs.spec(model)
    for name, shape in graphs.named_maps(spec).items():
        mean, spread = (8, 8) if name.startswith("box_reg") and spec.at is None else (-1, 2)
        found.append(rng.normal(mean, spread, shape.shape).astype(np.float32))
    output = graphs.output(model, found)
    if spec.at is None:
        return output
    _, maps = spec.at.args
    maps = [rng.normal(size=level.shape).astype(np.float32) for level in maps]
    box_reg = tuple(level * np.float32(0.3) for level in output.box_reg)
    known = (model.variables[0]["roi_head"], tuple(maps))
    fields = ("at", "masks_at", "stages")
    bound = jax.tree.map(
        lambda call: jax.tree_util.Partial(call.func, *known),
        {name: getattr(spec, name) for name in fields},
        is_leaf=lambda leaf: isinstance(leaf, jax.tree_util.Partial),
    )
    return dataclasses.replace(output, box_reg=box_reg, **bound)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Prepared data goes to a temporary folder, and not to the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def state():
    """(detector, its weights under PyTorch's names)."""
    import jax

    from kdjax import weights
    from kdjax.detectors import build

    detector = build("rtmdet_pico", 6)
    return detector, weights.to_torch(detector, *detector.init(jax.random.key(3)))


@pytest.fixture(scope="session")
def made(tmp_path_factory, cache):
    """A folder with a model of the scenes, random weights, 64x64, and a COCO folder of six scenes."""
    import jax

    from kdjax import weights
    from kdjax.data import records, scenes
    from kdjax.detectors import build
    from tests.support.data import coco_json, write_folder

    root = tmp_path_factory.mktemp("cli")
    detector = build("rtmdet_pico", 6)
    for name, seed in (("model", 0), ("other", 1)):
        params, stats = detector.init(jax.random.key(seed))
        weights.save(root / name, detector, lively(params, seed), stats, classes=CLASSES, image_size=(64, 64))
    sizes, annotations, images = {}, [], {}
    for i, (image, encoded) in enumerate(scenes.stream("val", 6)):
        sizes[image.file_name] = (128, 128)
        images[image.file_name] = records.decode(encoded)
        annotations += [(i, 5 * row["category_id"], row["bbox"], {}) for row in image.annotations]
    categories = [(5 * (i + 1), name) for i, name in enumerate(CLASSES)]
    write_folder(root / "data", {"val": coco_json(sizes, annotations, categories)}, images)
    return root


@pytest.fixture(scope="session")
def finished(made, tmp_path_factory):
    """(workdir, results) of the end of a run, without its training: the initial weights are saved."""
    import jax
    from jax.sharding import Mesh

    from kdjax import data, sharding
    from kdjax.training import checkpoint, outputs, provenance
    from kdjax.training import config as settings
    from kdjax.training.goodput import Clock
    from kdjax.training.log import Log
    from kdjax.training.setup import prepare, run_fingerprint

    folder = tmp_path_factory.mktemp("run")
    config = settings.base()
    config.student.update(dict(detector="rtmdet_pico", weights=str(made / "model")))
    config.optimizer.warmup = 1
    config.data.update(dict(cache=str(folder / "cache"), scenes_train=8, scenes_val=10, image_size=(64, 64)))
    config.eval.batch_size = 8
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
        setup = prepare(config, data.open_dataset(config.data))
        (folder / "work").mkdir()
        saved = checkpoint.Checkpoints(folder / "half" / "checkpoints", keep=2)
        note = {"next_batch": 1, "run": run_fingerprint(setup), "category_ids": [2, 3, 5, 7, 11, 13]}
        saved.save(1, setup.states, note)
        saved.close()
        provenance.write_config(config, folder / "half", setup.dataset.fingerprint)
        with Log(folder / "work", 0) as log:
            log.write(0, "train", {"student/total": 1.0, "seconds": 1.0})
            return folder / "work", outputs.finish(setup, folder / "work", log, Clock())


@pytest.fixture(scope="session")
def exported(made, tmp_path_factory):
    """A model as ONNX with decoding and NMS, measured on the COCO folder, and what the command printed."""
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    from kdjax import cli

    file = tmp_path_factory.mktemp("export") / "model.onnx"
    command = ["export", f"--model={made / 'model'}", "--format=onnx", f"--out={file}", f"--data={made / 'data'}"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert cli.main(command) == 0
    return file, told.getvalue()
