"""Tables of the RTMDet family: parameters, operations, settings, and every name and shape of the weights.

Nothing is computed here: detectors are built by shapes alone.
"""

import inspect
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kdjax.detectors import layers, rtmdet, rtmdet_ins
from kdjax.detectors.api import Detector, flatten
from kdjax.evals import complexity
from kdjax.training import config, optim
from kdjax.weights import torch_names
from tests.golden_checks import rtmdet_ins as masked
from tests.golden_checks.api import Check, Checks, UnknownCase, failure, relative_error
from tests.golden_checks.model import options_of


def _differs(got, want) -> float:
    return float(got != want)


def _variant(name: str) -> tuple[ModuleType, str]:
    """The family of a model of mmdetection, and its variant."""
    family, _, variant = name.partition("_")
    if family not in ("rtmdet", "rtmdet-ins"):
        raise UnknownCase(f"the model {name!r}")
    return {"rtmdet": rtmdet, "rtmdet-ins": rtmdet_ins}[family], variant


def replay_family(path: Path) -> Checks:
    """Every model of `rtmdet_family.json`."""
    table = json.loads(path.read_text())
    for name, row in table["models"].items():
        try:
            checks = list(_model(name, row))
        except Exception as error:  # the other models go on
            checks = [failure("whole model", error)]
        yield from (check._replace(name=f"{name} {check.name}") for check in checks)


def _model(name: str, row: dict) -> Checks:
    family, variant = _variant(name)
    fields = (masked.OPTIONS, masked.FIXED) if family is rtmdet_ins else ()
    classes, options = options_of(row["model_cfg"], *fields)
    detector = family.make(variant, classes)
    params = detector.shapes[0]
    # The variant by its name is what its configuration says, and nothing else.
    yield Check("model_cfg", _differs(family.make(variant, classes, **options).shapes, detector.shapes), 0)
    yield from _settings(detector, row)
    parts = {"params": params, **{f"params_{part}": params[part] for part in ("backbone", "neck")}}
    parts |= {"params_by_mmengine": params, "params_head": params["bbox_head"]}
    names = [n for path, n in torch_names.table(detector).items() if path.startswith("params/")]
    again = sum(
        int(np.prod(leaf.shape)) * len(copies) for leaf, copies in zip(flatten(params).values(), names, strict=True)
    )
    known = {
        **{part: complexity.parameters(tree) for part, tree in parts.items()},
        "params_with_shared_counted_again": again,
        "flops_640_mmengine": complexity.flops(detector, (640, 640)) + _again(family, detector, (640, 640)),
        "bn_eps": layers.EPS,
        "bn_momentum": layers.MOMENTUM,
        "bn_eps_momentum_seen": [[layers.EPS, layers.MOMENTUM]],
        "exp_on_reg": family is rtmdet and rtmdet.VARIANTS[variant]["exp_on_reg"],
        "share_conv": len(names) < len([n for copies in names for n in copies]),
    }
    for field, value in row.items():
        if field in known:
            error = abs(known[field] - value) if isinstance(value, int | float) else _differs(known[field], value)
            yield Check(field, float(error), 0)
        elif field == "optim_wrapper":
            yield from _optimizer(detector, value, _batch_size(row["config"]))
        elif field == "param_scheduler":
            yield _schedule(row["optim_wrapper"]["optimizer"]["lr"], *value, _batch_size(row["config"]))
        elif field not in ("config", "model_cfg", "flops_640_str", "params_str"):  # the last two: numbers as text
            raise UnknownCase(f"the field {field!r}")


