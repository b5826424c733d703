"""Soft labels on RTMDet's sigmoid scores, tau 1. The RM paper measures gains of 0.2 to 0.5 AP with soft labels where RM
gains 0.6 to 1.4.

    python train.py --config=configs/distill/hinton.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/hinton
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("hinton")
