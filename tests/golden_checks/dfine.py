"""Whole models: D-FINE, its outputs in evaluation and training, and detections."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.boxes import edges
from kdjax.detectors import api, dfine, query_decoder
from kdjax.structs import Decoded
from kdjax.weights import fill
from tests.golden_checks.api import QUICK, Check, Checks, UnknownCase, below, load, mismatches, relative_error
from tests.golden_checks.detr import (
    EVAL,
    TRAIN,
    detection_checks,
    forward,
    mask_checks,
    part_checks,
    running_stats,
)

_OPTIONS = {
    "encoder_hidden_dim": "encoder_channels",
    "encoder_ffn_dim": "encoder_hidden",
    "hidden_expansion": "expansion",
    "d_model": "channels",
    "decoder_attention_heads": "heads",
    "decoder_ffn_dim": "hidden",
    "decoder_layers": "layers",
    "decoder_n_points": "points",
    "num_queries": "queries",
    "max_num_bins": "bins",
    "reg_scale": "scale",
    "num_denoising": "denoising",
}
_BACKBONE = {
    "stage_mid_channels": "middle",
    "stage_out_channels": "widths",
    "stage_num_blocks": "blocks",
    "stage_numb_of_layers": "block_layers",
    "use_learnable_affine_block": "affine",
}


def options_of(build: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """(number of classes, options of `dfine.make`) of a file's `meta.build`; every field must be known."""
    cfg, options = dict(build["cfg"]), {"frozen_stem": False, "frozen_norm": build["freeze"]}
    backbone, classes = dict(cfg.pop("backbone")), cfg.pop("num_labels")
    levels, widths = len(cfg["decoder_n_points"]), backbone["stage_out_channels"]
    colours, *options["stem"] = backbone.pop("stem_channels")
    options["repeats"] = round(3 * cfg.pop("depth_mult"))
    implied = {
        "out_indices": [2, 3, 4][-levels:],
        "feat_strides": [8, 16, 32][-levels:],
        "num_feature_levels": levels,
        "encode_proj_layers": [levels - 1],
        "encoder_in_channels": widths[-levels:],
        "encoder_attention_heads": cfg["decoder_attention_heads"],
        "decoder_in_channels": [cfg["encoder_hidden_dim"]] * levels,
        "stage_in_channels": [options["stem"][1], *widths[:-1]],
        "stage_light_block": [False, False, True, True],
        "stage_kernel_size": [3, 3, 5, 5],
        "depths": [1] * 4,  # these three are not read
        "hidden_sizes": widths,
        "embedding_size": options["stem"][1],
    }
    if colours != 3:
        raise UnknownCase(f"images with {colours} colours")
    for field, value in (backbone | cfg).items():
        if own := (_BACKBONE | _OPTIONS).get(field):
            options[own] = value
        elif field not in implied or implied[field] != value:
            raise UnknownCase(f"the model's {field} = {value!r}")
    return classes, options


def build_of(meta: Mapping[str, Any]) -> tuple[api.Detector, api.PureModule]:
    """The detector of a file and its network."""
    classes, options = options_of(meta["build"])
    return dfine.make("s", classes, **options), api.pure(lambda: dfine.network(classes, options))


def edge_checks(arrays, mode: str, output, answer, tolerance: float) -> Checks:
    """First boxes, distributions and what they become; denoising queries come first."""
    parts: list[Decoded] = [Decoded(output.layers, output.first)]
    if answer is not None:
        parts.insert(0, answer)
    stored = below(arrays, f"{mode}/dec")

    def check(name: str, values, want: np.ndarray) -> Check:
        return Check(
            f"{mode}/dec/{name}", relative_error(np.concatenate(values, 1).reshape(want.shape), want), tolerance
        )

    for name, field in (("pre_boxes", "boxes"), ("pre_logits", "logits")):
        yield check(name, [getattr(part.first, field) for part in parts], stored[name])
    scale = float(arrays["param/model.decoder.reg_scale"][0])
    for i in range(len(output.layers)):
        yield check(f"ref of layer {i}", [part.layers[i].reference for part in parts], stored["ref"])
        corners = [part.layers[i].corners for part in parts]
        yield check(f"corners/{i}", corners, stored[f"corners/{i}"])
        bins = edges.edge_bins(corners[0].shape[-1] - 1, up=dfine.UP, scale=scale)
        yield check(f"dist/{i}", [edges.expected_edges(one, bins) for one in corners], stored[f"dist/{i}"])
    yield Check(f"{mode}/project", relative_error(bins, arrays[f"{mode}/project"]), 1e-5)


def quality_checks(arrays, network: api.PureModule, params, stats, mode: str, tolerance: float) -> Checks:
    """What the distributions that are stored add to the logits."""
    stored = below(arrays, f"{mode}/dec")
    corners = [stored[f"corners/{i}"] for i in range(len(below(stored, "corners")))]
    shaped = [values.reshape(*values.shape[:2], 4, -1) for values in corners]

    def run(params, stats, corners):
        def inside(module):
            return [layer(values) for layer, values in zip(module.decoder.heads.lqe_layers, corners, strict=True)]

        return network.call(params, stats, inside)[0]

    for i, value in enumerate(jax.jit(run, compiler_options=QUICK)(params, stats, shaped)):
        yield Check(f"{mode}/dec/lqe/{i}", relative_error(value, stored[f"lqe/{i}"]), tolerance)


def replay(path: Path) -> Checks:
    arrays, meta = load(path)
    detector, network = build_of(meta)
    params, stats = fill.from_torch(detector, below(arrays, "param"), keep_classifiers=True)
    evaluated, trained, answer, found = forward(detector, network, arrays, params, stats)
    yield from part_checks(arrays, "eval", evaluated, None, EVAL)
    yield from edge_checks(arrays, "eval", evaluated.output, None, EVAL)
    yield from quality_checks(arrays, network, params, stats, "eval", 1e-5)
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
    yield from edge_checks(arrays, "train", trained.output, answer, TRAIN)
    yield from detection_checks(arrays, meta, found)
    yield from running_stats(detector, trained.stats, below(arrays, "after_train_forward"))


CHECKS = [("model/dfine_*.npz", replay)]
