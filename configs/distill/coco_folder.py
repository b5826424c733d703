"""A student distilled on a folder of yours in COCO format, with its twin; the teacher is the student/ folder of a run.

    python train.py --config=configs/distill/coco_folder.py:mkd --config.data.root=DIR \\
        --config.teacher.weights=runs/teacher/student --workdir=runs/mkd
"""

from configs.supervised.coco_folder import get_config as alone
from kdjax.train.config import methods


def get_config(chosen: str = "mkd"):
    config = alone("rtmdet_nano")
    config.methods = methods(chosen)
    config.twin = True
    return config
