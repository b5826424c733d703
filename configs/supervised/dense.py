r"""mmdetection's training of detectors on a ResNet on COCO, in any size: SGD, 12 epochs with batch 16.

    kdjax train --config=supervised/dense:retinanet_r50 --config.data.root=DIR/coco \
        --config.student.weights=resnet50.pth --workdir=runs/retinanet_r50

`python -m kdjax.data.prepare --data_dir=DIR coco/2017` writes DIR/coco; resnet50.pth has torchvision's weights of the
backbone. The published runs start from these as well, except for FCOS: those start from Caffe's weights, which need
--config.student.options.style=caffe. The argument is DETECTOR, or DETECTOR,24 for 24 epochs, the 2x schedule: of
RetinaNet, FCOS, GFL, ATSS, Faster R-CNN (faster_rcnn_r50), or Mask R-CNN, whose masks are in COCO's own files (DIR has
annotations, train2017 and val2017):

    kdjax train --config=supervised/dense:mask_rcnn_r50 --config.data.root=DIR \
        --config.student.weights=resnet50.pth --workdir=runs/mask_rcnn_r50

Published (mmdetection), R50 and R101: RetinaNet 36.5, 38.5 (2x: 37.4, 38.9), FCOS 36.6, 39.1, GFL 40.2, 44.7 (the
latter 2x with multi-scale training), ATSS 39.4, 41.5, Faster R-CNN 37.4, 39.4 (2x: 38.4, 39.8), Mask R-CNN 38.2, 40.0,
with masks of 34.7, 36.1. Differences from mmdetection: there the short side of an image
has 800 px and the long side at most 1333; here the canvas is fixed, so portrait images are smaller. There weight decay
applies to norms and biases too, except that FCOS's biases have twice the learning rate and no decay; here norms and
biases have no weight decay, and all parameters have the same learning rate.
"""

from kdjax.training.config import Config, augment, base

IMAGES = 118287  # of COCO train2017
BATCH = 16
TWO_STAGES = ("faster_rcnn", "mask_rcnn")


def get_config(argument: str = "retinanet_r50") -> Config:
    detector, _, epochs = argument.partition(",")
    epochs = int(epochs or 12)
    config = base()
    config.batch_size = BATCH
    config.steps = steps(epochs)
    config.student.detector = detector
    if detector.startswith("fcos"):
        config.student.options.style = "pytorch"  # torchvision's weights of the backbone need it
    if detector.startswith("mask"):
        config.data.update(dict(source="coco_folder", train_split="train2017", val_split="val2017", masks=True))
    else:
        config.data.update(dict(source="tfds", val_split="validation"))
    config.data.image_size = (800, 1344)
    config.data.augment = augment(scale=(1.0, 1.0), crop=False, hsv=(0.0, 0.0, 0.0))
    rate = 0.02 if detector.startswith(TWO_STAGES) else 0.01
    config.optimizer.update(dict(name="sgd", lr=rate, momentum=0.9, weight_decay=1e-4, warmup=500))
    config.optimizer.drops = (steps(epochs * 2 / 3), steps(epochs * 11 / 12))
    config.ema.update(dict(momentum=1.0, ramp=1))  # no averaging: the final weights are those of the last step
    config.eval.every = config.checkpoint.every = steps(1)
    return config


def steps(epochs: float) -> int:
    return round(epochs * IMAGES / BATCH)
