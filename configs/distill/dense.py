r"""ResNet-101 to ResNet-50 on COCO, for RetinaNet, FCOS, GFL and ATSS, with the methods that were published on them.

    kdjax train --config=distill/dense:retinanet,fgd --config.teacher.weights=retinanet_r101.pth \
        --config.data.root=DIR/coco --config.student.weights=resnet50.pth --workdir=runs/fgd

The argument is FAMILY,METHODS. `--config.teacher.detector` and `--config.student.detector` take other sizes, and a
teacher of another family. Methods have their published defaults, except for OPTIONS. The training is that of
supervised/dense, with 24 epochs where the published result has them.

Published AP of the student alone -> with the method, R101 -> R50 unless noted:

    retinanet  ssim 36.4 -> 40.1; fitnet 36.4 -> 39.0; rm+pfi 36.9 -> 40.4; crosskd 37.4 -> 39.7; gid 36.2 -> 39.1
               24 epochs, X101 -> R50: fgd 37.4 -> 40.7; mgd 37.4 -> 41.0; cwd 37.4 -> 40.5; pkd 37.4 -> 40.8
    fcos       fgd 38.5 -> 42.7; crosskd 38.5 -> 41.1; gid 38.5 -> 42.0
    gfl        ld 40.1 -> 42.1; crosskd 40.2 -> 43.7; bckd 40.1 -> 43.2; cwd on cls_logits 40.2 -> 41.9
    atss       crosskd 39.4 -> 41.8

These runs have not been made with kdjax.
"""

from kdjax.resources import Config, load_config
from kdjax.training.config import methods

FAMILIES = ("retinanet", "fcos", "gfl", "atss")
LONG = {("retinanet", name) for name in ("fgd", "mgd", "cwd", "pkd")} | {("fcos", "fgd")}
# Where the authors' configs differ from the defaults.
OPTIONS = {
    ("gfl", "cwd"): {"student": "cls_logits", "teacher": "cls_logits"},
    ("retinanet", "crosskd"): {"rectify": True},
    ("gfl", "crosskd"): {"rectify": True, "box_weight": 4.0},
    ("atss", "crosskd"): {"rectify": True, "quality_weight": 1.0},
    ("fcos", "crosskd"): {"rectify": True, "class_weight": 0.4, "box_weight": 0.75, "box_loss": "log_iou"}
    | {"student": "tower.1", "teacher": "tower.1"},
}


def get_config(argument: str = "retinanet,ssim") -> Config:
    family, _, names = argument.partition(",")
    if family not in FAMILIES or not names:
        raise ValueError(
            f"the argument must be FAMILY,METHODS with a family of {', '.join(FAMILIES)}, not {argument!r}"
        )
    variant = "-center" if family == "fcos" else ""
    long = any((family, name) in LONG for name in names.split("+"))
    config = load_config(f"supervised/dense:{family}_r50{variant},{24 if long else 12}")
    config.teacher.detector = f"{family}_r101{variant}"
    config.methods = methods(names)
    for name, options in config.methods.items():
        options.update(OPTIONS.get((family, name), {}))
    config.optimizer.clip_norm = 35.0
    config.twin = True
    return config
