"""ResNet-vd 18, 34, 50 and 101, the backbone of RT-DETR.

Reference: He et al., Bag of Tricks for Image Classification with Convolutional Neural Networks, CVPR 2019, section 4
("ResNet-C" and "ResNet-D").
"""

import functools

import jax
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import BatchNorm, ConvNorm, max_pool

Array = jax.Array

STRIDES = (8, 16, 32)  # of the maps that are returned


class Block(nnx.Module):
    """Convolutions beside a shortcut: 3x3 and 3x3, or with `bottleneck` 1x1, 3x3 and 1x1; the first 3x3 has the stride.

    The shortcut of a stage's first block (`first`) is a 1x1 convolution, after average pooling where the stride is 2.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, first: bool, bottleneck: bool, learned: bool) -> None:
        norm = functools.partial(BatchNorm, learned=learned)
        conv = functools.partial(ConvNorm, norm=norm, activation=jax.nn.relu)
        self.stride = stride
        if bottleneck:
            middle = outputs // 4
            layer = [conv(inputs, middle, 1), conv(middle, middle, 3, stride=stride)]
            layer += [conv(middle, outputs, 1, activation=None)]
        else:
            layer = [conv(inputs, outputs, 3, stride=stride), conv(outputs, outputs, 3, activation=None)]
        self.layer = nnx.List(layer)
        self.shortcut = ConvNorm(inputs, outputs, 1, norm=norm, activation=None) if first else None

    def __call__(self, x: Array, train: bool) -> Array:
        y = x
        for conv in self.layer:
            y = conv(y, train)
        if self.shortcut is not None:
            x = self.shortcut(nn.avg_pool(x, 2) if self.stride == 2 else x, train)
        return jax.nn.relu(y + x)


class ResNetVD(nnx.Module):
    """f32[B, H, W, 3] -> the maps of the last three stages, at strides 8, 16 and 32.

    `stem`: channels after the stem; `widths`, `blocks`: channels and blocks of the four stages. `frozen_stages`: -1
    freezes nothing, 0 the stem, n the stem and n stages: no gradient, running statistics. With `frozen_norm` all norms
    use their running statistics, and no gradient reaches their scales and biases.
    """

    def __init__(
        self,
        *,
        stem: int,
        widths: list[int],
        blocks: list[int],
        bottleneck: bool,
        frozen_stages: int,
        frozen_norm: bool,
    ) -> None:
        self.frozen_stages, self.frozen_norm = frozen_stages, frozen_norm
        norm = functools.partial(BatchNorm, learned=not frozen_norm)
        form = {"norm": norm, "activation": jax.nn.relu}
        self.embedder = nnx.List(
            [
                ConvNorm(3, stem // 2, 3, stride=2, **form),
                ConvNorm(stem // 2, stem // 2, 3, **form),
                ConvNorm(stem // 2, stem, 3, **form),
            ]
        )
        stages, inputs = [], stem
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for j in range(count):
                stride = 2 if i and not j else 1
                of_block = {"stride": stride, "first": not j, "bottleneck": bottleneck, "learned": not frozen_norm}
                layers.append(Block(inputs, width, **of_block))
                inputs = width
            stages.append(nnx.List(layers))
        self.stages = nnx.List(stages)

    def __call__(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        def fixed(stage: int, x: Array) -> Array:
            return jax.lax.stop_gradient(x) if stage <= self.frozen_stages else x

        train = train and not self.frozen_norm
        for conv in self.embedder:
            x = conv(x, train and self.frozen_stages < 0)
        x = fixed(0, max_pool(x, 3, stride=2, padding=1))
        maps = []
        for stage, blocks in enumerate(self.stages, 1):
            for block in blocks:
                x = block(x, train and stage > self.frozen_stages)
            x = fixed(stage, x)
            maps.append(x)
        return maps[1], maps[2], maps[3]


def is_frozen(path: str, frozen_stages: int) -> bool:
    """Whether the parameter at a detector's path, such as "backbone/embedder/0/conv/kernel", belongs to a frozen part.

    Example:
      >>> [is_frozen(f"backbone/{part}", 1) for part in ("embedder/0/bn/scale", "stages/0/0/x", "stages/1/0/x")]
      [True, True, False]
    """
    parts = ["backbone/embedder/", *(f"backbone/stages/{i}/" for i in range(4))]
    return any(path.startswith(part) for part in parts[: frozen_stages + 1])
