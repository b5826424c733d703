"""A detector trained alone on your own images in COCO, YOLO or VOC format: a teacher, or a student without one.

kdjax train --config=supervised/coco_folder:rtmdet_s --config.data.root=DIR --workdir=runs/teacher
"""

from kdjax.training.config import Config, base


def get_config(detector: str = "rtmdet_tiny") -> Config:
    config = base()
    config.student.detector = detector
    config.data.source = "folder"  # COCO's, YOLO's or VOC's, by what lies in it
    config.data.image_size = (320, 320)
    config.steps = 3000
    config.optimizer.lr = 0.001
    config.optimizer.warmup = 200
    config.ema.ramp = 500
    config.eval.every = 1000
    return config
