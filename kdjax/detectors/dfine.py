"""D-FINE: HGNetv2, a hybrid encoder, and a decoder whose layers refine distributions of the boxes' edges.

Reference: Peng et al., D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement, ICLR 2025.
Peers: the authors' PyTorch code; transformers 5.24, whose network is the same, but not its loss
(`detr_loss.d_fine_loss`).

Loads: state dicts and safetensors of transformers, and the authors' .pth.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.detectors import detr, detr_loss, detr_names, fdr, gelan, hgnetv2, hybrid_encoder
from kdjax.detectors.api import Detector, State, TorchNames
from kdjax.detectors.keywords import changed, own_values, resolve
from kdjax.detectors.layers import ConvNorm, uniform_fans
from kdjax.detectors.query_decoder import Decoder
from kdjax.errors import UserError

TITLE = "D-FINE"
UP = 0.5  # of the bins, in all sizes
POSITION = 10.0  # bound of the embedding of boxes

_LIGHT = {"affine": True, "frozen_stem": False, "frozen_norm": False}
_HEAVY = {"affine": False, "frozen_stem": True, "frozen_norm": True}
_B0 = _LIGHT | {"stem": [16, 16], "middle": [16, 32, 64, 128], "widths": [64, 256, 512, 1024]}
_B0 |= {"blocks": [1, 1, 2, 1], "block_layers": [3, 3, 3, 3]}
_B2 = _LIGHT | {"stem": [24, 32], "middle": [32, 64, 128, 256], "widths": [96, 384, 768, 1536]}
_B2 |= {"blocks": [1, 1, 3, 1], "block_layers": [4, 4, 4, 4]}
_B4 = _HEAVY | {"stem": [32, 48], "middle": [48, 96, 192, 384], "widths": [128, 512, 1024, 2048]}
_B4 |= {"blocks": [1, 1, 3, 1], "block_layers": [6, 6, 6, 6]}
_B5 = _HEAVY | {"stem": [32, 64], "middle": [64, 128, 256, 512], "widths": [128, 512, 1024, 2048]}
_B5 |= {"blocks": [1, 2, 5, 2], "block_layers": [6, 6, 6, 6]}
_REST = {"encoder_channels": 256, "encoder_hidden": 1024, "channels": 256, "hidden": 1024, "heads": 8}
_REST |= {"points": [3, 6, 3], "queries": 300, "scale": 4.0}
_NARROW = {"encoder_channels": 128, "encoder_hidden": 512, "channels": 128, "hidden": 512, "points": [6, 6]}
# The published sizes.
VARIANTS: dict[str, dict[str, Any]] = {
    "n": _B0 | _REST | _NARROW | {"expansion": 0.34, "repeats": 2, "layers": 3},
    "s": _B0 | _REST | {"expansion": 0.5, "repeats": 1, "layers": 3},
    "m": _B2 | _REST | {"expansion": 1.0, "repeats": 2, "layers": 4},
    "l": _B4 | _REST | {"expansion": 1.0, "repeats": 3, "layers": 6},
    "x": _B5 | _REST | {"encoder_channels": 384, "encoder_hidden": 2048, "expansion": 1.0, "repeats": 3, "layers": 6}
    | {"scale": 8.0},
}  # fmt: skip


def decoder(num_classes: int, options: Mapping[str, Any]) -> Decoder:
    """The decoder of options."""
    channels, layers = options["channels"], options["layers"]
    return Decoder(
        num_classes,
        channels,
        layers=layers,
        queries=options["queries"],
        heads=options["heads"],
        hidden=options["hidden"],
        points=tuple(options["points"]),
        predict=lambda: fdr.EdgeHeads(num_classes, channels, layers, bins(options)),
        position_limit=POSITION,
        gated=True,
        projected=False,
        draw=uniform_fans,
    )


def bins(options: Mapping[str, Any]) -> fdr.Bins:
    """What the distributions of options are over."""
    return fdr.Bins(options["bins"], UP, options["scale"])


def network(num_classes: int, options: Mapping[str, Any]) -> detr.DETR:
    """The network of options."""
    sizes = zip(*(options[name] for name in ("middle", "widths", "blocks", "block_layers")), strict=True)
    levels, width = len(options["points"]), options["encoder_channels"]
    backbone = hgnetv2.HGNetv2(
        tuple(options["stem"]),
        [hgnetv2.Stage(*stage) for stage in sizes],
        affine=options["affine"],
        levels=levels,
        frozen_stem=options["frozen_stem"],
        frozen_norm=options["frozen_norm"],
    )
    encoder = hybrid_encoder.HybridEncoder(
        options["widths"][-levels:],
        width,
        heads=options["heads"],
        hidden=options["encoder_hidden"],
        fusion=gelan.gelan_fusion(options["expansion"], options["repeats"]),
    )
    count = levels if width != options["channels"] else 0
    into = [ConvNorm(width, options["channels"], 1, activation=None) for _ in range(count)]
    return detr.DETR(strides(options), backbone, encoder, into, decoder(num_classes, options))


def strides(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the levels of options."""
    return (8, 16, 32)[-len(options["points"]) :]


