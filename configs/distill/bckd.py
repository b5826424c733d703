"""BCKD on RTMDet: classes 1, boxes 4. Published: GFL R101 -> R50 40.1 -> 43.2 AP, R34 38.9 -> 42.0, R18 35.8 -> 38.6.

    python train.py --config=configs/distill/bckd.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/bckd
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("bckd")
