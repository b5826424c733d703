"""`model/rtdetr*`, `model/dfine*`: a whole training step; the sum of the authors' losses, and its gradient."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.detectors import api, denoising, detr_loss
from kdjax.detectors.detr import DETR
from kdjax.structs import Array, Assignment, DetectorOutput, Targets
from kdjax.weights import fill, torch_names
from tests.golden_checks import detr, dfine
from tests.golden_checks.api import QUICK, Check, Checks, below, load, maps_of, nhwc, relative_error
from tests.golden_checks.detr import own_name
from tests.golden_checks.detr_loss import noised, stored_union, targets_of
from tests.golden_checks.model import levels

LOSS = 1e-3
# Of gradients, where the backbone's norms are frozen or not.
FROZEN, LEARNED = 1e-3, 2e-2

Terms = Callable[[DetectorOutput, Targets, Assignment], dict[str, Array]]


class _Shifted(nnx.Module):
    """A block of the encoder with something added to its map."""

    def __init__(self, block: nnx.Module, offset: Array) -> None:
        self.block, self.offset = block, lambda: offset

    def __call__(self, x: Array, train: bool) -> Array:
        return self.block(x, train) + self.offset()


def step(network: api.PureModule, params, stats, x, offsets, targets: Targets, assign, terms: Terms) -> Array:
    """The sum of the losses; `offsets` are added to the encoder's maps, to read the gradient there."""

    def total(module: DETR) -> Array:
        encoder = module.encoder
        blocks = [encoder.fpn_blocks[-1], *encoder.pan_blocks]  # whose maps are the result, fine to coarse
        finest, *others = (_Shifted(*pair) for pair in zip(blocks, offsets, strict=True))
        encoder.fpn_blocks = nnx.List([*encoder.fpn_blocks[:-1], finest])
        encoder.pan_blocks = nnx.List(others)
        output, _, known = module(x, True, None)
        output = dataclasses.replace(output, ask=lambda asked: module.decoder.ask(known, asked))
        return sum(jnp.sum(value) for value in terms(output, targets, assign(output)).values())

    return network.call(params, stats, total)[0]


def gradient_checks(
    arrays: Mapping[str, np.ndarray], detector: api.Detector, gradient, at_neck, tolerance: float
) -> Checks:
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), detector.shapes[1])
    got = fill.to_torch(detector, gradient, zeros)
    for name, value in below(arrays, "upstream/grad").items():
        yield Check(f"upstream/grad/{name}", relative_error(got[own_name(name)], value), tolerance)
    stored = dict(zip(map(str, arrays["upstream/grad_norm/names"]), arrays["upstream/grad_norm/values"], strict=True))
    norms = {own_name(name): value for name, value in stored.items()}
    ours = {
        names[0]: np.linalg.norm(np.asarray(got[names[0]], np.float64))
        for path, names in torch_names.table(detector).items()
        if path.startswith("params/")
    }
    yield Check("upstream/grad_norm: unknown names", float(len(set(norms) - set(ours))), 0)
    # Frozen norms are no parameters there.
    yield Check("upstream/grad_norm: others", max((ours[name] for name in set(ours) - set(norms)), default=0.0), 0)
    values = np.array([ours[name] for name in norms])
    yield Check("upstream/grad_norm", relative_error(values, np.array(list(norms.values()))), tolerance)
    yield levels("upstream/grad_neck", at_neck, maps_of(arrays, "upstream/grad_neck"), tolerance)


def terms_of(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Terms:
    """The authors' losses; those of D-FINE by the stored union of the matchings, which ties leave open."""
    if "upstream/assign/union/0/query" not in arrays:
        return detr_loss.rt_detr_terms
    union = stored_union(arrays, arrays["train/enc/topk_inds"].shape)
    return functools.partial(detr_loss.d_fine_terms, up=config["up"], scale=config["reg_scale"], union=union)


def replay(path: Path) -> Checks:
    arrays, meta = load(path)
    detector, network = (dfine if meta["build"]["kind"] == "dfine" else detr).build_of(meta)
    params, stats = fill.from_torch(detector, below(arrays, "param"), keep_classifiers=True)
    config, size = meta["config"], tuple(meta["size"])
    targets = targets_of(arrays, size)
    places = denoising.places(config["num_denoising"], targets.valid.shape[1])
    settings = {
        "number": config["num_denoising"],
        "num_classes": detector.num_classes,
        "label_noise": config["label_noise_ratio"],
        "box_noise": config["box_noise_scale"],
    }
    shares = targets.boxes / np.array([size[1], size[0]] * 2, np.float32)
    found = noised(arrays, "train/dn/", shares, targets, places, **settings)
    match, terms = detr_loss.assigner(detector.num_classes, num_denoising=0), terms_of(arrays, config)

    def total(params, offsets, stats, x, targets, found):
        def assign(output: DetectorOutput) -> Assignment:
            return match(output, targets)._replace(denoising=found)

        return step(network, params, stats, x, offsets, targets, assign, terms)

    offsets = tuple(np.zeros_like(m) for m in maps_of(arrays, "train/neck"))
    run = jax.jit(jax.value_and_grad(total, (0, 1)), compiler_options=QUICK)
    loss, (gradient, at_neck) = jax.device_get(run(params, offsets, stats, nhwc(arrays["input"]), targets, found))
    yield Check("upstream/loss/total, end to end", relative_error(loss, arrays["upstream/loss/total"]), LOSS)
    tolerance = FROZEN if meta["build"]["freeze"] else LEARNED
    yield from gradient_checks(arrays, detector, gradient, at_neck, tolerance)


CHECKS = [(f"model/{family}_*.npz", replay) for family in ("rtdetr", "rtdetrv2", "dfine")]
