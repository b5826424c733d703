"""PFI on RTMDet: weight 1.5, with the guide at mean 1, as its scale is that of RetinaNet's logits otherwise. Published:
RetinaNet R50 36.9 -> 40.4 AP with RM and PFI; one table of the paper has gains of 1.4 from RM, 2.3 from PFI and 2.9
from both (rm.py shows the command).

    python train.py --config=configs/distill/pfi.py --config.data.root=DIR \\
        --config.teacher.weights=WEIGHTS --workdir=runs/pfi
"""

from configs.distill.coco_folder import get_config as on_folder


def get_config():
    config = on_folder("pfi")
    config.methods.pfi.normalize_guide = True
    return config
