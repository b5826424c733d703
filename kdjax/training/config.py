"""All settings of a run with their defaults; a config in `configs/` starts from `base()` and changes some."""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, cast

from ml_collections import ConfigDict, FieldReference

from kdjax import methods as zoo
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.resources import Config

AUTO = "auto"  # a setting that a run finds itself: `batch_size`, the `weight` of a method


def base() -> Config:
    """The default settings. A config with other keys is refused."""
    config: Config = ConfigDict()
    config.seed = 0
    # Images per step, over all devices of all hosts; or "auto": as many as the memory allows (docs/devices.md)
    config.batch_size = FieldReference(16, field_type=object)
    config.steps = 1000  # optimizer updates
    # Precision of feature maps in training: "float32", "bfloat16", or "auto", which is bfloat16 on GPUs and TPUs and
    # float32 on CPUs. Parameters, statistics, losses, boxes and evaluations are always float32.
    config.dtype = "auto"
    # Where parameters, moments, the moving average and teachers lie: "replicated", a copy on each device, or "fsdp",
    # split over all devices of all hosts (docs/devices.md)
    config.sharding = "replicated"

    config.student = ConfigDict(
        dict(
            detector="rtmdet_tiny",
            # keyword arguments of the detector, as in --config.student.options.widen=0.25;
            # `kdjax.detectors.options(name)` lists them
            options={},
            # initial weights, in any format that `teacher.weights` accepts; the classes may differ. "" = random
            # initialisation
            weights="",
        )
    )
    # Of a student with the option int8: the share of the steps after which its values are rounded to 8 bits. Until then
    # it is trained in float, and the ranges of its maps are observed (docs/int8.md)
    config.int8_start = 0.5
    config.teacher = ConfigDict(_teacher())
    config.methods = ConfigDict()  # {method: its options}; the terms of several methods are added
    # Several teachers at once, instead of `teacher` and `methods`: {name: `teacher(...)`}
    config.teachers = ConfigDict()
    # Which rows of predictions methods compare: auto (by place; of transformers, whose queries have none, by_hungarian
    # or, with another detector, by_overlap), by_place, by_location, by_overlap or by_hungarian
    config.pairing = "auto"
    # Of methods whose weight is "auto" (config.methods.NAME.weight): they hold a share of the gradient at the student's
    # neck (kdjax/training/auto_weight.py)
    config.auto_weight = ConfigDict(
        dict(
            share=0.3,  # of all of them together, between 0 and 1; each has the same part of it
            every=50,  # steps between measurements; at the start they are closer
            start=1.0,  # first factor of the published weights
            bounds=(1e-4, 1e4),  # of that factor
            log=False,  # measure and log the shares also where all weights are fixed
        )
    )
    config.twin = False  # also train the same student on the same batches without the teacher, for comparison

    config.data = ConfigDict(
        dict(
            # scenes (generated images), coco_folder, yolo_folder, voc_folder, tfds (prepared TFDS directories), or
            # folder: one of the last four, by what lies in root
            source="scenes",
            root="",  # the folder; of YOLO also its data.yaml
            # names of classes by index, for yolo_folder and voc_folder: coco, voc, or a file (a name per line, COCO's
            # json, data.yaml); "" takes those of the data
            classes="",
            train_split="train",
            val_split="val",
            # Explicit paths of the jsons (of yolo_folder and voc_folder: the folders of labels) and of the image
            # folders, absolute or relative to root; "" searches the usual layouts. With tfds, the json gives category
            # ids and exact areas.
            train_annotations="",
            val_annotations="",
            train_images="",
            val_images="",
            cache="",  # folder of prepared data; "" is $KDJAX_CACHE, or ~/.cache/kdjax
            # stored: boxes refer to the pixels as they are stored; upright: to the image as EXIF's orientation turns it
            exif_orientation="stored",
            scenes_train=2000,  # number of images of scenes
            scenes_val=400,
            image_size=(640, 640),  # height, width of the canvas, px
            masks=False,  # training batches have masks, at a quarter of the resolution; objects without are left out
            max_boxes=0,  # padded boxes per image; 0: the largest number in the data, more with Mosaic and MixUp
            # folder of further images, without labels (all images below it): distillation terms alone. "" = none
            unlabelled="",
            unlabelled_ratio=1.0,  # number of them in a batch, as a multiple of batch_size
            # score from which on the teacher's detections are the boxes of these images, for methods that need boxes
            unlabelled_score=0.5,
            # number of augmented views of an image, whatever the seed: epoch e shows view e mod views; 0: endless draws
            views=0,
            workers=0,  # worker processes that decode and augment; 0 uses threads of this process
            keep=1.0,  # GiB of decoded training images that stay in memory, once for all workers of a host; 0: none
            longest=0,  # px: training images with a longer side are shrunk to it when they are decoded; 0: none are
            limit=0,  # only the first images of each split; 0 takes all
            # share of the training images, chosen by their content, that are held out: runs validate on them, and the
            # validation split is not read; 0: none are
            holdout=0.0,
            check=False,  # dry run: print a summary of the data, write example batches as images, and exit
            # host, or device: decoded images are resized, pasted, cropped, flipped, coloured and mixed there
            augment_on="host",
            augment=augment(),
            stage2=dict(
                start=0,  # first step (from 0) with the augmentation below; 0: there is no second stage
                augment=augment(),
            ),
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # or sgd
            momentum=0.0,  # of sgd
            lr=0.0,  # learning rate; 0 = 0.004 * batch_size / 256 with adamw, 0.01 * batch_size / 16 with sgd
            weight_decay=0.05,  # not applied to norms and biases
            clip_norm=0.0,  # maximum global norm of the gradient; 0 = no clipping
            warmup=1000,  # steps of linear warm-up, from 1e-5 * lr
            flat=0.5,  # fraction of the run after which the cosine decay starts
            end=0.05,  # final learning rate, as a fraction of lr
            backbone=1.0,  # learning rate of the student's backbone, as a fraction of lr
            drops=(),  # steps at which the rate is divided by 10, instead of the cosine decay; () = none
        )
    )
    config.ema = ConfigDict(
        dict(
            momentum=2e-4,  # weight of the new parameters after the ramp
            ramp=2000,  # steps: momentum_t = (1 - momentum) * exp(-(1 + t) / ramp) + momentum
        )
    )
    config.eval = ConfigDict(
        dict(
            every=0,  # steps between evaluations; 0 = only after training
            batch_size=16,
            limit=0,  # number of validation images in evaluations during training; 0 = all. The final one uses all
        )
    )
    # What happens when a loss or the gradient is not finite (docs/failures.md): stop; skip: the update is left out; or
    # rollback: to the last checkpoint, and the batches since then are left out
    config.on_bad_step = "stop"
    # Such a step is also one whose total loss or gradient norm is above these; 0: no bound
    config.bad_step = ConfigDict(dict(loss=0.0, grad_norm=0.0))
    # Steps between those that are computed twice and compared to the bit, to find devices that compute wrongly; 0: none
    config.recheck_every = 0
    # A finished run goes on if `steps` is larger than before and its learning rates so far are those of the longer run.
    config.extend = False
    config.log_every = 20  # steps between lines in metrics.jsonl
    config.log = ConfigDict(
        dict(
            # where metrics go, of jsonl, tensorboard, wandb and mlflow (docs/loggers.md); metrics.jsonl is written
            # also where it is not named
            to=("jsonl", "tensorboard"),
            project="kdjax",  # project of Weights & Biases, experiment of MLflow
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every=500,  # steps; also saved at the end and on SIGTERM
            keep=2,  # the newest ones stay
            keep_best=0,  # so do those with the best AP of the student; evaluations in training save one each then
            keep_every=0,  # so do those at multiples of this step; 0: none
            keep_hours=0.0,  # so does one of every this many hours; 0: none
        )
    )
    config.compile_cache = ""  # folder; "" = $KDJAX_CACHE/jax or ~/.cache/kdjax/jax; "off" disables it
    return config


