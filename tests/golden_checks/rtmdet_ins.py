"""Whole models of RTMDet-Ins: what `model` checks of RTMDet, the masks' loss and the masks of the detections."""

from pathlib import Path

import jax

from kdjax.boxes import dynamic
from kdjax.detectors import rtmdet_ins
from kdjax.structs import Assignment, DetectorOutput, Targets
from tests.golden_checks import model
from tests.golden_checks.api import Checks

OPTIONS = model.OPTIONS | {"bbox_head.num_prototypes": "prototypes"}
del OPTIONS["bbox_head.exp_on_reg"]  # distances are linear
FIXED = model.FIXED | {
    "bbox_head.type": "RTMDetInsSepBNHead",
    "bbox_head.norm_cfg.requires_grad": True,
    "bbox_head.loss_mask.type": "DiceLoss",
    "bbox_head.loss_mask.loss_weight": 2.0,
    "bbox_head.loss_mask.eps": 5e-6,
    "bbox_head.loss_mask.reduction": "mean",
    "bbox_head.mask_loss_stride": 4,
    "bbox_head.dyconv_channels": 8,
    "bbox_head.num_dyconvs": 3,
}


def stored_losses(output: DetectorOutput, targets: Targets, stored: Assignment) -> dict[str, jax.Array]:
    masks = rtmdet_ins.loss(output, targets, stored)["loss_mask"]
    return model.stored_losses(output, targets, stored) | {"loss_mask": masks}


def replay(path: Path) -> Checks:
    yield from model.whole_model(
        path,
        rtmdet_ins,
        OPTIONS,
        FIXED,
        model.TAPS | {"kernel": "kernels", "mask_feat": "prototypes"},
        stored_losses,
        lambda targets: dynamic.mask_centers(targets.instance_masks, stride=1),
    )


CHECKS = [("model/rtmdetins_*.npz", replay)]
