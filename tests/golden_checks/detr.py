"""Whole models: RT-DETR and RT-DETRv2, their outputs in evaluation and training, and detections."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.detectors import api, detr_names, query_decoder, rtdetr
from kdjax.detectors.detr import DETR
from kdjax.structs import Asked, DetectorOutput, Queries
from kdjax.weights import fill
from tests.golden_checks.api import (
    QUICK,
    Check,
    Checks,
    UnknownCase,
    below,
    load,
    maps_of,
    mismatches,
    nhwc,
    relative_error,
)
from tests.golden_checks.model import levels

EVAL, TRAIN = 1e-4, 2e-3
_OPTIONS = {
    "encoder_hidden_dim": "encoder_channels",
    "encoder_ffn_dim": "encoder_hidden",
    "hidden_expansion": "expansion",
    "d_model": "channels",
    "decoder_attention_heads": "heads",
    "decoder_ffn_dim": "hidden",
    "decoder_layers": "layers",
    "num_queries": "queries",
    "decoder_n_points": "points",
    "num_denoising": "denoising",
    "label_noise_ratio": "label_noise",
    "box_noise_scale": "box_noise",
}
_BACKBONE = {"embedding_size": "stem", "hidden_sizes": "widths", "depths": "blocks"}


def options_of(build: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """(family, number of classes, options) of a file's `meta.build`; every field must be known."""
    cfg, options = dict(build["cfg"]), {"frozen_stages": -1, "frozen_norm": build["freeze"]}
    backbone, classes = dict(cfg.pop("backbone")), cfg.pop("num_labels")
    layer_type = backbone.pop("layer_type")
    options["bottleneck"] = {"basic": False, "bottleneck": True}[layer_type]
    implied = {
        "out_indices": [2, 3, 4],
        "feat_strides": [8, 16, 32],
        "encoder_in_channels": backbone["hidden_sizes"][1:],
        "encoder_attention_heads": cfg["decoder_attention_heads"],
        "decoder_in_channels": [cfg["encoder_hidden_dim"]] * 3,
    }
    for field, value in (backbone | cfg).items():
        if field in _BACKBONE:
            options[_BACKBONE[field]] = value
        elif field in _OPTIONS:
            options[_OPTIONS[field]] = value
        elif field == "decoder_method" and build["kind"] == "rtdetrv2":
            options["discrete"] = {"default": False, "discrete": True}[value]
        elif field not in implied or implied[field] != value:
            raise UnknownCase(f"the model's {field} = {value!r}")
    return build["kind"], classes, options


class Parts(NamedTuple):
    """What the network computes on the way."""

    output: DetectorOutput
    scores: jax.Array  # of all cells
    index: jax.Array  # of the selected ones
    memory: jax.Array  # [B, N, C]
    projected: tuple[jax.Array, ...]
    attended: jax.Array
    merged: tuple[jax.Array, ...]
    stats: api.Tree


def parts_of(detector: api.Detector, network: api.PureModule, params, stats, x, *, train: bool) -> Parts:
    def inside(module: DETR):
        _, selection, known = module(x, train, None)
        return selection, known, module.encoder(module.backbone(x, train), train)

    output, new_stats = detector.apply(params, stats, x, train=train)
    (selection, known, encoded), _ = network.call(params, stats, inside)
    memory = jnp.concatenate([m.reshape(m.shape[0], -1, m.shape[-1]) for m in known.maps], 1)
    inner = encoded.projected, encoded.attended, encoded.merged
    return Parts(output, selection.scores, selection.index, memory, *inner, new_stats)


