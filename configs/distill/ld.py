"""LD with the published weights for GFL: edges 0.25, region 0.25, classes 10. It needs student and teacher whose heads
predict distributions (GFL); RTMDet does not and is refused at start. Published: GFL R101 -> R50 40.1 -> 42.1 AP, R34
38.9 -> 41.0, R18 35.8 -> 37.5.

    python train.py --config=configs/distill/ld.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/ld
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    return on_folder("ld")
