"""mmdetection's training of RetinaNet, FCOS, GFL and ATSS on COCO: SGD, 12 epochs of batch 16; any of their names.

    python train.py --config=configs/supervised/dense.py:retinanet_r50 --config.data.root=DIR/coco \\
        --config.student.weights=resnet50.pth --workdir=runs/retinanet_r50

DIR/coco is what `python -m kdjax.data.prepare --data_dir=DIR coco/2017` wrote; resnet50.pth are torchvision's weights
of the backbone, from which the published ones start as well, but for FCOS: its are Caffe's, with which
--config.student.options.style=caffe is right. DETECTOR,24 trains for 24 epochs, the 2x schedule.

Published (mmdetection), R50 and R101: RetinaNet 36.5, 38.5 (2x: 37.4, 38.9), FCOS 36.6, 39.1, GFL 40.2, 44.7 (the
latter 2x with several scales), ATSS 39.4, 41.5. There images have 800 px on the short and at most 1333 on the long
side; the canvas here is fixed, so upright images are smaller. There norms and biases decay as well, and FCOS's biases
have twice the rate and no decay; here no norm or bias decays, and all have one rate.
"""

from configs.supervised.rtmdet import IMAGES
from kdjax.train.config import augment, base

BATCH = 16


def get_config(chosen: str = "retinanet_r50"):
    detector, _, epochs = chosen.partition(",")
    epochs = int(epochs or 12)
    config = base()
    config.batch_size = BATCH
    config.steps = steps(epochs)
    config.student.detector = detector
    if detector.startswith("fcos"):
        config.student.options.style = "pytorch"  # of the backbone that torchvision's weights fit
    config.data.source = "tfds"
    config.data.val_split = "validation"
    config.data.image_size = (800, 1344)
    config.data.augment = augment(scale=(1.0, 1.0), crop=False, hsv=(0.0, 0.0, 0.0))
    config.optimizer.update(dict(name="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, warmup=500))
    config.optimizer.drops = (steps(epochs * 2 / 3), steps(epochs * 11 / 12))
    config.ema.update(dict(momentum=1.0, ramp=1))  # none: the last weights count
    config.eval.every = config.checkpoint.every = steps(1)
    return config


def steps(epochs: float) -> int:
    return round(epochs * IMAGES / BATCH)
