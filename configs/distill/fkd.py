"""FKD on RTMDet, with the weights for one-stage detectors. Published: Faster R-CNN R101 -> R50 37.4 -> 39.3 AP; the
paper's best student, Faster R-CNN R101, 39.8 -> 43.9.

    python train.py --config=configs/distill/fkd.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/fkd
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    config = on_folder("fkd")
    config.methods.fkd.feature_weight = 4e-4
    config.methods.fkd.channel_weight = 2e-2
    config.methods.fkd.spatial_weight = 2e-2
    config.methods.fkd.non_local_weight = 4e-4
    return config
