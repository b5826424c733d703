"""Compares detections with those of a reference file, as sets: rounding may change their order and the last ones."""

import dataclasses
import functools

import jax
import numpy as np

from kdjax.inference import masks
from kdjax.structs import DetectorOutput, Targets
from tests.golden_checks.api import QUICK, Check, Checks, UnknownCase, below, maps_of, nhwc


def detections(detector, arrays, meta, targets: Targets, evaluated: DetectorOutput) -> Checks:
    slim = DetectorOutput(
        strides=evaluated.strides,
        anchors=evaluated.anchors,
        cls_logits=evaluated.cls_logits,
        box_reg=evaluated.box_reg,
        quality=evaluated.quality,
        kernels=evaluated.kernels,
        prototypes=evaluated.prototypes,
    )
    maps = {field: maps_of(arrays, f"eval/{name}") for name, field in (("cls", "cls_logits"), ("reg", "box_reg"))}
    if detector.masks == "canvas":
        maps |= {"kernels": maps_of(arrays, "eval/kernel"), "prototypes": nhwc(arrays["eval/mask_feat"])}
    # A compact file may leave them out.
    stored = slim
    if all(map(len, maps.values())):
        stored = dataclasses.replace(slim, **maps, quality=maps_of(arrays, "eval/ctr"))
    sets = sorted({key.split("/")[1] for key in arrays if key.startswith(("pred/", "pred_rescaled/"))})
    for name in sets:
        config = dict(meta["test_cfgs"][name])
        if config.pop("min_bbox_size") != 0 or config["nms"].get("type") != "nms":
            raise UnknownCase(f"test settings {meta['test_cfgs'][name]}")
        settings = {
            "pre_nms": config.pop("nms_pre"),
            "score_threshold": config.pop("score_thr"),
            "iou_threshold": config.pop("nms")["iou_threshold"],
            "max_detections": config.pop("max_per_img"),
        }
        threshold = config.pop("mask_thr_binary") if detector.masks else 0.5
        if config:
            raise UnknownCase(f"test settings {config}")
        decode = jax.jit(functools.partial(detector.decode, **settings), compiler_options=QUICK)
        for source, output in (("stored outputs", stored), ("end to end", slim)):
            found = jax.device_get(decode(output, targets.image_size))
            for prefix, scale in (("pred", (1.0, 1.0)), ("pred_rescaled", meta.get("rescale_factor"))):
                want = below(arrays, f"{prefix}/{name}")
                if want:
                    factor = np.array([*scale, *scale], np.float32)
                    error = sum(
                        unexplained(
                            [a[found.valid[i]] for a in (found.boxes[i] / factor, found.scores[i], found.labels[i])],
                            [want[f"{i}/{key}"] for key in ("bboxes", "scores", "labels")],
                            edges=score_edges(stored, i, settings),
                            settings=settings,
                        )
                        for i in range(len(found.valid))
                    )
                    yield Check(f"{prefix}/{name}, {source}: boxes without a match", float(error), 0)
                    if detector.masks:
                        of = (found, want, factor, targets.instance_masks.shape[2:], threshold)
                        in_image = functools.partial(_from_canvas, *of)
                        yield mask_check(f"{prefix}/{name}, {source}", found, want, factor, in_image)


def _from_canvas(found, want, factor, canvas, threshold, i: int, boxes):
    """Masks of the canvas as those of an image of the file."""
    shape = tuple(want[f"{i}/masks_shape"][1:])
    size = tuple((np.array(shape) * factor[1::-1]).astype(int))
    return masks.from_canvas(found.masks[i][found.valid[i]], canvas, size, shape, threshold=threshold)