def make(
    variant: str,
    num_classes: int,
    *,
    stem: list[int] | None = None,
    middle: list[int] | None = None,
    widths: list[int] | None = None,
    blocks: list[int] | None = None,
    block_layers: list[int] | None = None,
    affine: bool | None = None,
    frozen_stem: bool | None = None,
    frozen_norm: bool | None = None,
    encoder_channels: int | None = None,
    encoder_hidden: int | None = None,
    expansion: float | None = None,
    repeats: int | None = None,
    channels: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    layers: int | None = None,
    queries: int | None = None,
    points: list[int] | None = None,
    bins: int = 32,
    scale: float | None = None,
    denoising: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
) -> Detector:
    """Builds D-FINE in one of its sizes.

    Args:
      variant: n, s, m, l or x.
      num_classes: K >= 1.
      stem: channels inside the backbone's stem, >= 2, and after it, >= 1; None, here and below: the variant's.
      middle, widths, blocks, block_layers: of the backbone's four stages: channels of a block's layers, channels of the
        stage (>= 2), its blocks, and the layers of a block, each >= 1.
      affine: whether a learned scale and shift follow each activation of the backbone.
      frozen_stem: whether the backbone's stem is not trained.
      frozen_norm: whether the backbone's batch norms keep their statistics, scales and biases.
      encoder_channels, encoder_hidden: channels of the encoder's maps, a multiple of 4 and of `heads`, and of its
        perceptron, >= 1.
      expansion: channels inside the encoder's fusion blocks, as a share of half of `encoder_channels`, > 0.
      repeats: RepVGG blocks in each half of a fusion block, >= 1.
      channels, heads, hidden: of the decoder: channels of the states, a multiple of `heads`; attention heads, in the
        encoder too; channels of the perceptrons.
      layers: of the decoder, >= 1.
      queries: Q >= 1.
      points: that a head samples on each level, each >= 1; three levels are those of strides 8, 16 and 32, two those of
        16 and 32.
      bins: n, even, >= 4; the distance of an edge has n + 1 bins.
      scale: of these distances, > 0 (`kdjax.boxes.edge_bins`).
      denoising: pairs of denoising queries in training, >= 0.
      label_noise, box_noise: their noise, 0 .. 1 (`denoising.contrastive`).

    Returns:
      The detector. Its rows are the queries of the decoder's last layer; their boxes are not clipped, and may be
      inverted.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: the authors' configs/dfine/dfine_hgnetv2_*_coco.yml.

    Reference: Peng et al., ICLR 2025, section 5 and table 1; the sizes are those of the authors' repository.

    Example:
      >>> make("n", 5, layers=2).options
      {'layers': 2}
    """
    given = dict(
        stem=stem, middle=middle, widths=widths, blocks=blocks, block_layers=block_layers, affine=affine,
        frozen_stem=frozen_stem, frozen_norm=frozen_norm, encoder_channels=encoder_channels,
        encoder_hidden=encoder_hidden, expansion=expansion, repeats=repeats, channels=channels, heads=heads,
        hidden=hidden, layers=layers, queries=queries, points=points, bins=bins, scale=scale, denoising=denoising,
        label_noise=label_noise, box_noise=box_noise,
    )  # fmt: skip
    options = resolve(given, own_values(TITLE, VARIANTS, variant))
    _check(num_classes, options)
    family = detr.Family(
        title=TITLE,
        name="dfine",
        strides=strides(options),
        network=lambda: network(num_classes, options),
        decoder=lambda: decoder(num_classes, options),
        assign=detr_loss.assigner(
            num_classes,
            num_denoising=denoising,
            label_noise=label_noise,
            box_noise=box_noise,
            inverted="mirror",
        ),
        loss=functools.partial(detr_loss.d_fine_loss, up=UP, scale=options["scale"]),
        eval_layers=options["layers"],
        is_frozen=lambda path: hgnetv2.is_frozen(path, options["frozen_stem"]),
    )
    built = detr.detector(family, variant, num_classes, changed(make, given))
    return dataclasses.replace(built, torch=_names(options))


