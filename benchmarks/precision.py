"""How far are TF32 and bfloat16 from float32? Maps, loss and gradient of detectors on the platform of JAX.

    python benchmarks/precision.py                                       # RTMDet-tiny, RetinaNet r18 and YOLOX-nano
    python benchmarks/precision.py --detectors=rtmdet_s --batch=8 --size=640

The reference is float32 with `jax_default_matmul_precision` at `highest`. TF32 is what a GPU takes for float32 unless
told otherwise; on a CPU it is float32, so its errors are 0. bfloat16 is what `config.dtype=bfloat16` makes of it: the
maps, while losses stay float32. Weights, images and boxes are random, and the assignment of rows to objects is the
reference's for all. An error is the norm of the difference divided by the norm of the reference. `--log FILE` appends
the table, with the versions, to a Markdown file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from method_cost import made_up_batch

from kdjax import detectors
from kdjax.detectors.api import Detector
from kdjax.report import study
from kdjax.structs import targets_of
from kdjax.training import models, provenance

REFERENCE = ("float32", "highest")
OTHERS = {"TF32": ("float32", "default"), "bfloat16": ("bfloat16", "default")}


def words(text: str) -> list[str]:
    """Splits at commas: "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", type=words, default=["rtmdet_tiny", "retinanet_r18", "yolox_nano"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)
    for name in args.detectors:
        if name not in detectors.names():
            parser.error(f"there is no detector {name!r}; the detectors are: {', '.join(detectors.names())}")
    batch = made_up_batch(args.batch, args.size, args.classes)
    rows = []
    for name in args.detectors:
        plain = detectors.build(name, args.classes)
        variables = plain.init(jax.random.PRNGKey(0))
        exact, assignment = computed(plain, variables, batch, REFERENCE[1])
        for precision, (dtype, products) in OTHERS.items():
            found, _ = computed(models.in_precision(plain, dtype), variables, batch, products, assignment)
            rows.append([name, precision, *(f"{error(found[key], exact[key]):.1e}" for key in exact)])
            print(*rows[-1], flush=True)
    study.publish(
        " ".join(["python benchmarks/precision.py", *(sys.argv[1:] if arguments is None else arguments)]),
        [
            study.table(["detector", "precision", "maps", "loss", "gradient"], rows),
            f"{jax.devices()[0].device_kind}, batch {args.batch}, {args.size} px",
            study.facts(provenance.environment()),
        ],
        {"rows": rows},
        args.log,
    )


def computed(
    detector: Detector,
    variables: tuple[Any, Any],
    batch: dict[str, Any],
    products: str,
    assignment: Any = None,  # noqa: ANN401 - a tree of arrays
) -> tuple[dict[str, Any], Any]:
    """Maps, loss and gradient with products in a precision, and the assignment: the given one, or the detector's."""
    targets, key = targets_of(batch), jax.random.PRNGKey(1)

    def loss(params: Any, stats: Any, image: Any, assignment: Any) -> Any:  # noqa: ANN401 - trees of arrays
        output, _ = detector.apply(params, stats, detector.preprocess(image), train=True)
        if assignment is None:
            assignment = detector.assign(output, targets, key)
        total = sum(jnp.float32(value) for value in detector.loss(output, targets, assignment).values())
        return total, ((output.cls_logits, output.box_reg), assignment)

    with jax.default_matmul_precision(products):
        program = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, (maps, assignment)), gradient = program(*variables, batch["image"], assignment)
    return {"maps": maps, "loss": total, "gradient": gradient}, assignment


def error(found: Any, exact: Any) -> float:  # noqa: ANN401 - trees of arrays
    """The norm of the difference of two trees, relative to that of the second."""
    sides = [jax.tree.leaves(tree) for tree in (found, exact)]
    found, exact = (np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]) for leaves in sides)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    main()
