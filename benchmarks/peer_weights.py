"""Do full-size checkpoints of mmdetection load? Compares outputs for random weights that mmdetection saved as .pth.

    OMP_NUM_THREADS=2 PEER/bin/python benchmarks/peer_weights.py --bench=BENCH --folder=DIR
    python benchmarks/peer_weights.py --folder=DIR

PEER is an environment with torch and mmdet; the folder BENCH holds `oracle_common.py`, which builds mmdetection's
models and is not published. The first command writes a checkpoint, as mmengine does, and the head's maps of each
detector; the second, which needs `kdjax[torch]`, reads them and prints the largest difference of each, relative to the
largest value of a map where that is above 1.
"""

import argparse
import os
import sys
from pathlib import Path

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
}
CLASSES = tuple(f"class {i}" for i in range(80))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", help="for the first command: the folder with oracle_common.py")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    # The normalised image, channels last.
    x = np.random.default_rng(0).normal(size=(1, 96, 128, 3)).astype(np.float32)
    write(args.folder, args.bench, x) if args.bench else compare(args.folder, x)


def write(folder: Path, bench: str, x: np.ndarray) -> None:
    """The peer's side."""
    os.environ.setdefault("ORACLE_THREADS", "2")
    sys.path.insert(0, bench)
    import oracle_common as peer
    import torch

    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        model = peer.MODELS.build(peer.drop_init(peer.sync_to_bn(peer.mmdet_cfg(config).model))).eval()
        for key, value in model.state_dict().items():  # statistics that matter
            if key.endswith("running_var"):
                value.uniform_(0.8, 1.2)
            elif key.endswith("running_mean"):
                value.normal_(0, 0.1)
        with torch.no_grad():
            outputs = model._forward(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        maps = [level.permute(0, 2, 3, 1).numpy() for kind in outputs for level in kind]
        np.savez(folder / f"{name}.npz", *maps)
        meta = {"dataset_meta": {"classes": CLASSES}}
        torch.save({"state_dict": model.state_dict(), "meta": meta}, folder / f"{name}.pth")
        print(f"wrote {name}")


def compare(folder: Path, x: np.ndarray) -> None:
    """Ours."""
    import jax

    from kdjax import detectors, weights
    from kdjax.report import study

    rows = []
    for name in CONFIGS:
        detector, params, stats, classes = weights.load(folder / f"{name}.pth", detectors.build(name, len(CLASSES)))
        assert tuple(classes) == CLASSES
        output, _ = jax.jit(lambda params, stats, apply=detector.apply: apply(params, stats, x, train=False))(
            params, stats
        )
        mine = [*output.cls_logits, *output.box_reg, *output.quality]
        theirs = list(np.load(folder / f"{name}.npz").values())
        pairs = zip(map(np.asarray, mine), theirs, strict=True)
        worst = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in pairs)
        rows.append([f"`{name}`", f"{worst:.1e}", f"{max(float(b.std()) for b in theirs):.2g}"])
        print(*rows[-1], flush=True)
    print(study.table(["detector", "largest difference", "largest deviation of a map"], rows))


if __name__ == "__main__":
    main()
