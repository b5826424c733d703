r"""A student distilled on your own images, with its twin; the argument is the method, or several: a+b.

    kdjax train --config=distill/coco_folder:mkd --config.data.root=DIR \
        --config.teacher.weights=runs/teacher/student --workdir=runs/mkd

It trains rtmdet_micro for 3000 steps at 320x320; `--config.student.detector=rtmdet_tiny` trains a larger student.
Methods have the defaults of their papers, which are mostly for RetinaNet or Faster R-CNN, except for OPTIONS: the
authors' values for one-stage detectors, or values for the scale of RTMDet's maps (distill/two_stage has those for
two-stage detectors). docs/methods.md describes every
method. The papers' own detectors are in distill/dense, and RTMDet's training on COCO is in distill/mkd_rtmdet.
"""

from kdjax.resources import Config, load_config
from kdjax.training.config import methods

OPTIONS = {
    # the authors' weights for YOLOX
    "fgd": dict(foreground_weight=2e-3, background_weight=1e-3, attention_weight=1e-3, relation_weight=1e-5)
    | dict(temperature=0.5),
    "fgfi": dict(start=400),  # steps without it, as published
    # for one-stage detectors
    "fkd": dict(feature_weight=4e-4, channel_weight=2e-2, spatial_weight=2e-2, non_local_weight=4e-4),
    "pfi": dict(normalize_guide=True),  # without it, the weight fits only the scale of RetinaNet's logits
}
CLIPPED = {"fgd", "mgd"}  # their authors clip the gradient


def get_config(names: str = "mkd") -> Config:
    config = load_config("supervised/coco_folder:rtmdet_micro")
    config.methods = methods(names)
    for name, options in config.methods.items():
        options.update(OPTIONS.get(name, {}))
    if "rtmdet_cwd" in config.methods:
        config.methods.rtmdet_cwd.stop = config.steps * 280 // 300  # off for the last 20 of 300 epochs, as published
    if CLIPPED & set(config.methods):
        config.optimizer.clip_norm = 35.0
    config.twin = True
    return config
