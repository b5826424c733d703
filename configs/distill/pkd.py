"""PKD on RTMDet: weight 10 as for all one-stage teachers. Published on FPNs: RetinaNet X101 -> R50 37.4 -> 40.8 AP,
FCOS X101 -> RetinaNet R50 36.5 -> 40.3, RepPoints X101 -> R50 38.6 -> 42.3.

    python train.py --config=configs/distill/pkd.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/pkd
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("pkd")