def _again(family: ModuleType, detector: Detector, hw: tuple[int, int]) -> int:
    """What mmdetection's RTMDet-Ins computes twice: its one tower, for the classes and for the boxes."""
    if family is rtmdet:
        return 0
    cells = sum((hw[0] // stride) * (hw[1] // stride) for stride in detector.strides)
    tower = flatten(detector.shapes[0]["bbox_head"]["cls_convs"]["0"])
    return cells * sum(
        math.prod(leaf.shape) if path.endswith("kernel") else leaf.shape[0] for path, leaf in tower.items()
    )


def _batch_size(config: str) -> int:
    """The batch size in the name of a configuration, such as 8xb32: devices and images of each."""
    found = re.search(r"_(\d+)xb(\d+)-", config)
    if not found:
        raise UnknownCase(f"the configuration {config!r}")
    return int(found[1]) * int(found[2])


def _settings(detector: Detector, row: dict) -> Checks:
    """The settings that are code here: normalisation, strides, test settings."""
    prior, cleaner = row["model_cfg"]["bbox_head"]["anchor_generator"], row["model_cfg"]["data_preprocessor"]
    yield Check("strides", _differs(list(detector.strides), prior["strides"]), 0)
    colours = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3) * 10
    want = (colours[..., ::-1].astype(np.float64) - cleaner["mean"]) / cleaner["std"]
    yield Check("data_preprocessor", relative_error(detector.preprocess(colours), want), 1e-6)
    defaults = {name: p.default for name, p in inspect.signature(detector.decode).parameters.items()}
    ours: dict[str, Any] = {"mask_thr_binary": 0.5} if detector.masks else {}
    ours |= {
        "nms_pre": defaults["pre_nms"],
        "min_bbox_size": 0,
        "score_thr": defaults["score_threshold"],
        "nms": {"type": "nms", "iou_threshold": defaults["iou_threshold"]},
        "max_per_img": defaults["max_detections"],
    }
    yield Check("test_cfg", _differs(ours, row["model_cfg"]["test_cfg"]), 0)


def _optimizer(detector: Detector, row: dict, batch: int) -> Checks:
    """The defaults of a run at mmdetection's batch size."""
    settings = config.base().optimizer
    # Shared arrays are one array here: there is nothing to bypass.
    decay = {"norm_decay_mult": 0, "bias_decay_mult": 0, "bypass_duplicate": True}
    ours = {
        "type": "OptimWrapper",
        "optimizer": {
            "type": {"adamw": "AdamW"}[settings.name],
            "lr": settings.lr or optim.BASE_RATE * batch / optim.BASE_BATCH,
            "weight_decay": settings.weight_decay,
        },
        "paramwise_cfg": decay,
    }
    yield Check("optim_wrapper", _differs(ours, row), 0)
    left_alone = flatten(detector.no_decay(detector.shapes[0]))
    wrong = [path for path, skip in left_alone.items() if skip != path.endswith(("/scale", "/bias"))]
    yield Check("no decay on norms and biases", float(len(wrong)), 0)


def _schedule(rate: float, warmup: dict, cosine: dict, batch: int) -> Check:
    """The learning rate of the defaults at a few steps; an epoch has 100 steps."""
    epoch = 100
    run = config.base()
    run.batch_size, run.steps = batch, cosine["end"] * epoch
    known = {"type": "CosineAnnealingLR", "by_epoch": True, "convert_to_iter_based": True}
    known |= {"T_max": cosine["end"] - cosine["begin"]}
    if not known.items() <= cosine.items() or (warmup["type"], warmup["begin"]) != ("LinearLR", 0):
        raise UnknownCase(f"the schedule {warmup}, {cosine}")
    begin, end, low = cosine["begin"] * epoch, cosine["end"] * epoch, cosine["eta_min"]
    want = {
        0: rate * warmup["start_factor"],
        warmup["end"]: rate,
        begin: rate,
        (3 * begin + end) // 4: low + (rate - low) * (1 + math.cos(math.pi / 4)) / 2,
        (begin + end) // 2: (rate + low) / 2,
        end: low,
    }
    schedule = optim.learning_rate(run)
    got = np.array([float(schedule(step)) for step in want])
    return Check("param_scheduler", relative_error(got, np.array(list(want.values()))), 1e-6)


def replay_state(path: Path) -> Checks:
    """Names, shapes and sharing of one model's state dict: what a conversion uses and fills."""
    table = json.loads(path.read_text())
    state = table["state_dict"]
    classes = state["bbox_head.rtm_cls.0.bias"][0][0]
    family, variant = _variant(table["name"])
    detector = family.make(variant, classes)
    names = torch_names.table(detector)
    # Counters are what a conversion leaves out.
    kinds = {"param": set(), "buffer": {name for name in state if name.endswith("num_batches_tracked")}}
    for path_, copies in names.items():
        kinds["param" if path_.startswith("params/") else "buffer"].update(copies)
    for kind, ours in kinds.items():
        theirs = {name for name, (_, _, what) in state.items() if what == kind}
        yield Check(f"names of {kind}s", float(len(ours ^ theirs)), 0)
    leaves = flatten(dict(zip(("params", "stats"), detector.shapes, strict=True)))
    wrong = [
        name
        for path_, copies in names.items()
        for name in copies
        if list(torch_names.torch_shape(leaves[path_].shape, path_)) != state[name][0]
    ]
    yield Check("shapes", float(len(wrong)), 0)
    # The table groups parameters alone.
    shared = sorted(sorted(n) for path_, n in names.items() if len(n) > 1 and path_.startswith("params/"))
    yield Check("shared_groups", _differs(shared, sorted(sorted(group) for group in table["shared_groups"])), 0)


CHECKS = [
    ("tables/rtmdet_family.json", replay_family),
    *((f"tables/{f}_*_state.json", replay_state) for f in ("rtmdet", "rtmdet-ins")),
]
