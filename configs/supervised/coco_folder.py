"""A detector trained alone on a folder of yours in COCO format: a teacher, or a baseline.

python train.py --config=configs/supervised/coco_folder.py:rtmdet_s --config.data.root=DIR --workdir=runs/teacher
"""

from kdjax.train.config import base


def get_config(detector: str = "rtmdet_tiny"):
    config = base()
    config.student.detector = detector
    config.data.source = "coco_folder"
    config.data.image_size = (320, 320)
    config.steps = 3000
    config.optimizer.lr = 0.001
    config.optimizer.warmup = 200
    config.ema.ramp = 500
    config.eval.every = 1000
    return config
