"""Do full-size checkpoints of mmdetection load? Compares outputs for random weights that mmdetection saved as .pth.

    OMP_NUM_THREADS=2 PEER/bin/python benchmarks/peer_weights.py --bench=BENCH --folder=DIR
    python benchmarks/peer_weights.py --folder=DIR

PEER is an environment with torch and mmdet; the folder BENCH holds `oracle_common.py`, which builds mmdetection's
models and is not published. The first command writes a checkpoint, as mmengine does, and the head's maps of each
detector, of two stages also what the second says of given boxes; the second, which needs `kdjax[torch]`, reads them and
prints the largest difference of each, relative to the largest value of a map where that is above 1.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONFIGS = {
    "rtmdet_tiny": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "rtmdet_s": "rtmdet/rtmdet_s_8xb32-300e_coco.py",
    "rtmdet_m": "rtmdet/rtmdet_m_8xb32-300e_coco.py",
    "rtmdet_l": "rtmdet/rtmdet_l_8xb32-300e_coco.py",
    "rtmdet_x": "rtmdet/rtmdet_x_8xb32-300e_coco.py",
    "retinanet_r50": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "retinanet_r101": "retinanet/retinanet_r101_fpn_1x_coco.py",
    "fcos_r50": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "fcos_r50-center": "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
    "fcos_r101": "fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py",
    "gfl_r50": "gfl/gfl_r50_fpn_1x_coco.py",
    "gfl_r101": "gfl/gfl_r101_fpn_ms-2x_coco.py",
    "atss_r50": "atss/atss_r50_fpn_1x_coco.py",
    "atss_r101": "atss/atss_r101_fpn_1x_coco.py",
    "yolox_nano": "yolox/yolox_nano_8xb8-300e_coco.py",
    "yolox_tiny": "yolox/yolox_tiny_8xb8-300e_coco.py",
    "yolox_s": "yolox/yolox_s_8xb8-300e_coco.py",
    "yolox_l": "yolox/yolox_l_8xb8-300e_coco.py",
    "yolox_x": "yolox/yolox_x_8xb8-300e_coco.py",
    "rtmdet_ins_tiny": "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
    "rtmdet_ins_s": "rtmdet/rtmdet-ins_s_8xb32-300e_coco.py",
    "rtmdet_ins_m": "rtmdet/rtmdet-ins_m_8xb32-300e_coco.py",
    "rtmdet_ins_l": "rtmdet/rtmdet-ins_l_8xb32-300e_coco.py",
    "rtmdet_ins_x": "rtmdet/rtmdet-ins_x_8xb16-300e_coco.py",
    "faster_rcnn_r50": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "faster_rcnn_r101": "faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py",
    "faster_rcnn_x101-32x4d": "faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py",
    "faster_rcnn_x101-64x4d": "faster_rcnn/faster-rcnn_x101-64x4d_fpn_1x_coco.py",
    "mask_rcnn_r50": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn_r101": "mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py",
    "cascade_rcnn_r50": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn_x101-64x4d": "cascade_rcnn/cascade-rcnn_x101-64x4d_fpn_1x_coco.py",
}
CLASSES = tuple(f"class {i}" for i in range(80))
STDS = (0.1, 0.1, 0.2, 0.2)  # of the deltas of regions
LABELS = np.arange(20) * 4  # of the boxes whose masks are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", help="for the first command: the folder with oracle_common.py")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), choices=list(CONFIGS), metavar="DETECTOR")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 96, 128, 3)).astype(np.float32)  # the normalised image, channels last
    corner = rng.uniform(0, 60, (len(LABELS), 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 60, corner.shape)], 1).clip(0, (128, 96) * 2)
    boxes = boxes.astype(np.float32)
    write(args.folder, args.bench, args.only, x, boxes) if args.bench else compare(args.folder, args.only, x, boxes)


def write(folder: Path, bench: str, names: list[str], x: np.ndarray, boxes: np.ndarray) -> None:
    """The peer's side."""
    os.environ.setdefault("ORACLE_THREADS", "2")
    sys.path.insert(0, bench)
    import oracle_common as peer
    import torch

    for name in names:
        torch.manual_seed(0)
        model = peer.MODELS.build(peer.drop_init(peer.sync_to_bn(peer.mmdet_cfg(CONFIGS[name]).model))).eval()
        for key, value in model.state_dict().items():  # statistics that matter
            if key.endswith("running_var"):
                value.uniform_(0.8, 1.2)
            elif key.endswith("running_mean"):
                value.normal_(0, 0.1)
        with torch.no_grad():
            features = model.extract_feat(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
            outputs = (model.rpn_head if hasattr(model, "roi_head") else model.bbox_head)(features)
            levels = [level for kind in outputs for level in ([kind] if torch.is_tensor(kind) else kind)]
            found = [level.permute(0, 2, 3, 1).numpy() for level in levels]
            if hasattr(model, "roi_head"):
                rois = torch.from_numpy(np.column_stack([np.zeros(len(boxes), np.float32), boxes]))
                cascade = [(stage,) for stage in range(getattr(model.roi_head, "num_stages", 0))]
                for stage in cascade or [()]:
                    regions = model.roi_head._bbox_forward(*stage, features, rois)
                    head = model.roi_head.bbox_head[stage[0]] if stage else model.roi_head.bbox_head
                    deltas = regions["bbox_pred"].numpy()[None]
                    # kdjax gives the deltas of all stages in the units of the first.
                    units = np.resize(np.divide(head.bbox_coder.stds, STDS), deltas.shape[-1]).astype(np.float32)
                    found += [regions["cls_score"].numpy()[None], deltas * units]
                    if model.with_mask:
                        masks = model.roi_head._mask_forward(*stage, features, rois)["mask_preds"]
                        found.append(masks[np.arange(len(boxes)), LABELS].numpy()[None])
        np.savez(folder / f"{name}.npz", *found)
        meta = {"dataset_meta": {"classes": CLASSES}}
        torch.save({"state_dict": model.state_dict(), "meta": meta}, folder / f"{name}.pth")
        print(f"wrote {name}")


def compare(folder: Path, names: list[str], x: np.ndarray, boxes: np.ndarray) -> None:
    """Ours."""
    import jax

    from kdjax import detectors, weights
    from kdjax.report import study

    def outputs(params: object, stats: object, apply: Callable[..., Any]) -> list[jax.Array]:
        found, _ = apply(params, stats, x, train=False)
        if found.at is not None:  # mmdetection's RPN returns the objectness first
            asked = []
            for stage in found.stages or [found]:
                asked += stage.at(boxes[None])
                asked += [] if stage.masks_at is None else [stage.masks_at(boxes[None], LABELS[None])]
            return [*found.quality, *found.box_reg, *asked]
        maps = [*found.cls_logits, *found.box_reg, *found.quality, *found.kernels]
        return maps if found.prototypes is None else [*maps, found.prototypes]

    rows = []
    for name in names:
        detector, params, stats, classes = weights.load(folder / f"{name}.pth", detectors.build(name, len(CLASSES)))
        assert tuple(classes) == CLASSES
        mine = jax.jit(outputs, static_argnums=2)(params, stats, detector.apply)
        theirs = list(np.load(folder / f"{name}.npz").values())
        pairs = zip(map(np.asarray, mine), theirs, strict=True)
        worst = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in pairs)
        rows.append([f"`{name}`", f"{worst:.1e}", f"{max(float(b.std()) for b in theirs):.2g}"])
        print(*rows[-1], flush=True)
    print(study.table(["detector", "largest difference", "largest deviation of a map"], rows))


if __name__ == "__main__":
    main()
