"""RM on RTMDet: weight 4, theta 1. Published: RetinaNet R50 36.9 -> 40.4 AP with RM and PFI; one table of the paper has
gains of 1.4 from RM, 2.3 from PFI and 2.9 from both.

    python train.py --config=configs/distill/rm.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/rm

Together with PFI, as the paper has them:

    python train.py --config=configs/distill/coco_folder.py:rm+pfi --config.data.root=DIR \\
        --config.methods.pfi.normalize_guide=True --config.teacher.weights=WEIGHTS --workdir=runs/rm_pfi
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("rm")