def _teacher() -> dict[str, Any]:
    return dict(
        detector="",  # needed unless `weights` is a kdjax folder; "" without weights trains without a teacher
        options={},  # as for the student; a kdjax folder brings its own
        # student/ folder of another run, .safetensors, .npz or .pth with mmdetection's names, .onnx of YOLOX or RTMDet;
        # with `layout` any .onnx; or a .json of detections on the training images (docs/teachers.md)
        weights="",
        # of an .onnx file that runs as it is, on the host ahead of the step: kdjax, yolox, yolov5, yolov8, detr,
        # mmdeploy, maps, rows or detections; `options` are what differs (kdjax/inference/layouts.py). "": a detector
        layout="",
        # folder of what the teacher says about the training batches: written first if it is missing, then read
        # instead of running the teacher. "" = the teacher runs
        cache="",
        # of the numbers there: float32 (exact), bfloat16, int8, or sparse: the best logits alone (kdjax/data/shards.py)
        cache_dtype="float32",
    )


def teacher(**changes: Any) -> Config:
    """One of several teachers, for `config.teachers.NAME`: the settings of `config.teacher`, and two more.

    Args:
      **changes: of the defaults. `methods`: those that this teacher is used with, {method: its options}, or their names
        joined by "+". `mean`: names of other teachers joined by "+", instead of `weights`: the mean of their rows is
        this teacher; they may be without methods of their own.
    """
    unknown = sorted(set(changes) - {*_teacher(), "methods", "mean"})
    if unknown:
        raise UserError(f"teacher({', '.join(unknown)}): there are no such settings: they are {', '.join(_teacher())}")
    chosen = changes.pop("methods", "")
    made = ConfigDict(_teacher() | {"mean": ""} | changes)
    made.methods = methods(chosen) if isinstance(chosen, str) else ConfigDict(chosen)
    return made


