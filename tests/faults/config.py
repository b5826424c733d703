"""The small distillation that the harness disturbs: a student and its twin in 20 steps.

The numbers of steps between lines of the log, saves and evaluations share no divisor, so that a save may
come before, at or after a line or an evaluation.
"""

from ml_collections import ConfigDict

from kdjax.training import config as settings

# Few convolutions, and an assignment that is compiled fast.
DETECTOR, IMAGE_SIZE = "retinanet_r18", (64, 64)
OPTIONS = dict(base_channels=4, neck_channels=4, head_channels=4, stacked_convs=1, norm_eval=False, frozen_stages=-1)


def get_config() -> ConfigDict:
    config = settings.base()
    config.update(dict(batch_size=4, steps=20, log_every=4, twin=True))
    config.student.detector = DETECTOR
    config.student.options = ConfigDict(OPTIONS)
    config.methods = settings.methods("cwd")
    config.data.update(dict(scenes_train=24, scenes_val=8, image_size=IMAGE_SIZE))
    config.optimizer.update(dict(warmup=4, lr=0.002))
    config.ema.ramp = 10
    config.eval.update(dict(every=7, batch_size=8))
    config.checkpoint.update(dict(every=5, keep=3))
    return config
