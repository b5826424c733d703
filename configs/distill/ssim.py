"""SSIM on RTMDet: weight 4, the sum over the three levels of the neck. Published: RetinaNet R101 -> R50 36.4 -> 40.1
AP, Cascade X101 -> Faster R-CNN R50 37.4 -> 40.9.

    python train.py --config=configs/distill/ssim.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/ssim
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("ssim")
