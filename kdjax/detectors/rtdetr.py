"""RT-DETR: ResNet-vd, a hybrid encoder, and a decoder whose queries need no NMS.

Reference: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024. Peers: transformers 5.24 and the
authors' PyTorch code, which compute the same but for the gradient of boxes (`query_decoder.BoxHeads`).

Loads: state dicts and safetensors of transformers, and the authors' .pth.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from kdjax.detectors import detr, detr_loss, hybrid_encoder, resnet_vd
from kdjax.detectors.api import Detector
from kdjax.detectors.keywords import changed, own_values, resolve
from kdjax.detectors.layers import ConvNorm, uniform_fan_in, uniform_fans
from kdjax.detectors.query_decoder import BoxHeads, Decoder
from kdjax.errors import UserError

_BASIC = {"stem": 64, "widths": [64, 128, 256, 512], "bottleneck": False, "frozen_stages": -1, "frozen_norm": False}
_DEEP = {"stem": 64, "widths": [256, 512, 1024, 2048], "bottleneck": True, "frozen_stages": 0, "frozen_norm": True}
_DECODER = {"channels": 256, "heads": 8, "hidden": 1024, "queries": 300, "eval_layers": None}
_SMALL = _DECODER | {"encoder_channels": 256, "encoder_hidden": 1024, "expansion": 0.5}
_LARGE = _SMALL | {"expansion": 1.0, "layers": 6}
# The published sizes, and a small one for CPUs (pico).
VARIANTS: dict[str, dict[str, Any]] = {
    "pico": _BASIC
    | {"stem": 16, "widths": [16, 32, 64, 128], "blocks": [1, 1, 1, 1], "encoder_channels": 64, "encoder_hidden": 128}
    | {"expansion": 0.5, "channels": 64, "heads": 4, "hidden": 128, "layers": 3, "queries": 100, "eval_layers": None},
    "r18": _BASIC | _SMALL | {"blocks": [2, 2, 2, 2], "layers": 3},
    "r34": _BASIC | _SMALL | {"blocks": [3, 4, 6, 3], "layers": 4},
    "r50_m": _DEEP | _SMALL | {"blocks": [3, 4, 6, 3], "layers": 6, "eval_layers": 3},
    "r50": _DEEP | _LARGE | {"blocks": [3, 4, 6, 3]},
    "r101": _DEEP | _LARGE | {"blocks": [3, 4, 23, 3], "encoder_channels": 384, "encoder_hidden": 2048},
}


def decoder(num_classes: int, options: Mapping[str, Any], *, xavier: bool = False) -> Decoder:
    """The decoder of options; with `xavier` its perceptrons begin as RT-DETRv2's."""
    return Decoder(
        num_classes,
        options["channels"],
        layers=options["layers"],
        queries=options["queries"],
        heads=options["heads"],
        hidden=options["hidden"],
        points=(options["points"],) * len(resnet_vd.STRIDES),
        predict=lambda: BoxHeads(num_classes, options["channels"], options["layers"]),
        discrete=options.get("discrete", False),
        draw=uniform_fans if xavier else uniform_fan_in,
    )


def network(num_classes: int, options: Mapping[str, Any], *, xavier: bool = False) -> detr.DETR:
    """The network of options; with `xavier` the decoder and the projections before it begin as RT-DETRv2's."""
    backbone = resnet_vd.ResNetVD(
        **{name: options[name] for name in ("stem", "widths", "blocks", "bottleneck", "frozen_stages", "frozen_norm")}
    )
    width, draw = options["encoder_channels"], uniform_fans if xavier else uniform_fan_in
    encoder = hybrid_encoder.HybridEncoder(
        options["widths"][1:],
        width,
        heads=options["heads"],
        hidden=options["encoder_hidden"],
        fusion=hybrid_encoder.csp_fusion(options["expansion"]),
    )
    into = [ConvNorm(width, options["channels"], 1, activation=None, draw=draw) for _ in resnet_vd.STRIDES]
    return detr.DETR(resnet_vd.STRIDES, backbone, encoder, into, decoder(num_classes, options, xavier=xavier))


