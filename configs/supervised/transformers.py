r"""The training of RT-DETR, RT-DETRv2 and D-FINE on COCO, as published but for one size of the images.

    kdjax train --config=supervised/transformers:rtdetr_r18 --config.data.root=DIR/coco \
        --config.student.weights=backbone.safetensors --workdir=runs/rtdetr_r18

`python -m kdjax.data.prepare --data_dir=DIR coco/2017` writes DIR/coco; the weights are those of a backbone trained on
ImageNet, from which the published runs start. The argument is the detector.

Published (the authors), AP on COCO val2017: RT-DETR r18 46.5, r34 48.9, r50_m 51.3, r50 53.1, r101 54.3; RT-DETRv2
48.1, 49.9, 51.9, 53.4, 54.3; D-FINE n 42.8, s 48.5, m 52.3, l 54.0, x 55.8. Differences from the authors: all images
have 640x640 pixels (they draw 480 to 800, but for D-FINE n and RT-DETRv2 r18); D-FINE does not return to its best
checkpoint when the last epochs begin, and its average keeps its rate there; weight decay leaves out all norms and
biases.
"""

from kdjax.training.config import Config, augment, base

IMAGES = 118287  # of COCO train2017

# batch, epochs, the last of them without strong augmentation, learning rate, that of the backbone, warm-up in steps
RECIPES = {
    "rtdetr_r18": (16, 72, 0, 1e-4, 1e-5, 0),
    "rtdetr_r34": (16, 72, 0, 1e-4, 1e-5, 0),
    "rtdetr_r50_m": (16, 72, 0, 1e-4, 1e-5, 0),
    "rtdetr_r50": (16, 72, 0, 1e-4, 1e-5, 0),
    "rtdetr_r101": (16, 72, 0, 1e-4, 1e-6, 0),
    "rtdetrv2_r18": (16, 120, 3, 1e-4, 1e-4, 2000),
    "rtdetrv2_r34": (16, 120, 3, 1e-4, 5e-5, 2000),
    "rtdetrv2_r50_m": (16, 84, 1, 1e-4, 1e-5, 2000),
    "rtdetrv2_r50": (16, 72, 1, 1e-4, 1e-5, 2000),
    "rtdetrv2_r101": (16, 72, 1, 1e-4, 1e-6, 2000),
    "dfine_n": (128, 160, 12, 8e-4, 4e-4, 500),
    "dfine_s": (32, 132, 12, 2e-4, 1e-4, 500),
    "dfine_m": (32, 132, 12, 2e-4, 2e-5, 500),
    "dfine_l": (32, 80, 8, 2.5e-4, 1.25e-5, 500),
    "dfine_x": (32, 80, 8, 2.5e-4, 2.5e-6, 500),
}


def get_config(detector: str = "rtdetr_r18") -> Config:
    if detector not in RECIPES:
        raise ValueError(f"supervised/transformers: the detector must be one of {', '.join(RECIPES)}, not {detector!r}")
    batch, epochs, plain, rate, of_backbone, warmup = RECIPES[detector]
    fine = detector.startswith("dfine")
    config = base()
    config.batch_size = batch
    config.steps = epochs * IMAGES // batch
    config.student.detector = detector
    config.data.update(dict(source="tfds", val_split="validation", image_size=(640, 640)))
    single = augment(scale=(1.0, 1.0), crop=False, hsv=(0.0, 0.0, 0.0))
    config.data.augment = single | dict(distort=1.0, zoom_out=0.5, iou_crop=0.8)
    if plain:
        config.data.stage2.start = (epochs - plain) * IMAGES // batch
        config.data.stage2.augment = single
    decay = 1.25e-4 if detector in ("dfine_l", "dfine_x") else 1e-4
    config.optimizer.update(dict(lr=rate, backbone=of_backbone / rate, weight_decay=decay, clip_norm=0.1))
    config.optimizer.update(dict(warmup=warmup, flat=1.0))
    config.ema.update(dict(momentum=1e-4, ramp=1000 if fine else 2000))
    config.eval.every = config.checkpoint.every = IMAGES // batch
    return config
