"""Do torchvision's two-stage detectors load? Compares detections for random weights that torchvision saved as .pth.

    PEER/bin/python benchmarks/peer_torchvision.py --write --folder=DIR
    python benchmarks/peer_torchvision.py --folder=DIR

PEER is an environment with torch and torchvision. The first command writes the weights and the detections of an image
of 320 pixels, in full size, for 3 classes and for COCO's 90 numbers; the second, which needs `kdjax[torch]`, reads them
and prints how many detections agree, and the largest differences. The ten numbers that no category of COCO has are
made impossible in torchvision's models.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 320
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
MODELS = {"faster_rcnn": "fasterrcnn_resnet50_fpn", "mask_rcnn": "maskrcnn_resnet50_fpn"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="the peer's side")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for family in MODELS:
        for outputs in (4, 91):
            (write if args.write else compare)(args.folder / f"{family}-{outputs}", family, outputs)


def write(stem: Path, family: str, outputs: int) -> None:
    """The peer's side; norms get statistics, and predictions are spread."""
    import torch
    import torchvision

    make = getattr(torchvision.models.detection, MODELS[family])
    torch.manual_seed(0)
    sizes = {"min_size": SIDE, "max_size": SIDE}
    model = make(weights=None, weights_backbone=None, num_classes=outputs, **sizes).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)):
            module.eps = 0.0  # as for the published weights
            module.running_var.copy_(torch.rand(module.running_var.shape) + 0.5)
            module.running_mean.copy_(torch.randn(module.running_mean.shape) * 0.1)
            module.weight.data.copy_(torch.rand(module.weight.shape) * 0.5 + 0.2)
    head, predictor = model.rpn.head, model.roi_heads.box_predictor
    with torch.no_grad():
        scale = 3.0 if outputs == 91 else 0.3
        for layer, deviation in (
            (head.cls_logits, 0.05),
            (head.bbox_pred, 0.1),
            (predictor.cls_score, scale),
            (predictor.bbox_pred, 0.2),
        ):
            layer.weight.normal_(0, deviation)
        if outputs == 91:
            predictor.cls_score.bias[list(UNUSED)] = -1e4
        masks = {}
        if family == "mask_rcnn":  # the model itself returns them drawn into the image
            model.roi_heads.mask_predictor.register_forward_hook(lambda *call: masks.update(logits=call[-1]))
        found = model([torch.from_numpy(picture().transpose(2, 0, 1).copy()).float() / 255])[0]
        if masks:
            found["masks"] = masks["logits"].sigmoid()[torch.arange(len(found["labels"])), found["labels"]]
    torch.save(model.state_dict(), f"{stem}.pth")
    np.savez_compressed(f"{stem}.npz", **{name: value.numpy() for name, value in found.items()})
    print(stem.name, len(found["scores"]), "detections")


def picture() -> np.ndarray:
    """Coloured tiles with noise, u8[H, W, 3]."""
    rng = np.random.default_rng(0)
    tiles = rng.normal(120, 40, (SIDE // 8, SIDE // 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(tiles + rng.normal(0, 10, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def compare(stem: Path, family: str, outputs: int) -> None:
    """Our side: each of the peer's detections with the nearest of ours of its class."""
    import jax

    from kdjax import weights
    from kdjax.detectors import build, names
    from kdjax.weights.read import read_checkpoint

    if f"{family}_r50" not in names():
        return
    state = read_checkpoint(f"{stem}.pth")[0]
    theirs: dict[str, Any] = dict(np.load(f"{stem}.npz"))
    numbers = np.array([i for i in range(1, outputs) if outputs != 91 or i not in UNUSED])
    detector = weights.infer_options(build(f"{family}_r50", len(numbers)), state)
    params, stats = weights.from_torch(detector, state, keep_classifiers=True)
    output, _ = detector.apply(params, stats, detector.preprocess(picture()[None]), train=False)
    found = jax.device_get(jax.jit(detector.decode)(output, np.array([[SIDE, SIDE]])))
    rows = np.flatnonzero(found.valid[0])
    boxes, scores, labels = (value[0][rows] for value in (found.boxes, found.scores, found.labels))
    pairs, apart = [], []
    for i, (box, score, label) in enumerate(zip(theirs["boxes"], theirs["scores"], theirs["labels"], strict=True)):
        off = np.abs(boxes - box).max(1) + 100 * np.abs(scores - score)
        off = np.where(numbers[labels] == label, off, np.inf)
        if len(off) and off.min() < 0.5:
            pairs.append((i, int(off.argmin())))
            apart.append((np.abs(boxes[pairs[-1][1]] - box).max(), abs(scores[pairs[-1][1]] - score)))
    worst = np.max(apart, axis=0, initial=0) if apart else (0, 0)
    text = f"{stem.name}: {len(pairs)} of {len(theirs['scores'])}, ours {len(rows)}"
    text += f"; at most {worst[0]:.1e} px apart, {worst[1]:.1e} in score"
    if detector.masks:
        assert found.masks is not None
        off = [np.abs(found.masks[0][rows][j] - theirs["masks"][i]).max() for i, j in pairs]
        text += f", {np.max(off):.1e} in the masks' probabilities"
    print(text)


if __name__ == "__main__":
    main()