# Minimum and maximum of the numeric settings.
_AT_LEAST_1 = ("batch_size", "steps", "data.scenes_train", "data.scenes_val", "eval.batch_size", "log_every",
               "checkpoint.every", "checkpoint.keep", "auto_weight.every")  # fmt: skip
_AT_LEAST_0 = ("data.unlabelled_ratio", "data.max_boxes", "data.views", "data.workers", "data.keep", "data.longest",
               "data.limit", "optimizer.lr",
               "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.warmup", "optimizer.backbone", "ema.ramp",
                "eval.every", "eval.limit", "recheck_every", "bad_step.loss", "bad_step.grad_norm",
                "checkpoint.keep_best", "checkpoint.keep_every", "checkpoint.keep_hours")  # fmt: skip
_SHARES = ("data.holdout", "data.unlabelled_score", "optimizer.momentum", "optimizer.flat", "optimizer.end",
           "ema.momentum", "int8_start")  # fmt: skip
_RANGES = (
    dict.fromkeys(_AT_LEAST_1, (1, math.inf))
    | dict.fromkeys(_AT_LEAST_0, (0, math.inf))
    | dict.fromkeys(_SHARES, (0, 1))
    | {"seed": (0, 2**32 - 1)}
)


def check_keys(config: Config) -> None:
    """Checks that a config has the keys of `base()` and no others; options of methods and detectors are not checked.

    Raises:
      UserError: names the first unknown or missing setting.
    """
    for name in unknown_keys(config):
        if "=" in name:
            raise UserError(f"{name}: it must be a group of settings")
        raise unknown_setting(name.removeprefix("config."), base())
    for name in unknown_keys(base(), config):
        raise UserError(f"{name} is missing: start from kdjax.training.config.base()")
    for name, chosen in config.teachers.items():
        where = f"config.teachers.{name}"
        if not isinstance(chosen, ConfigDict):
            raise UserError(f"{where}={chosen!r}: it must be made by kdjax.training.config.teacher()")
        for setting in unknown_keys(chosen, teacher(), where):
            raise UserError(f"unknown setting {setting}: the settings of a teacher are {', '.join(teacher())}")
        for setting in unknown_keys(teacher(), chosen, where):
            raise UserError(f"{setting} is missing: start from kdjax.training.config.teacher()")


def check_values(config: Config) -> None:
    """Checks the type of every setting, and the range of the numeric ones.

    Raises:
      UserError: names the setting, what it must be, and its value.
    """
    values, defaults = flat(config.to_dict()), flat(base().to_dict())
    values["batch_size"] = 1 if values["batch_size"] == AUTO else values["batch_size"]
    for name in config.teachers:
        defaults |= {f"teachers.{name}.{key}": value for key, value in flat(teacher().to_dict()).items()}
    for name, default in defaults.items():
        if of_texts(default):
            value = values[name]
            if not isinstance(value, tuple | list) or not all(isinstance(entry, str) for entry in value):
                raise UserError(f"config.{name} must be a tuple of texts, not {value!r}")
        elif type(default) in KINDS and not has_type(values[name], type(default)):
            kind = f"an integer or {AUTO!r}" if name == "batch_size" else KINDS[type(default)]
            raise UserError(f"config.{name} must be {kind}, not {values[name]!r}")
    for name, (low, high) in _RANGES.items():
        value = values.get(name)
        if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
            bounds = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
            raise UserError(f"config.{name} must be {bounds}, not {value!r}")


KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text", tuple: "a tuple of numbers"}


