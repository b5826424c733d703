"""What RT-DETR and D-FINE share: backbone, hybrid encoder, decoder, detections without NMS."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import nms
from kdjax.detectors import detr_names, levels
from kdjax.detectors.api import Assign, Detector, Loss, TorchNames, Tree, check_images, flatten, pure, unflatten
from kdjax.detectors.query_decoder import Decoder, Known, Selection
from kdjax.structs import Array, Asked, Decoded, DetectorOutput, PaddedDetections


class DETR(nnx.Module):
    """The network. `projections`: of the encoder's maps into the decoder; without them the maps go in as they are."""

    def __init__(
        self,
        strides: tuple[int, ...],
        backbone: nnx.Module,
        encoder: nnx.Module,
        projections: list[Any],
        decoder: Decoder,
    ) -> None:
        self.strides = strides
        self.backbone, self.encoder, self.decoder = backbone, encoder, decoder
        self.decoder_input_proj = nnx.List(projections)

    def __call__(self, x: Array, train: bool, layers: int | None) -> tuple[DetectorOutput, Selection, Known]:
        """The output without `ask`, all scores of the selection, and what further queries need.

        The decoder runs its first `layers` layers; None: all.
        """
        backbone: tuple[Array, ...] = self.backbone(x, train)  # pyright: ignore[reportCallIssue]
        neck: tuple[Array, ...] = self.encoder(backbone, train).maps  # pyright: ignore[reportCallIssue]
        maps = neck
        if self.decoder_input_proj:
            maps = tuple(project(x, train) for project, x in zip(self.decoder_input_proj, neck, strict=True))
        decoded, selection, known = self.decoder(maps, layers)
        output = DetectorOutput(
            strides=self.strides,
            backbone_strides=self.strides,
            backbone=backbone,
            neck=neck,
            layers=decoded.layers,
            first=decoded.first,
            selected=selection.queries,
        )
        return output, selection, known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The facts and functions of a detection transformer; `title` is its name in messages."""

    title: str
    name: str  # of the family's file
    strides: tuple[int, ...]
    network: Callable[[], DETR]
    decoder: Callable[[], Decoder]  # makes the network's part alone
    assign: Assign
    loss: Loss
    eval_layers: int  # how many of the decoder's layers are computed outside training
    is_frozen: Callable[[str], bool]  # whether the parameter at a path is not trained


def detector(family: Family, variant: str, num_classes: int, options: dict[str, Any]) -> Detector:
    """The detector of a family's facts.

    Args:
      family: the facts.
      variant: a name.
      num_classes: K.
      options: `Detector.options`.
    """
    module, decoder = pure(family.network), pure(family.decoder)

    def ask(params: Tree, known: Known, asked: Asked) -> Decoded:
        return decoder.call(params, {}, Decoder.ask, known, asked)[0]

    def apply(params: Tree, stats: Tree, x: Array, *, train: bool) -> tuple[DetectorOutput, Tree]:
        check_images(family.title, x)
        layers = None if train else family.eval_layers
        (output, _, known), stats = module.call(params, stats, DETR.__call__, x, train, layers)
        return dataclasses.replace(output, ask=jax.tree_util.Partial(ask, params["decoder"], known)), stats

    def no_decay(params: Tree) -> Tree:
        flat = flatten(params)
        return unflatten({path: not path.endswith("/kernel") or family.is_frozen(path) for path in flat})

    return Detector(
        name=f"{family.name}_{variant}",
        num_classes=num_classes,
        options=options,
        strides=family.strides,
        size_divisor=32,
        pad_value=114,
        fit="stretch",
        shapes=module.shapes,
        classifiers=("decoder/enc_score_head", "decoder/heads/class_embed", "decoder/denoising_class_embed"),
        background=("decoder/denoising_class_embed",),
        torch=TorchNames(rename=detr_names.renamed),
        init=module.init,
        preprocess=preprocess,
        apply=apply,
        head=None,
        assign=family.assign,
        loss=family.loss,
        decode=decode,
        decode_boxes=levels.query_boxes,
        class_logits=levels.query_logits,
        priors=lambda hw: np.zeros((0, 4), np.float32),
        no_decay=no_decay,
    )


def preprocess(images: Array) -> Array:
    """u8[B, H, W, 3] RGB -> f32[B, H, W, 3] in 0 .. 1: neither mean nor deviation."""
    return images.astype(jnp.float32) / 255


def decode(
    output: DetectorOutput,
    image_size: Array,
    *,
    score_threshold: float = 0.0,
    iou_threshold: float = 1.0,
    pre_nms: int = 300,
    max_detections: int = 300,
) -> PaddedDetections:
    """The best pairs of a query and a class; there is no NMS, and boxes are not clipped.

    Args:
      output: of `apply`.
      image_size: not read: queries are shares of the whole canvas.
      score_threshold: pairs with a score at or below it are left out, 0 .. 1.
      iou_threshold, pre_nms: not read: queries of one object do not repeat it.
      max_detections: D, the number of rows of the result.

    Returns:
      D detections per image, padded. A query may be several of them, with different classes.

    Scope: one image.

    Peers: transformers 5.24 `post_process_object_detection`, D = Q; the authors' `RTDETRPostProcessor`.
    """
    del image_size, iou_threshold, pre_nms
    scores = jax.nn.sigmoid(levels.query_logits(output))
    return nms.best_pairs(
        levels.query_boxes(output), scores, score_threshold=score_threshold, max_detections=max_detections
    )