def denoising_of(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The stored denoising queries, as the first fields of `Asked`."""
    count = arrays["train/dn/labels"].shape[1]
    labels, blocked = arrays["train/dn/labels"].astype(np.int32), arrays["train/dn/attn_blocked"][:count, :count]
    return arrays["train/dn/boxes"], labels, blocked


def forward(detector: api.Detector, network: api.PureModule, arrays: Mapping[str, np.ndarray], params, stats):
    """Parts in evaluation and training, and the decoder's answer to the denoising queries."""

    def run(params, stats, x, denoising):
        trained = parts_of(detector, network, params, stats, x, train=True)
        answer = trained.output.ask(Asked(*denoising)) if denoising else None
        evaluated = parts_of(detector, network, params, stats, x, train=False)
        bare = [part._replace(output=_without_ask(part.output)) for part in (evaluated, trained)]
        size = jnp.array([x.shape[1:3]] * len(x))
        return *bare, answer, detector.decode(evaluated.output, size, max_detections=output_queries(evaluated))

    denoising = denoising_of(arrays) if "train/dn/labels" in arrays else None
    return jax.device_get(jax.jit(run, compiler_options=QUICK)(params, stats, nhwc(arrays["input"]), denoising))


def output_queries(parts: Parts) -> int:
    return parts.output.layers[-1].logits.shape[1]


def _without_ask(output: DetectorOutput) -> DetectorOutput:
    return dataclasses.replace(output, ask=None)


def part_checks(arrays: Mapping[str, np.ndarray], mode: str, parts: Parts, answer, tolerance: float) -> Checks:
    output = parts.output
    maps = {
        "backbone": output.backbone,
        "proj": parts.projected,
        "aifi": (parts.attended,),
        "fpn": parts.merged,
        "neck": output.neck,
    }
    for name, got in maps.items():
        yield levels(f"{mode}/{name}", got, maps_of(arrays, f"{mode}/{name}"), tolerance)
    yield Check(f"{mode}/memory", relative_error(parts.memory, arrays[f"{mode}/memory"]), tolerance)
    stored = below(arrays, f"{mode}/enc")
    yield Check(f"{mode}/enc/logits", relative_error(parts.scores, stored["logits"]), tolerance)
    yield Check(f"{mode}/enc/topk_inds", mismatches(parts.index, stored["topk_inds"]), 0)
    best = output.selected.logits
    yield Check(f"{mode}/enc/topk_scores", relative_error(best.max(-1), stored["topk_scores"]), tolerance)
    yield Check(f"{mode}/enc/topk_logits", relative_error(best, stored["topk_logits"]), tolerance)
    yield Check(f"{mode}/enc/topk_boxes", relative_error(output.selected.boxes, stored["topk_boxes"]), tolerance)
    first = output.selected.boxes
    if answer is not None:
        first = np.concatenate([arrays["train/dn/boxes"], first], 1)
    yield Check(f"{mode}/dec/init_points", relative_error(first, arrays[f"{mode}/dec/init_points"]), tolerance)
    yield from layer_checks(arrays, mode, output.layers, None if answer is None else answer.layers, tolerance)


def layer_checks(arrays, mode: str, layers: tuple[Queries, ...], denoised, tolerance: float) -> Checks:
    """Every stored layer; denoising queries come first."""
    for field in ("hidden", "logits", "boxes"):
        stored = below(arrays, f"{mode}/dec/{field}")
        yield Check(f"{mode}/dec/{field}: layers", float(abs(len(stored) - len(layers))), 0)
        for i, layer in enumerate(layers):
            got = getattr(layer, field)
            if denoised is not None:
                got = np.concatenate([getattr(denoised[i], field), got], 1)
            yield Check(f"{mode}/dec/{field}/{i}", relative_error(got, stored[str(i)]), tolerance)


def mask_checks(arrays: Mapping[str, np.ndarray]) -> Checks:
    """What kdjax takes for granted of the stored mask: own queries see each other alone, denoising ones see them."""
    blocked, count = arrays["train/dn/attn_blocked"], arrays["train/dn/labels"].shape[1]
    yield Check("own queries see all own ones", float(blocked[count:, count:].sum()), 0)
    yield Check("own queries see no denoising ones", float((~blocked[count:, :count]).sum()), 0)
    yield Check("denoising queries see all own ones", float(blocked[:count, count:].sum()), 0)


def detection_checks(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], found) -> Checks:
    """Detections as a set: one of ours for each, with the same label, its box and its score."""
    if meta["test_cfgs"] != {"default": {"score_thr": None, "max_per_img": found.scores.shape[1], "nms": None}}:
        raise UnknownCase(f"detections with {meta['test_cfgs']}")
    for i in range(len(found.boxes)):
        want = below(arrays, f"pred/default/{i}")
        apart = np.abs(found.boxes[i][:, None] - want["bboxes"]).max(-1) / 1e-2
        apart = np.maximum(apart, np.abs(found.scores[i][:, None] - want["scores"]) / 1e-4)
        apart = np.where(found.labels[i][:, None] == want["labels"], apart, np.inf)
        name = f"detections of image {i}: distance in tolerances"
        yield Check(name, float(max(apart.min(0).max(), apart.min(1).max())), 1)


def own_name(name: str) -> str:
    """kdjax's name of an array in a state dict of transformers."""
    marked = {"encoder_input_proj.0.0.weight": None, name.removeprefix("model."): None}
    return list(detr_names.renamed(marked))[-1]


def running_stats(detector: api.Detector, stats: api.Tree, want: dict[str, np.ndarray]) -> Checks:
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), detector.shapes[0])
    got = fill.to_torch(detector, zeros, stats)
    for name, value in want.items():
        own = own_name(name)
        yield Check(f"after_train_forward/{name}", relative_error(got[own], value), TRAIN)


def build_of(meta: Mapping[str, Any]) -> tuple[api.Detector, api.PureModule]:
    """The detector of a file and its network."""
    kind, classes, options = options_of(meta["build"])
    family = importlib.import_module(f"kdjax.detectors.{kind}")
    full = dict(discrete=False, points=4) | options
    network = api.pure(lambda: rtdetr.network(classes, full, xavier=kind == "rtdetrv2"))
    return family.make("r18", classes, **options), network


def replay(path: Path) -> Checks:
    arrays, meta = load(path)
    detector, network = build_of(meta)
    params, stats = fill.from_torch(detector, below(arrays, "param"))
    evaluated, trained, answer, found = forward(detector, network, arrays, params, stats)
    yield from part_checks(arrays, "eval", evaluated, None, EVAL)
    last = evaluated.output.layers[-1]
    yield Check("eval/logits", relative_error(last.logits, arrays["eval/logits"]), EVAL)
    yield Check("eval/boxes", relative_error(last.boxes, arrays["eval/boxes"]), EVAL)
    shapes = tuple((m.shape[1], m.shape[2]) for m in evaluated.output.neck)
    anchors, valid = query_decoder.grid_anchors(shapes)
    yield Check("anchors", relative_error(np.where(valid[:, None], anchors, 0), arrays["anchors"]), 1e-5)
    yield Check("anchors_valid", mismatches(valid, arrays["anchors_valid"]), 0)
    if answer is not None:
        yield from mask_checks(arrays)
    yield from part_checks(arrays, "train", trained, answer, TRAIN)
    yield from detection_checks(arrays, meta, found)
    yield from running_stats(detector, trained.stats, below(arrays, "after_train_forward"))


CHECKS = [(f"model/{family}_*.npz", replay) for family in ("rtdetr", "rtdetrv2")]
