"""FGFI on RTMDet's neck: mu 0.01 and psi 0.5, off for the first 400 steps, as published for Faster R-CNN with one map.

    python train.py --config=configs/distill/fgfi.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/fgfi
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    config = on_folder("fgfi")
    config.methods.fgfi.start = 400
    return config
