"""Counting of floating-point operations by the rule of mmengine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_counter: ContextVar[dict[str, int] | None] = ContextVar("counter", default=None)


def record(kind: str, flops: int) -> None:
    """Adds to the count that is running, if any; `kind` is conv, linear, norm, pool or upsample."""
    counts = _counter.get()
    if counts is not None:
        counts[kind] += flops


@contextmanager
def _counting() -> Iterator[dict[str, int]]:
    counts: dict[str, int] = dict.fromkeys(("conv", "linear", "norm", "pool", "upsample"), 0)
    token = _counter.set(counts)
    try:
        yield counts
    finally:
        _counter.reset(token)


def count(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Counts the floating-point operations of a function that uses `kdjax.nn`, without computing anything.

    The rule is mmengine's: one per multiply-add of a convolution or of a linear layer, two per output element of a
    batch norm and five of a group norm, one per input element of a global average pool, one per output element of an
    upsampling (four of a bilinear one), and none for everything else.

    Args:
      function: the function to count. It is traced again, but jitted parts that were traced before are not counted.
      *args: trees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      `flops`, the total, and its parts `conv`, `linear`, `norm`, `pool` and `upsample`.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax.nn import conv2d
      >>> count(lambda x: conv2d(x, jnp.ones((1, 1, 2, 3))), jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32))["flops"]
      96
    """
    with _counting() as counts:
        jax.eval_shape(lambda *a: function(*a), *args)
    return {"flops": sum(counts.values()), **counts}
