"""GID on RTMDet: ten instances an image, weights 0.005, 40, 0.1 and 0.1 of a public port. Published, R101 -> R50:
RetinaNet 36.2 -> 39.1 AP, FCOS 38.5 -> 42.0, Faster R-CNN 38.3 -> 40.2.

    python train.py --config=configs/distill/gid.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/gid
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("gid")
