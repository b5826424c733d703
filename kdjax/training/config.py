"""Every setting of a run with its default; a config file in `configs/` starts from `base()` and changes some."""

import math

from ml_collections import ConfigDict

from kdjax import methods as zoo
from kdjax.errors import UserError


def base() -> ConfigDict:
    """The defaults. What is not a key here is refused when a run starts."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16  # global: of all devices of all hosts
    config.steps = 1000  # optimiser updates
    # float32, or bfloat16 for the maps of student and teacher in training; parameters, statistics, losses, boxes and
    # evaluations are float32 in both
    config.dtype = "float32"

    config.student = ConfigDict(
        dict(
            detector="rtmdet_tiny",
            # keywords of the detector (`kdjax.detectors.options(name)` lists them): --config.student.options.widen=0.25
            options={},
            # initial weights, in any format that `teacher.weights` accepts; the classes may differ; "": random
            # initialisation
            weights="",
        )
    )
    config.teacher = ConfigDict(
        dict(
            detector="",  # "" trains without a teacher; needed only if `weights` is not a kdjax folder
            options={},  # as the student's; a kdjax folder has its own
            # a student/ folder of another run, or .safetensors, .npz or .pth with mmdetection's names, or YOLOX's .onnx
            weights="",
        )
    )
    config.methods = ConfigDict()  # one sub-config a method, by its name; several add up
    config.twin = False  # also train the same student without the teacher on the same batches

    config.data = ConfigDict(
        dict(
            source="scenes",  # scenes (generated images), coco_folder, or tfds (prepared TFDS directories)
            root="",  # folder of coco_folder or tfds
            train_split="train",
            val_split="val",
            # Explicit paths of the jsons and image folders of coco_folder, absolute or relative to root; "" searches
            # the usual layouts. With tfds, the json gives category ids and exact areas.
            train_annotations="",
            val_annotations="",
            train_images="",
            val_images="",
            cache="",  # folder of prepared data; "" is $KDJAX_CACHE, or ~/.cache/kdjax
            scenes_train=2000,  # number of images of scenes
            scenes_val=400,
            image_size=(640, 640),  # height, width of the canvas, px
            max_boxes=0,  # padded boxes per image; 0: the largest number in the data, more with Mosaic and MixUp
            workers=0,  # worker processes that decode and augment; 0 uses threads of this process
            limit=0,  # only the first images of each split; 0 takes all
            check=False,  # dry run: print a summary of the data, write example batches as images, and stop
            augment=augment(),
            stage2=dict(
                start=0,  # first step (from 0) that is augmented as here; 0: there is no second stage
                augment=augment(),
            ),
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # or sgd
            momentum=0.0,  # of sgd
            lr=0.0,  # 0 takes 0.004 * batch_size / 256, with sgd 0.01 * batch_size / 16
            weight_decay=0.05,  # not on norms and biases
            clip_norm=0.0,  # of the whole gradient; 0 is off
            warmup=1000,  # steps of linear warm-up from 1e-5 of the rate
            flat=0.5,  # share of the run at the full rate, before the cosine
            end=0.05,  # the cosine ends at this share of the rate
            drops=(),  # steps at which the rate falls to a tenth, instead of flat and cosine; () has none
        )
    )
    config.ema = ConfigDict(
        dict(
            momentum=2e-4,  # of new weights once the ramp is over
            ramp=2000,  # steps: momentum_t = (1 - momentum) exp(-(1 + t) / ramp) + momentum
        )
    )
    config.eval = ConfigDict(
        dict(
            every=0,  # steps between evaluations; 0 evaluates at the end alone
            batch_size=16,
            limit=0,  # validation images of the evaluations on the way; the last one takes all
        )
    )
    config.log_every = 20  # steps between lines of metrics.jsonl
    config.checkpoint = ConfigDict(dict(every=500, keep=2))  # steps; a run also saves at its end and on SIGTERM
    config.compile_cache = ""  # "" is ~/.cache/kdjax/jax or $KDJAX_CACHE/jax; "off" switches it off
    return config


# Least and largest value of every setting that is a number.
_AT_LEAST_1 = ("batch_size", "steps", "data.scenes_train", "data.scenes_val", "eval.batch_size", "log_every",
               "checkpoint.every", "checkpoint.keep")  # fmt: skip
_AT_LEAST_0 = ("data.max_boxes", "data.workers", "data.limit", "optimizer.lr", "optimizer.weight_decay",
               "optimizer.clip_norm", "optimizer.warmup", "ema.ramp", "eval.every", "eval.limit")  # fmt: skip
_SHARES = ("optimizer.momentum", "optimizer.flat", "optimizer.end", "ema.momentum")
_RANGES = (
    dict.fromkeys(_AT_LEAST_1, (1, math.inf))
    | dict.fromkeys(_AT_LEAST_0, (0, math.inf))
    | dict.fromkeys(_SHARES, (0, 1))
    | {"seed": (0, 2**32 - 1)}
)


def parse(flag_values, arguments: list[str]) -> list[str]:
    """Reads flags, and with them the config file; what is wrong there gets one sentence.

    Args:
      flag_values: absl's, with the flag of a config file.
      arguments: the program's name and the flags.

    Returns:
      What is left over, as absl does.

    Raises:
      ValueError: unknown flag or setting, or whatever the config file, which is the user's code, raised.
    """
    try:
        rest = flag_values(arguments)
    except Exception as error:
        text = str(error).strip()
        if "Traceback" in text:  # the flags wrap what a config file raises; its last line is the sentence
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        elif isinstance(error, (AttributeError, KeyError)):
            text = f"no such setting: {text}".replace("\\n", " ").replace("\\", "").replace("'", "")
        raise ValueError(" ".join(text.split())) from error
    config = flag_values["config"].value
    # The flags accept new keys, because options of a detector are no keys of the defaults.
    unknown = unknown_keys(config) if isinstance(config, ConfigDict) else []
    if unknown:
        raise UserError(f"no such setting: {unknown[0]}")
    return rest


def sentence(error: Exception) -> str:
    """What is told of a mistake: one line, and of a long list only the beginning.

    Example:
      >>> sentence(ValueError("5 differences:\\n  a\\n  b\\n  c\\n  d\\n  e"))
      '5 differences: a; b; c; and 2 more'
    """
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    first, *rest = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    more = f"; and {len(rest) - 3} more" if len(rest) > 3 else ""
    return " ".join([first, "; ".join(rest[:3])]).strip() + more


def check_numbers(config: ConfigDict) -> None:
    """Holds every number against its range.

    Raises:
      ValueError: names the setting, its value and the range.
    """
    for name, (low, high) in _RANGES.items():
        value = config
        for key in name.split("."):
            value = value[key]
        if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
            raise ValueError(
                f"config.{name} is {value!r}; it must be "
                + (f"at least {low}" if high == math.inf else f"in {low} .. {high}")
            )


def methods(names: str) -> ConfigDict:
    """Sub-configs of methods with all their options at the defaults, so that configs and flags can change them.

    Args:
      names: joined by "+"; "" is none.

    Raises:
      ValueError: unknown method.
    """
    return ConfigDict({name: zoo.options(name) for name in names.split("+") if name})


def unknown_keys(config: ConfigDict, reference: ConfigDict | None = None, prefix: str = "config") -> list[str]:
    """Keys of `config` that do not exist, with their full name; methods and detectors check their own options."""
    reference = base() if reference is None else reference
    found = []
    for key, value in config.items():
        if key not in reference:
            found.append(f"{prefix}.{key}")
        elif isinstance(reference[key], ConfigDict):
            if not isinstance(value, ConfigDict):
                found.append(f"{prefix}.{key}={value!r}")
            elif key not in ("methods", "options"):
                found += unknown_keys(value, reference[key], f"{prefix}.{key}")
    return found


def augment(**changes) -> dict:
    """Settings of the augmentation: the defaults with `changes`. RTMDet's are in configs/supervised/rtmdet.py."""
    defaults = dict(
        mosaic=False,  # four images around a point on twice the canvas; three of them are among the last `cache`
        mixup=0.0,  # probability of being averaged with one of the last `cache` / 2 images
        cache=40,  # number of earlier images of the same virtual stream (kdjax/data/plans.py) to choose partners from
        flip=0.5,  # probability of a horizontal flip
        scale=(0.5, 2.0),  # range of the random resize, relative to the size that fits the canvas (or the Mosaic)
        crop=True,  # random crop where the resized image is larger than the canvas
        hsv=(5.0, 30.0, 30.0),  # largest shift of hue (of 180), saturation and value (of 255); zeros switch it off
    )
    return defaults | changes
