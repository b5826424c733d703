"""Exports mmdetection's RTMDet with random weights by torch.onnx, to be timed beside kdjax's own ONNX file.

    OMP_NUM_THREADS=2 PEER/bin/python benchmarks/peer_onnx.py --bench=BENCH --size=320 --out=peer_320.onnx
    python benchmarks/inference.py --detector=rtmdet_tiny --sizes=320 --onnx=peer_320.onnx

PEER is an environment with torch, mmdet, onnx and onnxscript; the folder BENCH holds `oracle_common.py`, which builds
mmdetection's models and is not published. Input is a normalised image f32[1, 3, size, size], outputs are the head's
maps.
"""

import argparse
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True)
    parser.add_argument("--detector", default="tiny")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    os.environ.setdefault("ORACLE_THREADS", "2")
    sys.path.insert(0, args.bench)
    import oracle_common as peer
    import torch

    config = peer.mmdet_cfg(f"rtmdet/rtmdet_{args.detector}_8xb32-300e_coco.py").model
    model = peer.MODELS.build(peer.drop_init(peer.sync_to_bn(config))).eval()
    image = torch.randn(1, 3, args.size, args.size)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            classes, boxes = self.model._forward(x)
            return (*classes, *boxes)

    told = dict(opset_version=18, input_names=["image"], dynamo=True, external_data=False)
    with torch.no_grad():
        torch.onnx.export(Network(), (image,), args.out, **told)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
