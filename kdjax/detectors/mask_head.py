"""The mask head of two-stage detectors: a small convolutional network on each region, what it learns, and its loss.

Reference: He et al., Mask R-CNN, ICCV 2017, section 3. Module names follow mmdetection 3.3.0.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.boxes import roi
from kdjax.detectors import box_head, levels
from kdjax.detectors.api import Decode
from kdjax.detectors.layers import Conv, constant, normal_fan_out
from kdjax.errors import UserError
from kdjax.losses.mask import mask_cross_entropy
from kdjax.nn.flops import record
from kdjax.structs import Array, Assignment, DetectorOutput, PaddedDetections, Targets

SIZE, OUTPUT = 14, 28  # cells of a region along each side, of the features and of the mask
PIECE = 32  # regions of an image whose masks are learned together
Find = Callable[[Array, Array], Array]  # `DetectorOutput.masks_at`


class _Conv(nnx.Module):
    """A 3x3 convolution, which is part of the loop in `mask_losses`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.conv = Conv(inputs, outputs, 3, in_loop=True, draw=normal_fan_out, bias=constant(0.0))


class _Upsample(nnx.Module):
    """A deconvolution of 2x2 cells with stride 2: no cell of the result has two sources."""

    def __init__(self, channels: int) -> None:
        # As of the convolution that it is the transpose of: the last axis is that of its own inputs.
        self.kernel = nnx.Param(jnp.zeros((2, 2, channels, channels)), draw=normal_fan_out)
        self.bias = nnx.Param(jnp.zeros(channels), draw=constant(0.0))

    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        y = jnp.einsum("bhwc,ijdc->bhiwjd", x, self.kernel[...].astype(x.dtype))
        record("conv", y.size * channels)
        return y.reshape(batch, 2 * height, 2 * width, channels) + self.bias[...].astype(x.dtype)


class MaskHead(nnx.Module):
    """Features f32[B, R, 14, 14, C] and classes i32[B, R] -> logits f32[B, R, 28, 28] of the class's mask.

    A label beyond the classes (the background) is taken for the last class.
    """

    def __init__(self, num_classes: int, inputs: int, channels: int, convs: int) -> None:
        self.convs = nnx.List([_Conv(channels if i else inputs, channels) for i in range(convs)])
        self.upsample = _Upsample(channels)
        self.conv_logits = Conv(channels, num_classes, 1, draw=normal_fan_out, bias=constant(0.0))

    def __call__(self, features: Array, labels: Array) -> Array:
        x = features.reshape(-1, *features.shape[2:])
        for layer in self.convs:
            x = jax.nn.relu(layer.conv(x))
        x = jax.nn.relu(self.upsample(x)).reshape(*labels.shape, OUTPUT, OUTPUT, -1)
        # Of the last layer only the output of the class.
        labels = jnp.clip(labels, 0, self.conv_logits.kernel.shape[-1] - 1)
        kernel = jnp.moveaxis(self.conv_logits.kernel[0, 0], 0, 1)[labels].astype(x.dtype)
        assert self.conv_logits.bias is not None
        logits = jnp.einsum("brijc,brc->brij", x, kernel).astype(jnp.float32)
        record("conv", x.size)
        return logits + self.conv_logits.bias[...][labels][..., None, None]


def check_masks(title: str, output: DetectorOutput, targets: Targets) -> int:
    """The stride of the truth's masks, in pixels.

    Raises:
      UserError: there are none, or their size does not divide that of the input.
    """
    masks = targets.instance_masks
    if masks is None:
        raise UserError(f"instance_masks: {title} learns masks, but the targets have none: the batch needs `masks`")
    height, width = levels.input_size(output)
    stride = max(height // masks.shape[2], 1)
    if (masks.shape[2] * stride, masks.shape[3] * stride) != (height, width):
        raise UserError(
            f"instance_masks: {title} needs masks of a whole stride of its {height}x{width} input, not "
            f"{masks.shape[2]}x{masks.shape[3]}"
        )
    return stride


def targets_of(masks: Array, boxes: Array, objects: Array, *, stride: int) -> Array:
    """What the masks of regions should be, f32[B, R, 28, 28] of zeros and ones.

    Args:
      masks: f32[B, M, h, w] or bool, of the objects.
      boxes: f32[B, R, 4], the regions.
      objects: i32[B, R], the object of each region, 0 .. M - 1.
      stride: of the masks, in pixels.

    Peers: mmdetection 3.3.0 `mask_target` (masks of stride 1).
    """
    return (roi.crop_masks(masks, boxes, objects, stride=stride, size=OUTPUT) >= 0.5).astype(jnp.float32)


def mask_losses(find: Find, targets: Targets, assignment: Assignment, *, stride: int) -> Array:
    """The mask loss of each region that can be positive, f32[B, R], divided by their number in the global batch.

    loss_mask = the mean over 28 x 28 cells of the binary cross-entropy of the class's mask, for the regions that
    `assignment.masked` names, divided by max(their number, 1).

    Masks are computed for 32 regions of each image at a time, as often as there are any, and again in the backward
    pass: the memory does not grow with their number.

    Args:
      find: a detector's `masks_at`.
      targets: ground truth with masks.
      assignment: of the regions.
      stride: of the masks, in pixels.

    Peers: mmdetection 3.3.0 FCNMaskHead.loss_and_target on one device.
    """
    masks = targets.instance_masks
    assert masks is not None
    assert assignment.masked is not None
    assert assignment.regions is not None
    batch, samples = assignment.masked.shape
    rows = box_head.most_positive(samples)  # those are the first ones
    pieces = -(-rows // PIECE)

    @jax.checkpoint
    def of_piece(boxes: Array, objects: Array, labels: Array, masked: Array) -> Array:
        wanted = targets_of(masks, boxes, objects, stride=stride)
        losses = mask_cross_entropy(find(boxes, labels)[..., None], wanted, jnp.zeros_like(labels))
        return jnp.where(masked, losses, 0.0)

    def add(_: None, piece: tuple[Array, ...]) -> tuple[None, Array]:
        used = jnp.any(piece[-1])
        return None, jax.lax.cond(used, of_piece, lambda *_: jnp.zeros((batch, PIECE), jnp.float32), *piece)

    def split(x: Array) -> Array:
        x = x[:, :rows]
        x = jnp.pad(x, [(0, 0), (0, pieces * PIECE - rows)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, pieces, PIECE, *x.shape[2:]), 1, 0)

    of_rows = (assignment.regions, jnp.maximum(assignment.matched, 0), assignment.labels, assignment.masked)
    _, losses = jax.lax.scan(add, None, tuple(map(split, of_rows)))
    count = jnp.maximum(jnp.sum(assignment.masked), 1).astype(jnp.float32)
    return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :rows] / count


def decoder(of_boxes: Decode) -> Decode:
    """The function `decode` that adds masks to what `of_boxes` finds; of a cascade, the means over its stages."""

    @functools.wraps(of_boxes)
    def decode(output: DetectorOutput, image_size: Array, **settings) -> PaddedDetections:  # noqa: ANN003
        found = of_boxes(output, image_size, **settings)
        finders = [one.masks_at for one in output.stages] or [output.masks_at]
        masks = [jax.nn.sigmoid(find(found.boxes, found.labels)) for find in finders if find is not None]
        mean = functools.reduce(jnp.add, masks) / len(masks)
        return found._replace(masks=jnp.where(found.valid[..., None, None], mean, 0.0))

    return decode
