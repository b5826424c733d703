"""MKD's training on COCO: RTMDet's own recipe (configs/supervised/rtmdet.py) beside a teacher one size up.

    python train.py --config=configs/distill/mkd_rtmdet.py:tiny,s --config.teacher.weights=rtmdet_s.pth \\
        --config.data.root=DIR/coco --workdir=runs/mkd

The argument is STUDENT,TEACHER or STUDENT,TEACHER,METHODS. Distillation ends with the first stage, as in the earlier
public recipe, by `--config.methods.mkd.stop=129376`, the value of data.stage2.start.

Published, teacher one size up: tiny 41.1 -> 41.8 AP, s 44.6 -> 45.7, m 49.4 -> 50.2, l 51.5 -> 52.3.
"""

from configs.supervised.rtmdet import get_config as alone
from kdjax.train.config import methods


def get_config(chosen: str = "tiny,s"):
    student, teacher, names = _words(chosen)
    config = alone(student)
    config.teacher.detector = f"rtmdet_{teacher}"
    config.methods = methods(names)
    config.twin = True
    return config


def _words(chosen: str) -> list[str]:
    words = chosen.split(",")
    if len(words) not in (2, 3):
        raise ValueError(f"the argument of the config is STUDENT,TEACHER or STUDENT,TEACHER,METHODS, not {chosen!r}")
    return [*words, "mkd"][:3]
