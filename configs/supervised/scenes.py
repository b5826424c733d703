"""A detector trained alone on the generated scenes; the teacher of the quickstart was trained with this config.

    kdjax train --config=supervised/scenes:rtmdet_micro --workdir=runs/scenes_teacher

assets/README.md has the metrics and the command that stores its weights as float16.
"""

from kdjax.training.config import Config, base


def get_config(detector: str = "rtmdet_micro") -> Config:
    config = base()
    config.batch_size = 16
    config.steps = 3000
    config.student.detector = detector
    config.data.image_size = (128, 128)
    config.data.augment.scale = (0.8, 1.25)
    config.optimizer.lr = 0.003
    config.optimizer.warmup = 200
    config.eval.every = 500
    config.eval.limit = 200
    return config