def has_type(value: object, kind: type) -> bool:
    """Whether a setting whose default is of a type may have a value."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, tuple | list) and all(has_type(entry, float) for entry in value)
    return type(value) is kind


def of_texts(default: object) -> bool:
    """Whether the default of a setting is a tuple of texts."""
    return isinstance(default, tuple) and bool(default) and all(isinstance(entry, str) for entry in default)


def methods(names: str) -> Config:
    """The options of methods at their defaults, as sub-configs that configs and flags can change.

    Args:
      names: method names joined by "+"; "" = none.

    Raises:
      UserError: unknown method.
    """
    # ml_collections would keep the types of values, but a weight may become "auto"; `build_methods` checks them.
    return ConfigDict({name: ConfigDict(zoo.options(name), type_safe=False) for name in names.split("+") if name})


def unknown_keys(config: Config, reference: Config | None = None, prefix: str = "config") -> list[str]:
    """Full names of the keys of `config` that `reference` lacks, except below `methods` and `options`.

    Args:
      config: the config to check.
      reference: a config with all keys; None: `base()`.
      prefix: written before each name.
    """
    reference = base() if reference is None else reference
    unknown = []
    for key, value in config.items():
        expected: Any = reference[key] if key in reference else None
        if key not in reference:
            unknown.append(f"{prefix}.{key}")
        elif isinstance(expected, ConfigDict):
            if not isinstance(value, ConfigDict):
                unknown.append(f"{prefix}.{key}={value!r}")
            elif key not in ("methods", "options", "teachers"):
                unknown += unknown_keys(value, expected, f"{prefix}.{key}")
    return unknown


def unknown_setting(name: str, config: Config) -> UserError:
    """The error for a setting that does not exist, with the name of a similar one.

    Args:
      name: "a.b".
      config: a config with all settings.

    Example:
      >>> unknown_setting("optimizer.lrr", base())
      UserError('unknown setting config.optimizer.lrr (did you mean config.optimizer.lr?)')
    """
    close = similar_setting(name, config)
    return UserError(f"unknown setting config.{name}" + (f" (did you mean config.{close}?)" if close else ""))


def similar_setting(name: str, config: Config) -> str | None:
    """The setting with the most similar name, if there is one.

    Args:
      name: "a.b".
      config: a config with all settings.
    """
    leaves = flat(config.to_dict())
    names = [*leaves, *({leaf.rpartition(".")[0] for leaf in leaves} - {""})]
    # The last part alone may be right, or nearly, as in config.lr or config.train.learning_rate.weight_decy.
    last = {other.rpartition(".")[2]: other for other in reversed(names)}
    return next(
        iter(
            difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.75)
            or [
                last[part]
                for part in difflib.get_close_matches(name.lower().rpartition(".")[2], last, n=1, cutoff=0.75)
            ]
            or difflib.get_close_matches(name, names, n=1)
        ),
        None,
    )


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots.

    Example:
      >>> flat({"a": {"b": 1}, "c": 2})
      {'a.b': 1, 'c': 2}
    """
    return {path.replace("/", "."): value for path, value in flatten(dict(tree)).items()}


# Settings that may differ between a run and its resumption, because they do not change the result; or because they
# decide how a run goes on that stopped at a bad step.
_FREE = ("extend", "log", "log_every", "checkpoint", "compile_cache", "data.workers", "data.keep", "data.cache",
         "data.root", "data.unlabelled", "eval", "sharding", "teacher.cache", "on_bad_step", "bad_step",
         "recheck_every")  # fmt: skip


def differences(written: object, config: Config) -> list[str]:
    """The settings that change the result and differ from those that a run was started with.

    Args:
      written: the config of the run, as it was read from json.
      config: the config now.

    Returns:
      "optimizer.lr was 0.1, is 0.2" and the like; with `config.extend` the number of steps may differ.

    Raises:
      UserError: `written` is not the config of a run.
    """
    # Settings that are newer than the run had no effect then, and their defaults have none either.
    before = flat(json.loads(base().to_json()))
    try:
        before |= flat(cast(Any, written))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError("it is not the config of a run") from None
    now = flat(json.loads(config.to_json()))
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted((before.keys() | now.keys()) - ({"steps"} if config.extend else set()))
        if before.get(key) != now.get(key) and not is_free(key)
    ]


def is_free(key: str) -> bool:
    """Whether a setting, "a.b", cannot change the result of a run."""
    of_several = key.startswith("teachers.") and key.split(".")[2:] == ["cache"]
    return of_several or any(key == free or key.startswith(f"{free}.") for free in _FREE)


def augment(**changes: Any) -> dict[str, Any]:
    """Settings of the augmentation: the defaults with `changes`. RTMDet's are in configs/supervised/rtmdet.py."""
    defaults = dict(
        mosaic=False,  # four images around a point on twice the canvas; three of them are among the last `cache`
        mixup=0.0,  # probability of being averaged with one of the last `cache` / 2 images
        cache=40,  # number of earlier images of the same virtual stream (kdjax/data/plans.py) to choose partners from
        flip=0.5,  # probability of a horizontal flip
        scale=(0.5, 2.0),  # range of the random resize, relative to the size that fits the canvas (or the Mosaic)
        crop=True,  # random crop where the resized image is larger than the canvas
        hsv=(5.0, 30.0, 30.0),  # largest shift of hue (of 180), saturation and value (of 255); zeros switch it off
        distort=0.0,  # probability of SSD's changes of colours (kdjax/data/ssd.py), before all others
        zoom_out=0.0,  # probability of being placed on a larger black canvas
        iou_crop=0.0,  # probability of a crop that some object overlaps
    )
    return defaults | changes
