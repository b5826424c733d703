"""`model/rtdetr*`, `model/dfine*`: denoising, matching and losses, given the outputs that the files hold."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import edges, matching
from kdjax.detectors import denoising, detr_loss
from kdjax.structs import Asked, Assignment, Decoded, Denoising, DetectorOutput, Queries, Targets
from tests.golden_checks.api import QUICK, Check, Checks, below, load, mismatches, relative_error

Arrays = Mapping[str, np.ndarray]
VALUE, LOGIT = 1e-4, 1e-5
SPARE = 3  # rows of padding behind the objects, and further denoising places behind them
# kdjax's name of a term and the peers'.
NAMES = {"cls": "vfl", "l1": "bbox", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}


def targets_of(arrays: Arrays, size: tuple[int, int]) -> Targets:
    """The objects of all images, padded."""
    images = sum(key.endswith("/labels") for key in below(arrays, "gt"))
    objects = max(len(arrays[f"gt/{i}/labels"]) for i in range(images)) + SPARE
    boxes, labels = np.zeros((images, objects, 4), np.float32), np.zeros((images, objects), np.int32)
    valid = np.zeros((images, objects), bool)
    for i in range(images):
        count = len(arrays[f"gt/{i}/labels"])
        boxes[i, :count], labels[i, :count], valid[i, :count] = (
            arrays[f"gt/{i}/bboxes"],
            arrays[f"gt/{i}/labels"],
            True,
        )
    sizes = np.broadcast_to(np.int32(size), (images, 2))
    return Targets(boxes, labels, valid, sizes, sizes)


def noised(arrays: Arrays, prefix: str, boxes: Any, targets: Targets, places: int, **settings: Any) -> Denoising:
    """kdjax's denoising queries from the draws of a file; those of further places are made up."""

    def padded(name: str) -> np.ndarray:
        values = arrays[f"{prefix}draw/{name}"]
        rest = places - values.shape[1]
        return np.pad(values, [(0, 0), (0, rest), (0, 0)][: values.ndim], constant_values=1)

    sign = padded("box_sign").astype(np.float32)
    draws = denoising.Draws(
        padded("label_uniform"),
        padded("new_label").astype(np.int32),
        padded("box_uniform"),
        sign if sign.min() < 0 else 2 * sign - 1,
    )
    make = jax.jit(functools.partial(denoising.contrastive, **settings), compiler_options=QUICK)
    return make(draws, boxes, targets.labels, targets.valid)


def denoising_checks(found: Denoising, arrays: Arrays, prefix: str, valid: np.ndarray, own: int) -> Checks:
    """Against the arrays below `prefix`; `own` is the number of the decoder's own queries."""
    live = np.asarray(found.live)
    count, groups = int(live.sum()), int(found.groups)
    yield Check("denoising places", mismatches(live, np.arange(len(live)) < arrays[f"{prefix}labels"].shape[1]), 0)
    yield Check("denoising groups", abs(groups - int(arrays[f"{prefix}num_group"])), 0)
    yield Check("denoising labels", mismatches(found.labels[:, live], arrays[f"{prefix}labels"]), 0)
    boxes = np.asarray(found.boxes)[:, live]
    yield Check("denoising boxes", relative_error(logit(boxes), arrays[f"{prefix}boxes_unact"]), LOGIT)
    # Own queries see each other alone; denoising ones see all own queries.
    blocked = np.pad(np.asarray(found.blocked)[:count, :count], (0, own))
    blocked[count:, :count] = True
    yield Check("denoising mask", mismatches(blocked, arrays[f"{prefix}attn_blocked"]), 0)
    wrong = 0.0
    for i, of_image in enumerate(np.asarray(found.matched)):
        objects = int(valid[i].sum())
        wrong += mismatches(np.flatnonzero(of_image >= 0), arrays[f"{prefix}positive_idx/{i}"])
        wrong += mismatches(of_image[of_image >= 0], np.tile(np.arange(objects), groups))
    yield Check("denoising positives", wrong, 0)
    rest = np.asarray(found.labels)[:, ~live], np.asarray(found.boxes)[:, ~live]
    yield Check("denoising places that are not used", float(rest[1].any() or len(np.unique(rest[0])) > 1), 0)


def logit(x: np.ndarray) -> np.ndarray:
    x = np.float32(x)
    return np.log(np.maximum(x, 1e-5) / np.maximum(1 - x, 1e-5))


