"""Yao 2025 on RTMDet, every part on, all weights 1. Experimental: derived from the paper's abstract, which has no
figure to compare with.

    python train.py --config=configs/distill/yao.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/yao
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("yao")
