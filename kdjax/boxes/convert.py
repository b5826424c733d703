"""Conversion between formats of boxes.

Inside kdjax a box is `x1 y1 x2 y2` in pixels of the network input; the queries of transformers have centre and size.
"""

import jax.numpy as jnp

from kdjax import shapes
from kdjax.structs import AnyArray, Array


def to_xywh(boxes: AnyArray) -> Array:
    """Corner and size of boxes, the format of COCO: `(x1, y1, x2 - x1, y2 - y1)`.

    Args:
      boxes: f32[..., 4], `x1 y1 x2 y2`, any unit.

    Returns:
      f32[..., 4], `x y w h`, the same unit.

    Scope: each box on its own.

    Example:
      >>> import numpy as np
      >>> to_xywh(np.array([1.0, 2.0, 4.0, 6.0])).tolist()
      [1.0, 2.0, 3.0, 4.0]
    """
    return jnp.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def from_xywh(boxes: AnyArray) -> Array:
    """Corners of boxes from corner and size, the inverse of `to_xywh`: `(x, y, x + w, y + h)`.

    Args:
      boxes: f32[..., 4], `x y w h`, any unit.

    Returns:
      f32[..., 4], `x1 y1 x2 y2`, the same unit.

    Scope: each box on its own.

    Example:
      >>> import numpy as np
      >>> from_xywh(np.array([1.0, 2.0, 3.0, 4.0])).tolist()
      [1.0, 2.0, 4.0, 6.0]
    """
    return jnp.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def to_cxcywh(boxes: AnyArray) -> Array:
    """Centre and size of boxes: `((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)`.

    Args:
      boxes: f32[..., 4], `x1 y1 x2 y2`, any unit.

    Returns:
      f32[..., 4], `cx cy w h`, the same unit; the size of an inverted box is negative.

    Scope: each box on its own.

    Example:
      >>> import numpy as np
      >>> to_cxcywh(np.array([1.0, 2.0, 4.0, 6.0])).tolist()
      [2.5, 4.0, 3.0, 4.0]
    """
    return jnp.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def from_cxcywh(boxes: AnyArray) -> Array:
    """Corners of boxes from centre and size, the inverse of `to_cxcywh`.

    Args:
      boxes: f32[..., 4], `cx cy w h`, any unit.

    Returns:
      f32[..., 4], `x1 y1 x2 y2`, the same unit; inverted where the size is negative.

    Scope: each box on its own.

    Example:
      >>> import numpy as np
      >>> from_cxcywh(np.array([2.5, 4.0, 3.0, 4.0])).tolist()
      [1.0, 2.0, 4.0, 6.0]
    """
    half = boxes[..., 2:] / 2
    return jnp.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def clip(boxes: AnyArray, image_size: AnyArray) -> Array:
    """Boxes clipped to their image: x to `0 .. width`, y to `0 .. height`.

    Args:
      boxes: f32[..., N, 4], pixels.
      image_size: i32[..., 2], height and width of the image in pixels; its leading axes are those of `boxes`.

    Returns:
      f32[..., N, 4], pixels. A box outside the image has no area.

    Scope: each box on its own.

    Peers: the clipping of mmdetection's box coders (`max_shape`).

    Example:
      >>> import numpy as np
      >>> clip(np.array([[-3.0, 2.0, 9.0, 30.0]]), np.array([20, 8])).tolist()
      [[0.0, 2.0, 8.0, 20.0]]
    """
    shapes.check("clip", boxes=(boxes, "... N 4"), image_size=(image_size, "... 2"))
    boxes = jnp.asarray(boxes)
    height, width = (jnp.asarray(image_size)[..., i] for i in (0, 1))
    upper = jnp.stack([width, height, width, height], axis=-1)[..., None, :].astype(boxes.dtype)
    return jnp.clip(boxes, 0, upper)
