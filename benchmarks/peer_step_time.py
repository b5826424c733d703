r"""A training step beside mmdetection's: the same images, boxes and masks, one run after the other in turn.

    python benchmarks/peer_step_time.py --peer=PEER/bin/python --bench=BENCH \
        --detector=rtmdet_ins_tiny --batch=4 --size=320
    python benchmarks/peer_step_time.py --peer=PEER/bin/python --bench=BENCH \
        --detector=faster_rcnn_r50 --batch=2 --size=640 --layout=contiguous

PEER is an environment with torch and mmdet; the folder BENCH holds `oracle_common.py`, which builds mmdetection's
models and is not published. Each round starts `step_time.py` and then mmdetection in processes of their own; both
compute the losses, their gradients and AdamW in float32, from random weights. mmdetection gets normalised images, kdjax
normalises them in the step and also moves its average of the weights. `--layout` is that of mmdetection's maps;
torchvision's RoIAlign is slow on maps with channels last. The last line is one JSON object with the medians of each run
in seconds and the ratio of their medians.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WARM = 2  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="PEER/bin/python")
    parser.add_argument("--bench", required=True, help="the folder with oracle_common.py")
    parser.add_argument("--detector", default="rtmdet_ins_tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=10, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layout", default="channels_last", choices=["channels_last", "contiguous"], help="the peer's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", help="of the peer's own process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the peer's own process")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the peer's own process")
    parser.add_argument("--mode", default="step", choices=["step", "forward", "compiled"], help="likewise")
    args = parser.parse_args()
    if args.data:
        print(json.dumps(peer_steps(args)))
        return
    from method_cost import made_up_batch

    from kdjax import detectors
    from kdjax.training import provenance

    masks = bool(detectors.build(args.detector, 80).masks)
    step = [f"--{name}={getattr(args, name)}" for name in ("detector", "batch", "size", "steps")]
    medians = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "batch.npz"
        np.savez(data, **made_up_batch(args.batch, args.size, 80, masks=masks))
        of_peer = [f"--bench={args.bench}", f"--data={data}", f"--threads={args.threads}", f"--layout={args.layout}"]
        commands = {
            "ours": [sys.executable, str(Path(__file__).with_name("step_time.py")), *step],
            "peer": [args.peer, __file__, *step, *of_peer],
        }
        for _ in range(args.rounds):
            for who, command in commands.items():
                environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
                found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                medians[who].append(json.loads(found.stdout.strip().splitlines()[-1])["median_s"])
                print(who, medians[who][-1], flush=True)
    ours, peer = (statistics.median(values) for values in medians.values())
    what = f"{args.detector}, batch {args.batch}, {args.size} px"
    print(f"{what}: ours {1000 * ours:.0f} ms, mmdetection {1000 * peer:.0f} ms, ratio {ours / peer:.2f}")
    print(json.dumps(vars(args) | medians | {"ratio": round(ours / peer, 3)} | provenance.environment()))


def peer_steps(args: argparse.Namespace) -> dict[str, float]:
    """Mmdetection's side: seconds of its steps, or of its network alone, eager or under torch.compile.

    On a GPU TF32 is allowed, cuDNN chooses by trying, and AdamW is the fused one; bfloat16 is torch's autocast.
    """
    os.environ["ORACLE_THREADS"] = str(args.threads)
    sys.path.insert(0, args.bench)
    import oracle_common as peer
    import torch
    from peer_weights import CONFIGS

    torch.manual_seed(0)
    cuda = args.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True
    config = peer.drop_init(peer.sync_to_bn(peer.mmdet_cfg(CONFIGS[args.detector]).model))
    model = peer.MODELS.build(config)
    model.init_weights()
    model.train(args.mode == "step").to(args.device)
    data = np.load(args.data)
    images = torch.from_numpy((data["image"].transpose(0, 3, 1, 2) / np.float32(57) - 2).astype(np.float32))
    images = images.to(args.device)
    if args.layout == "channels_last":
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    truth = []
    for i, valid in enumerate(data["valid"]):
        boxes, labels = (torch.from_numpy(data[name][i][valid]).to(args.device) for name in ("boxes", "labels"))
        truth.append(peer.InstanceData(bboxes=boxes, labels=labels.long()))
        if "masks" in data:
            masks = (data["masks"][i][valid] > 127).astype(np.uint8).repeat(4, 1).repeat(4, 2)
            truth[-1].masks = peer.BitmapMasks(masks, args.size, args.size)
    samples = peer.make_samples(truth, args.size, args.size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=cuda)
    network = torch.compile(model._forward) if args.mode == "compiled" else model._forward
    precision = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def once(given: list) -> None:
        if args.mode != "step":
            with torch.inference_mode(), precision:
                network(images)
            return
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = peer.flat_losses(model.loss(images, given))
        loss.backward()
        optimizer.step()
        assert np.isfinite(float(loss.detach()))

    seconds = []
    for _ in range(WARM + args.steps):
        given = copy.deepcopy(samples)  # the loss replaces their masks
        since = time.perf_counter()
        once(given)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    seconds = seconds[WARM:]
    return {"median_s": round(statistics.median(seconds), 5), "least_s": round(min(seconds), 5)}


if __name__ == "__main__":
    main()
