r"""RTMDet's own training on COCO: 300 epochs with batch 256 at 640x640, Mosaic and MixUp for 280 of them.

    kdjax train --config=supervised/rtmdet:tiny --config.data.root=DIR/coco --workdir=runs/tiny

The argument is the size: pico, micro, tiny, s, m, l or x. `python -m kdjax.data.prepare --data_dir=DIR coco/2017`
writes DIR/coco. ins_tiny and so on are RTMDet-Ins, whose masks are in COCO's own files (DIR has annotations, train2017
and val2017):

    kdjax train --config=supervised/rtmdet:ins_tiny --config.data.root=DIR --workdir=runs/ins_tiny

A short run through both stages on your own images:

    kdjax train --config=supervised/rtmdet:tiny --config.data.source=coco_folder \
        --config.data.root=DIR --config.data.val_split=val --config.batch_size=16 --config.steps=1500 \
        --config.data.stage2.start=1400 --config.optimizer.warmup=100 \
        --config.ema.ramp=150 --workdir=runs/tiny

Published: tiny 41.1 AP, s 44.6, m 49.4, l 51.5, x 52.8; the backbones of tiny and s were pretrained on ImageNet.
RTMDet-Ins, AP of masks: tiny 35.4, s 38.7, m 42.1, l 43.7, x 44.6.
"""

from kdjax.training.config import Config, augment, base

IMAGES = 118287  # of COCO train2017
BATCH = 256


def steps(epochs: int) -> int:
    return round(epochs * IMAGES / BATCH)


def get_config(size: str = "tiny") -> Config:
    config = base()
    config.batch_size = BATCH
    config.steps = steps(300)
    config.student.detector = f"rtmdet_{size}"
    if size.startswith("ins_"):
        config.data.update(dict(source="coco_folder", train_split="train2017", val_split="val2017", masks=True))
    else:
        config.data.update(dict(source="tfds", val_split="validation"))
    size = size.removeprefix("ins_")
    config.data.image_size = (640, 640)
    scale = (0.1, 2.0) if size in ("m", "l", "x") else (0.5, 2.0)  # large-scale jitter
    mixed = dict(mixup=1.0, cache=40) if size in ("s", "m", "l", "x") else dict(mixup=0.5, cache=20)
    config.data.augment = augment(mosaic=True, scale=scale, **mixed)
    config.data.stage2.start = steps(280)
    config.data.stage2.augment = augment(scale=scale)
    config.optimizer.lr = 0.004
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup = 1000
    config.ema.momentum = 2e-4  # a decay of 0.9998
    config.eval.every = steps(10)
    config.checkpoint.every = steps(1)
    return config