def make(
    variant: str,
    num_classes: int,
    *,
    stem: int | None = None,
    widths: list[int] | None = None,
    blocks: list[int] | None = None,
    bottleneck: bool | None = None,
    frozen_stages: int | None = None,
    frozen_norm: bool | None = None,
    encoder_channels: int | None = None,
    encoder_hidden: int | None = None,
    expansion: float | None = None,
    channels: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    layers: int | None = None,
    eval_layers: int | None = None,
    queries: int | None = None,
    points: int = 4,
    denoising: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
) -> Detector:
    """Builds RT-DETR in one of its sizes.

    Args:
      variant: pico, r18, r34, r50_m, r50 or r101.
      num_classes: K >= 1.
      stem: channels of the stem, an even number >= 2; None, here and below: the variant's.
      widths, blocks: channels and numbers of blocks of the backbone's four stages, each >= 1; with bottlenecks, widths
        are multiples of 4.
      bottleneck: whether blocks are bottlenecks.
      frozen_stages: -1 trains the whole backbone, 0 freezes the stem, n the stem and n stages, up to 4.
      frozen_norm: whether the backbone's batch norms keep their statistics, scales and biases.
      encoder_channels, encoder_hidden: channels of the encoder's maps, a multiple of 4 and of `heads`, and of its
        perceptron, >= 1.
      expansion: channels inside the encoder's fusion blocks, as a share of `encoder_channels`, > 0.
      channels, heads, hidden: of the decoder: channels of the states, a multiple of `heads`; attention heads, in the
        encoder too; channels of the perceptrons.
      layers: of the decoder, >= 1.
      eval_layers: how many of them are computed outside training, 1 .. layers; None: all, but 3 in r50_m.
      queries: Q >= 1.
      points: that a head samples on each level, >= 1.
      denoising: pairs of denoising queries in training, >= 0.
      label_noise, box_noise: their noise, 0 .. 1 (`denoising.contrastive`).

    Returns:
      The detector. Its rows are the queries of the decoder's last layer.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: the authors' configs/rtdetr/rtdetr_*_6x_coco.yml.

    Reference: Zhao et al., CVPR 2024, sections 4 and 5; the sizes are those of table 3 and of the authors' repository.

    Example:
      >>> make("pico", 5, layers=2).options
      {'layers': 2}
    """
    given = dict(
        stem=stem, widths=widths, blocks=blocks, bottleneck=bottleneck, frozen_stages=frozen_stages,
        frozen_norm=frozen_norm, encoder_channels=encoder_channels, encoder_hidden=encoder_hidden,
        expansion=expansion, channels=channels, heads=heads, hidden=hidden, layers=layers, eval_layers=eval_layers,
        queries=queries, points=points, denoising=denoising, label_noise=label_noise, box_noise=box_noise,
    )  # fmt: skip
    return detector("RT-DETR", "rtdetr", make, variant, num_classes, given)


def detector(
    title: str,
    name: str,
    make: Callable[..., Detector],
    variant: str,
    num_classes: int,
    given: dict[str, Any],
    *,
    xavier: bool = False,
) -> Detector:
    """Builds RT-DETR or RT-DETRv2; see `detr.detector`, and `network` for `xavier`."""
    options = resolve(given, own_values(title, VARIANTS, variant))
    options["eval_layers"] = options["eval_layers"] or options["layers"]
    _check(title, num_classes, options)
    family = detr.Family(
        title=title,
        name=name,
        strides=resnet_vd.STRIDES,
        network=lambda: network(num_classes, options, xavier=xavier),
        decoder=lambda: decoder(num_classes, options, xavier=xavier),
        assign=detr_loss.assigner(
            num_classes,
            num_denoising=options["denoising"],
            label_noise=options["label_noise"],
            box_noise=options["box_noise"],
        ),
        loss=detr_loss.rt_detr_loss,
        eval_layers=options["eval_layers"],
        is_frozen=lambda path: resnet_vd.is_frozen(path, options["frozen_stages"]),
    )
    return detr.detector(family, variant, num_classes, changed(make, given))


def _check(title: str, num_classes: int, options: Mapping[str, Any]) -> None:
    if num_classes < 1:
        raise UserError(f"num_classes of {title} must be >= 1, not {num_classes}")
    least = dict.fromkeys(
        ("stem", "encoder_channels", "encoder_hidden", "channels", "heads", "hidden", "layers", "queries", "points"), 1
    )
    for name, smallest in (least | {"denoising": 0}).items():
        if options[name] < smallest:
            raise UserError(f"{name} of {title} must be >= {smallest}, not {options[name]}")
    for name in ("widths", "blocks"):
        if len(options[name]) != 4 or not all(isinstance(n, int) and n >= 1 for n in options[name]):
            raise UserError(f"{name} of {title} must be four whole numbers >= 1, not {options[name]}")
    heads, least_expansion = options["heads"], 1 / options["encoder_channels"]
    rules = (
        ("stem", options["stem"] % 2 == 0, "an even number"),
        ("widths", not options["bottleneck"] or not any(n % 4 for n in options["widths"]), "multiples of 4"),
        ("frozen_stages", options["frozen_stages"] in (-1, 0, 1, 2, 3, 4), "-1, 0, 1, 2, 3 or 4"),
        ("encoder_channels", not options["encoder_channels"] % math.lcm(4, heads), "a multiple of 4 and of heads"),
        ("channels", not options["channels"] % heads, f"a multiple of heads, which is {heads}"),
        ("expansion", options["expansion"] >= least_expansion, f"at least {least_expansion:g}"),
        ("eval_layers", 1 <= options["eval_layers"] <= options["layers"], f"within 1 .. {options['layers']}"),
        ("label_noise", 0 <= options["label_noise"] <= 1, "within 0 .. 1"),
        ("box_noise", 0 <= options["box_noise"] <= 1, "within 0 .. 1"),
    )
    for name, holds, right in rules:
        if not holds:
            raise UserError(f"{name} of {title} must be {right}, not {options[name]}")
