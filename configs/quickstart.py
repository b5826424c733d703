"""The default example: MKD distils rtmdet_micro into rtmdet_pico on generated scenes, in minutes on two CPU cores.

    kdjax train --config=quickstart --workdir=runs/quickstart
    kdjax train --config=quickstart:rtmdet_cwd --workdir=runs/cwd   # another method, or several: a+b

The teacher was trained on 2000 of the scenes; the student has 200 of them, as if few labelled images were available.
"""

from kdjax.training.config import Config, base, methods


def get_config(names: str = "mkd") -> Config:
    config = base()
    config.batch_size = 8
    config.steps = 1600
    config.student.detector = "rtmdet_pico"
    config.teacher.detector = "rtmdet_micro"
    config.teacher.weights = "quickstart_teacher"
    config.methods = methods(names)
    config.twin = True
    config.data.scenes_train = 200
    config.data.image_size = (128, 128)
    config.data.augment.scale = (0.8, 1.25)
    config.optimizer.lr = 0.005  # the best of 0.0025, 0.005 and 0.01 for the twin, over two seeds
    config.optimizer.warmup = 160
    config.ema.ramp = 300
    config.eval.every = 800
    config.eval.limit = 100
    config.checkpoint.every = 800
    return config
