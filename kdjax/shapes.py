"""One check of the shapes that a public function is called with.

`chex` is not used: its import takes as long as that of jax.
"""

from typing import Any

import numpy as np

from kdjax.errors import UserError


def check(function: str, **arguments: tuple[Any, str]) -> None:
    """Checks that arrays have the axes that a function needs, and that axes of one name have one size.

    Args:
      function: the caller's name, for the message.
      **arguments: for each argument the array and its axes, separated by spaces. A number is a fixed size, a name is a
        size that all arguments share, and a leading `...` stands for any number of axes.

    Raises:
      UserError: an array has another number of axes, or an axis has another size.

    Example:
      >>> boxes, valid = np.zeros((2, 5, 4)), np.zeros((2, 6))
      >>> check("f", boxes=(boxes, "B M 4"), valid=(valid, "B M"))
      Traceback (most recent call last):
      kdjax.errors.UserError: f: valid must have the shape [B, M] with B = 2, M = 5, not (2, 6)
    """
    sizes: dict[str, int] = {}
    for name, (array, layout) in arguments.items():
        shape, axes = np.shape(array), layout.split()
        named = axes[1:] if axes[0] == "..." else axes
        fits = len(shape) >= len(named) if axes[0] == "..." else len(shape) == len(named)
        known = dict(sizes)
        if fits:
            for axis, size in zip(named, shape[len(shape) - len(named) :], strict=True):
                fits &= size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
        if not fits:
            given = ", ".join(f"{axis} = {known[axis]}" for axis in named if axis in known)
            wanted = f"[{', '.join(axes)}]" + (f" with {given}" if given else "")
            raise UserError(f"{function}: {name} must have the shape {wanted}, not {tuple(shape)}")