def mask_check(name: str, found, want: dict[str, np.ndarray], factor, in_image) -> Check:
    """The largest share of pixels in which a mask differs from that of the same detection in the file.

    A pixel whose logit is near the threshold can fall to either side. `in_image(i, boxes)` gives the masks of image i.
    """
    worst, count = 0.0, 0
    for i, valid in enumerate(found.valid):
        boxes, scores, labels = found.boxes[i][valid] / factor, found.scores[i][valid], found.labels[i][valid]
        shape = want[f"{i}/masks_shape"]
        truth = np.unpackbits(want[f"{i}/masks_packed"])[: shape.prod()].reshape(shape).astype(bool)
        for box, score, label, mask in zip(boxes, scores, labels, in_image(i, boxes), strict=True):
            same = (want[f"{i}/labels"] == label) & (np.abs(want[f"{i}/scores"] - score) <= 1e-4)
            same &= (np.abs(want[f"{i}/bboxes"] - box) <= 1e-2).all(1)
            if same.any():
                worst = max(worst, min(float(np.mean(mask != truth[j])) for j in np.flatnonzero(same)))
                count += 1
    return Check(f"{name}: masks", worst if count else float("inf"), 1e-3)


def score_edges(output: DetectorOutput, image: int, settings: dict) -> list[float]:
    """Scores at which a rounding error lets a candidate in or out: the threshold and the last pair of each level.

    With a quality, those are class scores; the final scores of the candidates beside them are what is returned.
    """
    edges = []
    for level, logits in enumerate(output.cls_logits):
        scores = 1 / (1 + np.exp(-logits[image].astype(np.float64)))
        best = np.sort(scores.ravel())[::-1]
        last = [best[settings["pre_nms"] - 1]] if len(best) > settings["pre_nms"] else []
        last.append(settings["score_threshold"])
        if output.quality:
            final = scores / (1 + np.exp(-output.quality[level][image].astype(np.float64)))
            edges += [score for edge in last for score in final[np.abs(scores - edge) <= 1e-4]]
        else:
            edges += last
    return edges


def unexplained(got: list[np.ndarray], want: list[np.ndarray], *, edges: list[float], settings: dict) -> int:
    """How many detections of either side have no partner, and no reason in rounding for it.

    Partners share the label, lie within 1e-2 px and 1e-4 of score. Reasons are: a score within 1e-4 of an edge, or of
    the last kept one where all places are full; an IoU within 1e-4 of the suppression threshold; or suppression by, or
    by the lack of, a box that itself has a reason.
    """
    free = list(range(len(want[0])))
    alone = []  # (box, score, label, whose)
    for box, score, label in zip(*got, strict=True):
        fits = [
            j for j in free
            if want[2][j] == label and abs(want[1][j] - score) <= 1e-4 and np.abs(want[0][j] - box).max() <= 1e-2
        ]  # fmt: skip
        if fits:
            free.remove(min(fits, key=lambda j: np.abs(want[0][j] - box).max()))
        else:
            alone.append((box, score, label))
    alone += [(want[0][j], want[1][j], want[2][j]) for j in free]
    full = max(len(got[0]), len(want[0])) == settings["max_detections"]
    if full:
        edges = [*edges, min(got[1].min(), want[1].min()), max(got[1].min(), want[1].min())]
    everyone = [np.concatenate(pair) for pair in zip(got, want, strict=True)]
    excused: list[tuple] = []

    def reason(box, score, label) -> bool:
        if min((abs(score - edge) for edge in edges), default=1) <= 1e-4:
            return True
        same = everyone[2] == label
        if (np.abs(_iou(box, everyone[0][same]) - settings["iou_threshold"]) <= 1e-4).any():
            return True
        return any(lab == label and _iou(box, b[None])[0] > settings["iou_threshold"] for b, _, lab in excused)

    left = alone
    while left:
        now = [one for one in left if reason(*one)]
        if not now:
            break
        excused += now
        left = [one for one in left if not any(one is other for other in now)]
    return len(left)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    overlap = np.clip(high - low, 0, None).prod(1)
    area = (others[:, 2:] - others[:, :2]).prod(1)
    return overlap / np.maximum((box[2:] - box[:2]).prod() + area - overlap, 1e-12)
