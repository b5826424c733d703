"""The images of a batch, made on the device from decoded images and from what the host has drawn.

The host draws, and moves boxes and masks (`kdjax/data/recipes.py`); pixels are resized, pasted, cropped, flipped,
coloured, mixed and padded here, as `kdjax/data/transforms.py` does with OpenCV on the host. That path is the reference.
Without changes of colour both are equal to the bit. With them a value is another by at most 1 of 255, or with MixUp,
whose mean is rounded to even, by 2: OpenCV cuts the way back from hue, saturation and value off to integers in whole
vectors of 32 pixels of a row (with AVX2), as is done here, but rounds it in the rest of the row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.data.recipes import PADDING, WEIGHTS
from kdjax.data.transforms import PAD
from kdjax.structs import Array

# OpenCV's reciprocals for saturation and hue, times 2^12.
_LEVELS = np.maximum(np.arange(256), 1)
_OF_VALUE = np.where(np.arange(256) > 0, np.rint((255 << 12) / _LEVELS), 0).astype(np.int32)
_OF_RANGE = np.where(np.arange(256) > 0, np.rint((180 << 12) / (6 * _LEVELS)), 0).astype(np.int32)
_SHARES = np.arange(256, dtype=np.float32) * np.float32(1 / 255)  # a table: XLA would simplify the product with 255
_CHANNELS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])  # of each sixth of the hues


def images(recipe: Mapping[str, Array]) -> Array:
    """Makes the images of a batch.

    Args:
      recipe: of every row what `kdjax.data.recipes.encoded` returns, and sources u8[B, k, n, h, w, 3]: the decoded
        images that it is made of, each at the top left.

    Returns:
      u8[B, H, W, 3].
    """
    parts = {name: value for name, value in recipe.items() if name != "mixed"}
    made = jax.vmap(jax.vmap(_image))(parts)
    if "mixed" not in recipe:
        return made[:, 0]
    both = made[:, 0].astype(jnp.int32) + made[:, 1]
    half = both >> 1
    mean = half + (both & half & 1)  # a half is rounded to even
    return jnp.where(recipe["mixed"][:, None, None, None], mean.astype(jnp.uint8), made[:, 0])


def _image(part: Mapping[str, Array]) -> Array:
    """The canvas u8[H, W, 3] of one recipe, before MixUp."""
    chosen = part["sources"][part["image"]]
    if "tile_rows" in part:
        quarters = jax.vmap(_between)(chosen, part["tile_rows"], part["tile_cols"])
        _, height, width, _ = quarters.shape
        plane = quarters.reshape(2, 2, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(2 * height, 2 * width, 3)
    else:
        plane = chosen[0]
    image = _between(plane, part["rows"], part["cols"])
    image = jnp.where((part["shifts"] != 0).any(), _coloured(image, part["shifts"]), image)
    outside = (part["rows"][:, None, 0] == PADDING) | (part["cols"][None, :, 0] == PADDING)
    return jnp.where(outside[..., None], jnp.uint8(PAD), image)


def _between(image: Array, rows: Array, cols: Array) -> Array:
    """Pixels between two rows and two columns each, in OpenCV's integers: u8[h, w, 3] -> u8[H, W, 3]."""

    def line(which: int) -> Array:
        """The rows of one side, between the columns: i32[H, W, 3] in 2048ths."""
        lines = jnp.where((rows[:, which] < 0)[:, None, None], PAD, image[jnp.maximum(rows[:, which], 0)])
        left, right = (
            jnp.where((cols[:, side] < 0)[:, None], PAD, lines[:, jnp.maximum(cols[:, side], 0)]).astype(jnp.int32)
            for side in (0, 1)
        )
        weight = cols[:, 2, None]
        return (left * (WEIGHTS - weight) + right * weight) >> 4

    weight = rows[:, 2, None, None]
    return ((((line(0) * (WEIGHTS - weight)) >> 16) + ((line(1) * weight) >> 16) + 2) >> 2).astype(jnp.uint8)


def _coloured(image: Array, shifts: Array) -> Array:
    """Shifts hue (of 180, cyclic), saturation and value (of 255, clipped), as `transforms.hsv_jitter`."""
    red, green, blue = (image[..., channel].astype(jnp.int32) for channel in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    extent = value - jnp.minimum(jnp.minimum(red, green), blue)
    saturation = (extent * jnp.asarray(_OF_VALUE)[value] + 2048) >> 12
    hue = jnp.where(
        value == red, green - blue, jnp.where(value == green, blue - red + 2 * extent, red - green + 4 * extent)
    )
    hue = (hue * jnp.asarray(_OF_RANGE)[extent] + 2048) >> 12
    hue = (hue + shifts[0]) % 180
    saturation, value = jnp.clip(saturation + shifts[1], 0, 255), jnp.clip(value + shifts[2], 0, 255)
    sixth = hue.astype(jnp.float32) * np.float32(1 / 30)
    sector = jnp.floor(sixth)
    share = sixth - sector
    s, v = jnp.asarray(_SHARES)[saturation], jnp.asarray(_SHARES)[value]
    levels = jnp.stack([v, v * (1 - s), v * (1 - s * share), v * (1 - s * (1 - share))], axis=-1)
    order = jnp.asarray(_CHANNELS)[sector.astype(jnp.int32) % 6]
    return (jnp.take_along_axis(levels, order, axis=-1) * 255).astype(jnp.uint8)
