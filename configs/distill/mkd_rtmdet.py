r"""MKD's training on COCO: RTMDet's own recipe (supervised/rtmdet) with a teacher one size larger.

    kdjax train --config=distill/mkd_rtmdet:tiny,s --config.teacher.weights=rtmdet_s.pth \
        --config.data.root=DIR/coco --workdir=runs/mkd

The argument is STUDENT,TEACHER or STUDENT,TEACHER,METHODS. `--config.methods.mkd.stop=129376`, the value of
data.stage2.start, ends distillation with the first stage, as in the earlier public recipe (the method rtmdet_cwd).
RTMDet-Ins, with masks, reads COCO's own files:

    kdjax train --config=distill/mkd_rtmdet:ins_tiny,ins_s --config.teacher.weights=rtmdet-ins_s.pth \
        --config.data.root=DIR --workdir=runs/mkd_ins

Published AP, with the teacher one size larger: tiny 41.1 -> 41.8, s 44.6 -> 45.7, m 49.4 -> 50.2, l 51.5 -> 52.3;
rtmdet_cwd has the same four. Of RTMDet-Ins (mask AP of tiny alone 35.4, of s 38.7) no result is published: the table of
masks in MKD's paper names RTMDet-tiny, but its text says Mask R-CNN. These runs have not been made with kdjax.
"""

from kdjax.resources import Config, load_config
from kdjax.training.config import methods


def get_config(argument: str = "tiny,s") -> Config:
    student, teacher, names = _words(argument)
    config = load_config(f"supervised/rtmdet:{student}")
    config.teacher.detector = f"rtmdet_{teacher}"
    config.methods = methods(names)
    config.twin = True
    return config


def _words(argument: str) -> list[str]:
    words = argument.split(",")
    if len(words) not in (2, 3):
        raise ValueError(f"the argument must be STUDENT,TEACHER or STUDENT,TEACHER,METHODS, not {argument!r}")
    return [*words, "mkd"][:3]
