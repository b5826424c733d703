"""Times the CPU forms of convolution: each layer as the built-in operation and as kdjax/nn/conv.py computes it.

    python benchmarks/convolutions.py
    XLA_FLAGS=--xla_cpu_experimental_onednn_custom_call=true python benchmarks/convolutions.py --dtype=bfloat16

The layers are those of RTMDet-tiny at 320 px, batch 8; for each the medians in milliseconds of the forward pass and of
the gradients with respect to the maps and to the kernel, the two forms in turn.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from method_cost import timed

from kdjax import nn
from kdjax.nn import conv_builtin
from kdjax.report import study
from kdjax.structs import Array
from kdjax.training import provenance, setup

# Side of the map, channels, outputs, side of the kernel, stride, groups.
LAYERS = [
    (160, 12, 24, 3, 1, 1),
    (160, 24, 48, 3, 2, 1),
    (80, 24, 24, 3, 1, 1),
    (80, 48, 96, 3, 2, 1),
    (40, 96, 96, 3, 1, 1),
    (20, 192, 384, 3, 2, 1),
    (80, 48, 24, 1, 1, 1),
    (40, 96, 96, 1, 1, 1),
    (80, 24, 24, 5, 1, 24),
    (40, 48, 48, 5, 1, 48),
]
PARTS = ("forward", "maps", "kernel")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only the first N layers")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)
    setup.prepare_process("off")
    rows = []
    for side, channels, outputs, size, stride, groups in LAYERS[: args.layers]:
        x = jnp.ones((args.batch, side, side, channels), args.dtype)
        kernel = jnp.ones((size, size, channels // groups, outputs), args.dtype)
        forms = {
            "built in": functools.partial(conv_builtin.conv, stride=stride, pads=(size // 2, size // 2), groups=groups),
            "conv.py": functools.partial(nn.conv2d, stride=stride, groups=groups),
        }
        gradient = jnp.ones(jax.eval_shape(forms["conv.py"], x, kernel).shape, args.dtype)
        programs = {
            (form, part): jax.jit(functools.partial(run, function, part))
            for form, function in forms.items()
            for part in PARTS
        }
        taken = {key: [] for key in programs}
        for i in range(args.rounds + 1):
            for key, program in programs.items():
                seconds, _ = timed(program, x, kernel, gradient)
                if i:  # the first compiles
                    taken[key].append(1000 * seconds)
        pairs = [" / ".join(f"{statistics.median(taken[form, part]):.1f}" for form in forms) for part in PARTS]
        kind = f"{size}x{size}" + (f" by {stride}" if stride > 1 else "") + (" depthwise" if groups > 1 else "")
        rows.append([f"{side}x{side}, {channels} to {outputs}", kind, *pairs])
    study.publish(
        f"python benchmarks/convolutions.py --dtype={args.dtype} --batch={args.batch}",
        [
            study.table(["maps", "kernel", "forward", "gradient of the maps", "of the kernel"], rows),
            study.facts(provenance.environment()),
        ],
        {"rows": rows},
        args.log,
    )


def run(
    function: Callable[[Array, Array], Array], part: str, x: Array, kernel: Array, gradient: Array
) -> Array | tuple[Array, ...]:
    """Runs a convolution, or one of its two gradients."""
    if part == "forward":
        return function(x, kernel)
    if part == "maps":
        return jax.vjp(lambda x: function(x, kernel), x)[1](gradient)
    return jax.vjp(lambda kernel: function(x, kernel), kernel)[1](gradient)


if __name__ == "__main__":
    main()