def output_of(
    arrays: Arrays, split: int, places: int, strides: tuple[int, ...], size: tuple[int, int]
) -> DetectorOutput:
    """What kdjax's detector would return, made of the stored outputs of the training step.

    `split` is the number of denoising queries; behind them come places that are not used, with numbers that would show
    in a loss.
    """
    stored = below(arrays, "train/dec")
    layers = len(below(stored, "logits"))
    batch = len(arrays["input"])

    def part(name: str, own: bool) -> np.ndarray:
        values = stored[name]
        if name.startswith("corners"):
            values = values.reshape(*values.shape[:2], 4, -1)
        if own:
            return values[:, split:]
        rest = [(0, 0), (0, places - split)] + [(0, 0)] * (values.ndim - 2)
        return np.pad(values[:, :split], rest, constant_values=0.3)

    def queries(layer: int, own: bool) -> Queries:
        with_edges = (part(f"corners/{layer}", own), part("ref", own)) if "ref" in stored else (None, None)
        return Queries(part(f"logits/{layer}", own), part(f"boxes/{layer}", own), None, *with_edges)

    def first(own: bool) -> Queries | None:
        return Queries(part("pre_logits", own), part("pre_boxes", own)) if "pre_boxes" in stored else None

    def ask(decoded: Decoded, asked: Asked) -> Decoded:
        assert asked.labels.shape == (batch, places)
        return decoded

    return DetectorOutput(
        strides=strides,
        neck=tuple(jnp.zeros((batch, size[0] // stride, size[1] // stride, 1)) for stride in strides),
        layers=tuple(queries(layer, True) for layer in range(layers)),
        first=first(True),
        selected=Queries(arrays["train/enc/topk_logits"], arrays["train/enc/topk_boxes"]),
        ask=jax.tree_util.Partial(ask, Decoded(tuple(queries(layer, False) for layer in range(layers)), first(False))),
    )


def same_pairs(found: np.ndarray, arrays: Arrays, prefix: str) -> float:
    """How many pairs of (query, object) differ from the stored ones: `found` i32[B, M]."""
    wrong = 0
    for i, of_image in enumerate(np.asarray(found)):
        stored = zip(arrays[f"{prefix}/{i}/query"].tolist(), arrays[f"{prefix}/{i}/gt"].tolist(), strict=True)
        wrong += len({(int(q), m) for m, q in enumerate(of_image) if q >= 0} ^ set(stored))
    return wrong


def model(path: Path) -> Checks:
    """Every check of a model file that needs no network."""
    arrays, meta = load(path)
    config, size = meta["config"], tuple(meta["size"])
    strides = tuple(config["feat_strides"])
    targets = targets_of(arrays, size)
    places = denoising.places(config["num_denoising"], targets.valid.shape[1])
    split = int(arrays["train/dn/num_split"][0])
    output = output_of(arrays, split, places, strides, size)
    settings = {
        "number": config["num_denoising"],
        "num_classes": output.layers[0].logits.shape[-1],
        "label_noise": config["label_noise_ratio"],
        "box_noise": config["box_noise_scale"],
    }
    shares = targets.boxes / np.asarray(detr_loss.sides(output))
    found = noised(arrays, "train/dn/", shares, targets, places, **settings)
    own = output.layers[0].logits.shape[1]
    yield from denoising_checks(found, arrays, "train/dn/", targets.valid, own)

    assign = jax.jit(detr_loss.assigner(settings["num_classes"], num_denoising=0), compiler_options=QUICK)
    assignment = assign(output, targets)
    yield Check("matched boxes", relative_error(*last_boxes(assignment, arrays, targets)), VALUE)
    assignment = assignment._replace(denoising=found)
    dfine = output.first is not None
    of_layers = [*(f"aux_{i}" for i in range(len(output.layers) - 1)), "last"]
    names = [*of_layers, *(["pre"] if dfine else []), "enc"]
    prefix = "upstream/assign" if dfine else "assign"
    for name, queries in zip(names, np.asarray(assignment.queries), strict=True):
        yield Check(f"matching {name}", same_pairs(queries, arrays, f"{prefix}/{name}"), 0)
    if dfine:
        yield from union_checks(assignment, arrays, own)
        yield from upstream_d_fine(output, targets, assignment, arrays, config)
        yield from transformers_d_fine(output, targets, assignment, arrays, config)
    else:
        yield from rt_detr(output, targets, assignment, arrays)


def last_boxes(assignment: Assignment, arrays: Arrays, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of the matched queries of the last layer, and the stored ones; both in order of the queries."""
    prefix = "upstream/assign/last" if "upstream/assign/last/0/query" in arrays else "assign/last"
    stored = np.zeros(assignment.boxes.shape, np.float32)
    for i in range(len(stored)):
        stored[i, arrays[f"{prefix}/{i}/query"]] = targets.boxes[i, arrays[f"{prefix}/{i}/gt"]]
    return np.asarray(assignment.boxes), stored


def term_checks(kind: str, terms: Mapping[str, Any], suffixes: Mapping[str, list[str]], arrays: Arrays, prefix: str):
    """Every stored loss but the total against a term; `suffixes` of the outputs, by what a term is of."""
    stored, seen = below(arrays, prefix), set()
    for name, values in terms.items():
        which = "dn" if name.startswith("dn_") else "own"
        of_peer = NAMES[name.removeprefix("dn_")]
        for suffix, value in zip(suffixes[which], np.asarray(values), strict=False):
            key = f"loss_{of_peer}{suffix}"
            if key not in stored:
                # D-FINE's last layer has nothing to learn from itself.
                yield Check(f"{kind} {key}, not stored", abs(float(value)), 1e-6)
                continue
            seen.add(key)
            yield Check(f"{kind} {key}", relative_error(value, stored[key]), VALUE)
    left = set(stored) - seen - {"total"}
    yield Check(f"{kind}: stored losses without a term: {', '.join(sorted(left))}", float(len(left)), 0)
    if "total" in stored:
        total = sum(float(np.sum(values)) for values in terms.values())
        yield Check(f"{kind} total", relative_error(total, stored["total"]), VALUE)


def rt_detr(output: DetectorOutput, targets: Targets, assignment: Assignment, arrays: Arrays) -> Checks:
    terms = jax.jit(detr_loss.rt_detr_terms, compiler_options=QUICK)(output, targets, assignment)
    layers = len(output.layers)
    suffixes = {
        "own": [*(f"_aux_{i}" for i in range(layers - 1)), "", f"_aux_{layers - 1}"],
        "dn": [f"_dn_{i}" for i in range(layers)],
    }
    yield from term_checks("loss", terms, suffixes, arrays, "train/loss")
    unweighted = {name: value / detr_loss.WEIGHTS[name.removeprefix("dn_")] for name, value in terms.items()}
    yield from term_checks("unweighted", unweighted, suffixes, arrays, "train/loss_unweighted")
    total = sum(float(np.sum(values)) for values in terms.values())
    yield Check("loss of the authors", relative_error(total, arrays["upstream/loss/total"]), VALUE)


def union_checks(assignment: Assignment, arrays: Arrays, own: int) -> Checks:
    """Objects that a query met equally often leave the stored union open."""
    union = np.asarray(matching.objects_of(assignment.queries, own))
    wrong = 0
    for i, of_image in enumerate(union):
        stored = np.full(own, -1)
        stored[arrays[f"upstream/assign/union/{i}/query"]] = arrays[f"upstream/assign/union/{i}/gt"]
        for query in np.flatnonzero(of_image != stored):
            met = np.asarray(assignment.queries)[:, i] == query
            counts = [met[:, m].sum() for m in (of_image[query], stored[query])]
            wrong += of_image[query] < 0 or stored[query] < 0 or counts[0] != counts[1]
    yield Check("union of the matchings", wrong, 0)


def stored_union(arrays: Arrays, shape: tuple[int, int]) -> np.ndarray:
    union = np.full(shape, -1, np.int32)
    for i, of_image in enumerate(union):
        of_image[arrays[f"upstream/assign/union/{i}/query"]] = arrays[f"upstream/assign/union/{i}/gt"]
    return union


def upstream_d_fine(
    output: DetectorOutput, targets: Targets, assignment: Assignment, arrays: Arrays, config: Mapping[str, Any]
) -> Checks:
    """The authors' criterion."""
    of = functools.partial(detr_loss.d_fine_terms, up=config["up"], scale=config["reg_scale"])
    terms = jax.jit(of, compiler_options=QUICK)(
        output, targets, assignment, union=stored_union(arrays, assignment.matched.shape)
    )
    layers = range(len(output.layers))
    suffixes = {
        "own": [*(f"_aux_{i}" for i in layers[:-1]), "", "_pre", "_enc_0"],
        "dn": [*(f"_dn_{i}" for i in layers), "_dn_pre"],
    }
    yield from term_checks("authors' loss", terms, suffixes, arrays, "upstream/loss")


def transformers_d_fine(
    output: DetectorOutput, targets: Targets, assignment: Assignment, arrays: Arrays, config: Mapping[str, Any]
) -> Checks:
    """transformers' loss from kdjax's parts: logits and boxes of a layer stand beside the corners of the next one."""
    noised = assignment.denoising

    def shifted(layers: tuple[Queries, ...], first: Queries) -> tuple[Queries, ...]:
        return tuple(
            before._replace(corners=layer.corners, reference=layer.reference)
            for before, layer in zip((first, *layers[:-1]), layers, strict=True)
        )

    def clipped(outputs: tuple[Queries, ...]) -> tuple[Queries, ...]:
        return tuple(queries._replace(boxes=jnp.clip(queries.boxes, 0, 1)) for queries in outputs)

    def terms_of(output: DetectorOutput, targets: Targets, noised: Denoising) -> tuple[dict[str, jax.Array], jax.Array]:
        truth, last = detr_loss.truth_of(output, targets), output.layers[-1]
        aux = clipped(shifted(output.layers, output.first)[:-1])
        outputs = (*aux, *clipped((last, output.selected)))
        found = detr_loss.match(outputs, truth, targets.valid)
        own = jax.vmap(lambda found: matching.objects_of(found[None], last.logits.shape[1]))(found)
        settings = {
            "truth": truth,
            "bins": functools.partial(edges.edge_bins, up=config["up"], scale=config["reg_scale"]),
            "scale": config["reg_scale"],
        }

        def of_edges(layers, teacher, matched, count, live=True):
            """Each layer by its own matching and numbers; the last entry of a pair is what it learns from."""
            positive = jnp.sum(matched[0] >= 0)
            balance = jnp.sqrt(jnp.stack([positive, jnp.sum((matched[0] < 0) & live)]))
            pairs = [
                detr_loss.edge_losses((layer, teacher), m, live, count=count, balance=balance, **settings)
                for layer, m in zip(layers, matched, strict=True)
            ]
            return {name: jnp.stack([pair[name][0] for pair in pairs]) for name in ("fgl", "ddf")}

        terms = detr_loss.class_losses(outputs, own, truth, truth.count)
        terms |= detr_loss.box_losses(outputs, own, truth, truth.count)
        terms |= of_edges(aux, last, own[: len(aux)], truth.count)
        decoded = output.ask(Asked(noised.boxes, noised.labels, noised.blocked))
        layers, count = clipped(shifted(decoded.layers, decoded.first)), truth.count * noised.groups
        matched = jnp.broadcast_to(noised.matched, (len(layers), *noised.matched.shape))
        of_noised = detr_loss.class_losses(layers, matched, truth, count, noised.live)
        of_noised |= detr_loss.box_losses(layers, matched, truth, count)
        of_noised |= of_edges(layers, decoded.layers[-1], matched, count, noised.live)
        terms |= {f"dn_{name}": value for name, value in of_noised.items()}
        return detr_loss.weighted(terms), found

    terms, found = jax.jit(terms_of, compiler_options=QUICK)(output, targets, noised)
    layers = range(len(output.layers))
    names = [*(f"aux_{i}" for i in layers[:-1]), "last", "enc"]
    for name, queries in zip(names, np.asarray(found), strict=True):
        yield Check(f"transformers' matching {name}", same_pairs(queries, arrays, f"assign/{name}"), 0)
    suffixes = {
        "own": [*(f"_aux_{i}" for i in layers[:-1]), "", f"_aux_{layers[-1]}"],
        "dn": [f"_dn_{i}" for i in layers],
    }
    yield from term_checks("transformers' loss", terms, suffixes, arrays, "train/loss")
    unweighted = {name: value / detr_loss.WEIGHTS[name.removeprefix("dn_")] for name, value in terms.items()}
    yield from term_checks("transformers' unweighted", unweighted, suffixes, arrays, "train/loss_unweighted")


CHECKS = [(f"model/{family}_*.npz", model) for family in ("rtdetr", "rtdetrv2", "dfine")]
