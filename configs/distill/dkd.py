"""DKD on RTMDet: alpha 1, beta 0.25, tau 1, the values for detection, on the sigmoid scores of positive priors. The
published detectors are Faster R-CNN; there is no published figure for heads like RTMDet's.

    python train.py --config=configs/distill/dkd.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/dkd
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("dkd")
