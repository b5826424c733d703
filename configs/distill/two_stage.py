r"""Two-stage detectors on COCO, ResNet-101 to ResNet-50, with the methods that were published on them.

    kdjax train --config=distill/two_stage:faster_rcnn,ssim --config.teacher.weights=faster_rcnn_r101.pth \
        --config.data.root=DIR/coco --config.student.weights=resnet50.pth --workdir=runs/ssim

    kdjax train --config=distill/two_stage:mask_rcnn,mkd --config.teacher.weights=mask_rcnn_r101.pth \
        --config.data.root=DIR --config.student.weights=resnet50.pth --workdir=runs/mkd

The argument is FAMILY,METHODS, with the family of both, faster_rcnn or mask_rcnn. `--config.teacher.detector` and
`--config.student.detector` take other sizes and families. Mask R-CNN reads COCO's own files (DIR has annotations,
train2017 and val2017). Methods have their published values for two-stage detectors (OPTIONS), on the levels that their
authors compare. The training is that of supervised/dense, with 24 epochs where the published result has them.

Published AP of the student alone -> with the method:

    R101 -> R50    fkd 37.4 -> 39.3; gid 38.3 -> 40.2; dkd 37.9 -> 39.3, by its authors alone
                   24 epochs: pkd 38.4 -> 40.3
    R152 -> R50    defeat 37.4 -> 40.9
    X101 -> R50    ssim 37.4 -> 40.9, the teacher a Cascade R-CNN (--config.teacher.detector=cascade_rcnn_x101-64x4d)
                   24 epochs: fgd 38.4 -> 42.0, the teacher a Cascade Mask R-CNN; mgd 38.4 -> 42.1
    Mask R-CNN R50, 24 epochs, masks (boxes), teachers not in our sources: fgd 35.4 -> 37.8 (39.2 -> 42.1); mgd 35.4 ->
                   38.1; the table of masks in MKD's paper repeats these, and the result of mkd is not in our sources

These runs have not been made with kdjax.
"""

from kdjax.resources import Config, load_config
from kdjax.training.config import methods

FAMILIES = ("faster_rcnn", "mask_rcnn")
LONG = ("fgd", "mgd", "pkd")  # of Mask R-CNN all that is published
FOUR_LEVELS = dict(student="neck.0:4", teacher="neck.0:4")
# The authors' values for two-stage detectors, where they differ from the defaults.
OPTIONS = {
    "fgd": dict(foreground_weight=5e-5, background_weight=2.5e-5, attention_weight=5e-5, relation_weight=5e-7)
    | dict(temperature=0.5, **FOUR_LEVELS),
    "fgfi": dict(anchor_ratios=(0.5, 1.0, 2.0), start=400),  # the anchors of the first stage
    "mgd": dict(weight=5e-7, drop=0.45, **FOUR_LEVELS),
    "pkd": dict(weight=6.0, **FOUR_LEVELS),
    "yao": dict(drop=0.45),  # as in MGD
}
CLIPPED = {"fgd", "mgd"}  # their authors clip the gradient


def get_config(argument: str = "faster_rcnn,ssim") -> Config:
    family, _, names = argument.partition(",")
    if family not in FAMILIES or not names:
        raise ValueError(
            f"the argument must be FAMILY,METHODS with a family of {', '.join(FAMILIES)}, not {argument!r}"
        )
    long = family == "mask_rcnn" or any(name in LONG for name in names.split("+"))
    config = load_config(f"supervised/dense:{family}_r50,{24 if long else 12}")
    config.teacher.detector = f"{family}_r101"
    config.methods = methods(names)
    for name, options in config.methods.items():
        options.update(OPTIONS.get(name, {}))
    if CLIPPED & set(config.methods):
        config.optimizer.clip_norm = 35.0
    config.twin = True
    return config
