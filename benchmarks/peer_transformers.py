"""Do Hugging Face's detection transformers load? Compares outputs for random weights that transformers saved.

    PEER/bin/python benchmarks/peer_transformers.py --write --folder=DIR [NAME ...]
    python benchmarks/peer_transformers.py --folder=DIR [--float64] [NAME ...]

PEER is an environment with torch and transformers. The first command writes `DIR/NAME/model.safetensors`, which
`save_pretrained` makes, in full size for 80 classes, beside the outputs for an image of 640 x 640; the second reads the
file and prints the largest differences, relative to the largest value, and after each, in brackets, what a change of
the image by one rounding makes of transformers' own outputs. With `--float64` both sides compute in float64 (kdjax but
for what it does in float32 in any case), and in brackets is what float32 makes of transformers' outputs.

Norms get the statistics of a random image, and the image is drawn anew until the last query that is selected and the
first one that is not differ in score by 1e-4.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

SIDE, CLASSES, GAP = 640, 80, 1e-4
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
DEEP = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
LARGE = {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384] * 3}
# The backbone, and what differs from transformers' defaults, which are those of r50 and of D-FINE's l.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "r18": (BASIC | {"depths": [2, 2, 2, 2]}, {"hidden_expansion": 0.5, "decoder_layers": 3}),
    "r34": (BASIC | {"depths": [3, 4, 6, 3]}, {"hidden_expansion": 0.5, "decoder_layers": 4}),
    "r50": (DEEP | {"depths": [3, 4, 6, 3]}, {}),
    "r101": (DEEP | {"depths": [3, 4, 23, 3]}, LARGE),
}
B0 = {
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3] * 4,
    "use_learnable_affine_block": True,
}
B2 = {
    "stem_channels": [3, 24, 32],
    "stage_in_channels": [32, 96, 384, 768],
    "stage_mid_channels": [32, 64, 128, 256],
    "stage_out_channels": [96, 384, 768, 1536],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [4] * 4,
    "use_learnable_affine_block": True,
}
B4 = {
    "stem_channels": [3, 32, 48],
    "stage_in_channels": [48, 128, 512, 1024],
    "stage_mid_channels": [48, 96, 192, 384],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [6] * 4,
    "use_learnable_affine_block": False,
}
B5 = B4 | {
    "stem_channels": [3, 32, 64],
    "stage_in_channels": [64, 128, 512, 1024],
    "stage_mid_channels": [64, 128, 256, 512],
    "stage_num_blocks": [1, 2, 5, 2],
}
POINTS = {"decoder_n_points": [3, 6, 3]}
NANO = {"decoder_n_points": [6, 6], "num_feature_levels": 2, "feat_strides": [16, 32], "encode_proj_layers": [1]}
NANO |= {"encoder_hidden_dim": 128, "d_model": 128, "decoder_in_channels": [128, 128]}
NANO |= {"encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
D_FINE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "n": (B0, NANO | {"hidden_expansion": 0.34, "depth_mult": 0.5, "decoder_layers": 3}),
    "s": (B0, POINTS | {"hidden_expansion": 0.5, "depth_mult": 0.34, "decoder_layers": 3}),
    "m": (B2, POINTS | {"depth_mult": 0.67, "decoder_layers": 4}),
    "l": (B4, POINTS),
    "x": (B5, POINTS | LARGE | {"reg_scale": 8.0}),
}
NAMES = [f"{family}_{size}" for family in ("rtdetr", "rtdetrv2") for size in SIZES]
NAMES += [f"dfine_{size}" for size in D_FINE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--write", action="store_true", help="the peer's side")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--float64", action="store_true", help="compare with transformers in float64")
    args = parser.parse_args()
    for name in args.names or NAMES:
        if name not in NAMES:
            parser.error(f"unknown detector {name!r}: the detectors are {', '.join(NAMES)}")
        if args.write:
            write(args.folder / name, name)
        else:
            compare(args.folder / name, name, double=args.float64)


def write(folder: Path, name: str) -> None:
    """The peer's side."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = made(name)
    with torch.no_grad():
        spread(model)
        calibrate(model)
        for seed in range(100):
            image = picture(seed)
            found = model(pixel_values=image)
            scores = found.enc_outputs_class.max(-1).values[0].sort(descending=True).values
            if (scores[299] - scores[300]) / scores[299].abs() > GAP:
                break
        else:
            raise RuntimeError("no image has a clear edge of the selection")
        rounding = torch.from_numpy(np.random.default_rng(0).choice([-1, 1], image.shape))
        moved = model(pixel_values=(image.double() * (1 + 6e-8 * rounding)).float())
    model.save_pretrained(folder)
    with torch.no_grad():
        double = model.double()(pixel_values=image.double())
    others = named(moved, "moved_") | named(double, "double_")
    np.savez(folder / "outputs.npz", image=image.numpy(), **named(found), **others)
    print(name, "by transformers", transformers.__version__)


def named(found: Any, prefix: str = "") -> dict[str, np.ndarray]:  # noqa: ANN401
    """The outputs of transformers by name."""
    outputs = {"logits": found.logits, "boxes": found.pred_boxes}
    outputs |= {"selected_logits": found.enc_topk_logits, "selected_boxes": found.enc_topk_bboxes}
    outputs |= {f"neck_{i}": x for i, x in enumerate(found.encoder_last_hidden_state)}
    return {f"{prefix}{key}": value.numpy() for key, value in outputs.items()}


