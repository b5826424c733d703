"""RT-DETRv2: the network of RT-DETR, trained with other schedules and augmentations.

Reference: Lv et al., RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer, arXiv
2407.17140. Peers: transformers 5.24 and the authors' PyTorch code.

Loads: state dicts and safetensors of transformers, and the authors' .pth.
"""

from kdjax.detectors import rtdetr
from kdjax.detectors.api import Detector

VARIANTS = rtdetr.VARIANTS


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
    discrete: bool = False,
    denoising: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
) -> Detector:
    """Builds RT-DETRv2 in one of its sizes.

    Args:
      variant: pico, r18, r34, r50_m, r50 or r101.
      num_classes: K >= 1.
      discrete: whether attention takes single cells of the maps instead of bilinear samples; offsets then get no
        gradient (`nn.deformable_attention`).
      stem, widths, blocks, bottleneck, frozen_stages, frozen_norm, encoder_channels, encoder_hidden, expansion,
      channels, heads, hidden, layers, eval_layers, queries, points, denoising, label_noise, box_noise: as in
        `rtdetr.make`.

    Returns:
      The detector. Its rows are the queries of the decoder's last layer.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: the authors' configs/rtdetrv2/rtdetrv2_r*.yml.

    Reference: arXiv 2407.17140, section 3.

    Example:
      >>> make("r18", 5, discrete=True).options
      {'discrete': True}
    """
    given = dict(
        stem=stem, widths=widths, blocks=blocks, bottleneck=bottleneck, frozen_stages=frozen_stages,
        frozen_norm=frozen_norm, encoder_channels=encoder_channels, encoder_hidden=encoder_hidden,
        expansion=expansion, channels=channels, heads=heads, hidden=hidden, layers=layers, eval_layers=eval_layers,
        queries=queries, points=points, discrete=discrete, denoising=denoising, label_noise=label_noise,
        box_noise=box_noise,
    )  # fmt: skip
    return rtdetr.detector("RT-DETRv2", "rtdetrv2", make, variant, num_classes, given, xavier=True)
