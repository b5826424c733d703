"""RM on RTMDet: weight 4, theta 1. Published: RetinaNet R50 gains 1.4 AP from RM, 2.9 from RM and PFI.

    python train.py --config=configs/distill/rm.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/rm

Together with PFI, as the paper has them:

    python train.py --config=configs/distill/coco_folder.py:rm+pfi --config.data.root=DIR \\
        --config.methods.pfi.normalize_guide=True --config.teacher.weights=WEIGHTS --workdir=runs/rm_pfi
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("rm")