def made(name: str) -> Any:  # noqa: ANN401 - the package is not installed with kdjax
    """A model of transformers in evaluation mode."""
    import transformers

    family, size = name.split("_", 1)
    kind = {"rtdetr": "RTDetr", "rtdetrv2": "RTDetrV2", "dfine": "DFine"}[family]
    of_backbone, changed = (D_FINE if family == "dfine" else SIZES)[size]
    levels = changed.get("num_feature_levels", 3)
    if family == "dfine":
        widths = of_backbone["stage_out_channels"]
        of_backbone = of_backbone | {"depths": [1] * 4, "hidden_sizes": widths}  # the number and names of stages
        backbone = transformers.HGNetV2Config(**of_backbone, out_indices=[2, 3, 4][-levels:])
    else:
        backbone = transformers.RTDetrResNetConfig(**of_backbone, out_indices=[2, 3, 4])
        widths = of_backbone["hidden_sizes"]
    inputs = widths[-levels:]
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, encoder_in_channels=inputs, num_labels=CLASSES, **changed
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config).eval()


def spread(model: Any) -> None:  # noqa: ANN401
    """Draws all weights, so that no score is like another: transformers' own initial values are nearly 0.

    Linear layers are weaker than convolutions: otherwise a decoder of six layers makes 1e-4 of a rounding of the image.
    """
    import torch

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            gain = 1.3 if isinstance(module, torch.nn.Conv2d) else 0.6
            module.weight.normal_(0, gain / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
        elif isinstance(module, torch.nn.LayerNorm) or hasattr(module, "running_var"):
            module.weight.uniform_(0.6, 1.4)
            module.bias.normal_(0, 0.2)
        elif hasattr(module, "scale") and hasattr(module, "bias"):  # behind the activations of HGNetv2
            module.scale.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.1)
    model.model.enc_bbox_head.layers[-1].weight.mul_(0.5)
    for head in model.model.decoder.bbox_embed:
        head.layers[-1].weight.mul_(0.4)


def calibrate(model: Any) -> None:  # noqa: ANN401
    """Gives every norm, in the order in which they run, the statistics of random images."""

    def measure(norm: Any, inputs: tuple[Any, ...]) -> None:  # noqa: ANN401
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        spread = inputs[0].var((0, 2, 3))
        norm.running_var.copy_(spread + spread.mean())  # or deep networks blow up roundings

    hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if hasattr(m, "running_var")]
    model(pixel_values=picture(1000))
    for hook in hooks:
        hook.remove()


def picture(seed: int) -> Any:  # noqa: ANN401
    """Noise on coarse tiles, f32[1, 3, H, W]."""
    import torch

    rng = np.random.default_rng(seed)
    tiles = rng.normal(size=(1, 3, SIDE // 32, SIDE // 32)).repeat(32, 2).repeat(32, 3)
    return torch.from_numpy((tiles + 0.5 * rng.normal(size=(1, 3, SIDE, SIDE))).astype(np.float32))


def compare(folder: Path, name: str, *, double: bool) -> None:
    """Our side."""
    import jax

    jax.config.update("jax_enable_x64", double)

    from kdjax import weights
    from kdjax.detectors import build

    detector = build(name, CLASSES)
    state, _ = weights.read_checkpoint(folder / "model.safetensors")
    params, stats = weights.from_torch(detector, state, keep_classifiers=True)
    stored = dict(np.load(folder / "outputs.npz"))
    image = stored.pop("image").transpose(0, 2, 3, 1)
    sides: dict[str, dict[str, np.ndarray]] = {"moved": {}, "double": {}, "": {}}
    for key, value in stored.items():
        side = next(side for side in sides if key.startswith(side))
        sides[side][key.removeprefix(f"{side}_")] = value
    theirs, other = (sides["double"], sides[""]) if double else (sides[""], sides["moved"])
    if double:
        params, stats, image = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, stats, image))
    run = jax.jit(lambda *inputs: detector.apply(*inputs, train=False)[0])
    output = jax.device_get(run(params, stats, image))
    assert output.selected is not None
    ours = {"logits": output.layers[-1].logits, "boxes": output.layers[-1].boxes}
    ours |= {"selected_logits": output.selected.logits, "selected_boxes": output.selected.boxes}
    ours |= {f"neck_{i}": np.moveaxis(x, -1, 1) for i, x in enumerate(output.neck)}
    found, usual = apart(ours, theirs), apart(other, theirs)
    print(f"{name}: {len(state)} arrays read;", ", ".join(f"{k} {found[k]:.1e} ({usual[k]:.1e})" for k in found))


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest differences, relative to the largest value; queries are paired by what they were selected for."""
    rows = [
        np.concatenate([np.asarray(side[f"selected_{k}"][0]) for k in ("logits", "boxes")], 1) for side in (one, other)
    ]
    order = np.abs(rows[0][:, None] - rows[1]).max(-1).argmin(0)
    if len(np.unique(order)) < len(order):
        raise RuntimeError("the selected queries are not the same")
    paired = {key: value if key.startswith("neck") else value[:, order] for key, value in one.items()}
    return {key: float(np.abs(paired[key] - value).max() / np.abs(value).max()) for key, value in other.items()}


if __name__ == "__main__":
    main()
