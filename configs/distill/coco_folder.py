"""A student distilled on a folder of yours in COCO format, with its twin; the teacher is the student/ folder of a run.

    python train.py --config=configs/distill/coco_folder.py:mkd --config.data.root=DIR \\
        --config.teacher.weights=runs/teacher/student --workdir=runs/mkd
"""

from kdjax.train.config import base, methods


def get_config(chosen: str = "mkd"):
    config = base()
    config.student.detector = "rtmdet_nano"
    config.methods = methods(chosen)
    config.twin = True
    config.data.source = "coco_folder"
    config.data.image_size = (320, 320)
    config.steps = 3000
    config.optimizer.lr = 0.001
    config.optimizer.warmup = 200
    config.ema.ramp = 500
    config.eval.every = 1000
    return config