def _names(options: Mapping[str, Any]) -> TorchNames:
    """State dicts hold the settings of the bins, which the sizes share but for x."""
    settings = {"decoder.up": UP, "decoder.reg_scale": options["scale"]}

    def infer(state: State) -> dict[str, Any]:
        held = np.ravel(state.get("decoder.reg_scale", ()))
        return {"scale": float(held[0])} if held.size and held[0] != options["scale"] else {}

    constants = {name: np.array([value], np.float32) for name, value in settings.items()}
    return TorchNames(rename=detr_names.renamed, infer=infer, constants=constants)


def _check(num_classes: int, options: Mapping[str, Any]) -> None:
    if num_classes < 1:
        raise UserError(f"num_classes of {TITLE} must be >= 1, not {num_classes}")
    least = dict.fromkeys(("encoder_channels", "encoder_hidden", "repeats", "channels", "heads", "hidden"), 1)
    for name, smallest in (least | {"layers": 1, "queries": 1, "denoising": 0}).items():
        if options[name] < smallest:
            raise UserError(f"{name} of {TITLE} must be >= {smallest}, not {options[name]}")
    for name, count, smallest in (
        ("stem", (2,), 1),
        ("middle", (4,), 1),
        ("widths", (4,), 2),
        ("blocks", (4,), 1),
        ("block_layers", (4,), 1),
        ("points", (2, 3), 1),
    ):
        values = options[name]
        if len(values) not in count or not all(isinstance(n, int) and n >= smallest for n in values):
            numbers = " or ".join(map(str, count))
            raise UserError(f"{name} of {TITLE} must be {numbers} whole numbers >= {smallest}, not {values}")
    heads = options["heads"]
    least_expansion = 2 / options["encoder_channels"]
    rules = (
        ("stem", options["stem"][0] >= 2, "at least [2, 1]"),
        ("encoder_channels", not options["encoder_channels"] % math.lcm(4, heads), "a multiple of 4 and of heads"),
        ("channels", not options["channels"] % heads, f"a multiple of heads, which is {heads}"),
        ("expansion", options["expansion"] >= least_expansion, f"at least {least_expansion:g}"),
        ("bins", options["bins"] >= 4 and options["bins"] % 2 == 0, "an even number >= 4"),
        ("scale", options["scale"] > 0, "> 0"),
        ("label_noise", 0 <= options["label_noise"] <= 1, "within 0 .. 1"),
        ("box_noise", 0 <= options["box_noise"] <= 1, "within 0 .. 1"),
    )
    for name, holds, right in rules:
        if not holds:
            raise UserError(f"{name} of {TITLE} must be {right}, not {options[name]}")
