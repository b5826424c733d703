"""What do detections cost, beside the network, and beside a plain script on onnxruntime with NMS in NumPy?

    python benchmarks/detections.py decode --weights=yolox_nano.onnx --images=FOLDER
    python benchmarks/detections.py images --weights=yolox_nano.onnx --images=FOLDER --count=500

`decode` measures, in turn, the network and the decoder with its NMS, as it is and in the plain form
(`plain_nms.py`), for 8 images. YOLOX-nano sees real images. RTMDet-tiny and RetinaNet have no published weights of
this size that can be had: their logits are those of YOLOX-nano on its cells, for each anchor, and RTMDet's boxes are
YOLOX's ("as trained"); and those of the initial weights, which all score alike ("initial").

`images` detects the objects of image files with the script, with `Model.stream`, with `Model.detect` for one image
after the other, and with `Model.stream` and the plain form, in turn. Their detections are compared.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import plain_nms

import kdjax
from kdjax import Detections, detectors, nn
from kdjax.detectors import levels, yolox
from kdjax.detectors.api import Detector
from kdjax.inference.model import Model
from kdjax.inference.predict import canvases, read_image
from kdjax.structs import Array, DetectorOutput, PaddedDetections

BATCH = 8
DETECTORS = ("rtmdet_tiny", "yolox_nano", "retinanet_r18")


def median_ms(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Medians of the time of calls, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


# ------------------------------------------------------------------------------------------------------------- decode


def as_trained(detector: Detector, output: DetectorOutput, seen: DetectorOutput) -> DetectorOutput:
    """The output of a detector with the predictions of YOLOX in their places."""
    scores = jax.nn.sigmoid(levels.class_logits(seen)) * jax.nn.sigmoid(levels.join(seen.quality, 1))
    sizes = np.cumsum(levels.level_sizes(seen))[:-1]
    of_levels = dict(zip(seen.strides, jnp.split(jnp.log(scores) - jnp.log1p(-scores), sizes, 1), strict=True))
    logits, noise = [], np.random.default_rng(0)
    for stride, level in zip(output.strides, output.cls_logits, strict=True):
        source, (height, width) = min(stride, 32), level.shape[1:3]
        cells = of_levels[source].reshape(len(scores), seen.cls_logits[0].shape[1] * 8 // source, -1, scores.shape[2])
        cells = cells[:, :: stride // source, :: stride // source][:, :height, :width]
        apart = noise.exponential(1.0, (1, height, width, output.anchors, 1)).astype(np.float32)
        apart *= output.anchors > 1
        logits.append((cells[..., None, :] - apart).reshape(level.shape))
    output = dataclasses.replace(output, cls_logits=tuple(logits))
    if not detector.name.startswith("rtmdet"):
        return output
    boxes, points = yolox.decode_boxes(seen), levels.grid(output)[:, :2]
    distances = jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], -1)
    shapes = [level.shape for level in output.box_reg]
    parts = jnp.split(distances, np.cumsum(levels.level_sizes(output))[:-1], 1)
    return dataclasses.replace(output, box_reg=tuple(x.reshape(s) for x, s in zip(parts, shapes, strict=True)))


def decode(model: Model, files: list[Path], side: int, runs: int) -> None:
    images = (read_image(file) for file in files[:BATCH])
    batch = next(canvases(images, (side, side), batch_size=BATCH, fit=model.detector.fit))
    x, size = jnp.asarray(batch["image"]), jnp.asarray(batch["image_size"])
    print(f"| 8 images, {side} px | network, ms | decoder, ms | share | plain, ms | share |\n|---|---|---|---|---|---|")
    seen = None
    for name in ("yolox_nano", *(name for name in DETECTORS if name != "yolox_nano")):
        detector = model.detector if name == "yolox_nano" else detectors.build(name, 80)
        variables = model.variables if name == "yolox_nano" else detector.init(jax.random.PRNGKey(0))

        def apply(variables, x, detector=detector):  # noqa: ANN001, ANN202 - traced
            found = detector.apply(*variables, detector.preprocess(x), train=False)[0]
            parts = {part: getattr(found, part) for part in ("cls_logits", "box_reg", "quality")}
            return DetectorOutput(strides=found.strides, anchors=found.anchors, **parts)

        def plain(output, size, detector=detector):  # noqa: ANN001, ANN202 - traced
            with nn.replaced(select_rows=plain_nms.select_rows):
                return detector.decode(output, size)

        network, fast, slow = jax.jit(apply), jax.jit(detector.decode), jax.jit(plain)
        output = network(variables, x)
        seen = output if seen is None else seen
        kinds = (
            {"as trained": output}
            if name == "yolox_nano"
            else {"as trained": as_trained(detector, output, seen), "initial": output}
        )
        for kind, maps in kinds.items():
            for a, b in zip(jax.tree.leaves(fast(maps, size)), jax.tree.leaves(slow(maps, size)), strict=True):
                np.testing.assert_array_equal(a, b)
            took = median_ms(
                {
                    "network": lambda: network(variables, x),  # noqa: B023 - called at once
                    "fast": lambda: fast(maps, size),  # noqa: B023
                    "slow": lambda: slow(maps, size),  # noqa: B023
                },
                runs,
            )
            shares = [took[form] / took["network"] for form in ("fast", "slow")]
            print(
                f"| {name}, {kind} | {took['network']:.0f} | {took['fast']:.1f} | {shares[0]:.2f} | "
                f"{took['slow']:.0f} | {shares[1]:.2f} |",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------------------- images


def script(weights: Path, files: list[Path], side: int) -> Iterator[Detections]:
    """A plain script: YOLOX on onnxruntime, one image after the other, NMS in NumPy."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    grids = [np.stack(np.meshgrid(*[np.arange(side // s)] * 2), -1).reshape(-1, 2) for s in (8, 16, 32)]
    strides = np.concatenate([np.full((len(g), 1), s) for g, s in zip(grids, (8, 16, 32), strict=True)])
    cells = np.concatenate(grids)
    for file in files:
        image = cv2.imread(str(file))
        height, width = image.shape[:2]
        ratio = min(side / height, side / width)
        canvas = np.full((side, side, 3), 114, np.uint8)
        small = cv2.resize(image, (int(width * ratio), int(height * ratio)), interpolation=cv2.INTER_LINEAR)
        canvas[: small.shape[0], : small.shape[1]] = small
        found = session.run(None, {name: canvas.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
        centres, sides = (found[:, :2] + cells) * strides, np.exp(found[:, 2:4]) * strides
        boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1) / ratio
        scores = found[:, 4:5] * found[:, 5:]
        rows, labels = np.nonzero(scores > 0.001)
        boxes, scores = boxes[rows], scores[rows, labels]
        kept = []
        for label in np.unique(labels):
            of_label = np.flatnonzero(labels == label)
            kept.append(of_label[numpy_nms(boxes[of_label], scores[of_label], 0.65)])
        kept = np.concatenate(kept) if kept else np.zeros(0, int)
        kept = kept[np.argsort(-scores[kept], kind="stable")[:300]]
        boxes = np.clip(boxes[kept], 0, [width, height, width, height])
        yield Detections(boxes, scores[kept], labels[kept].astype(np.int32))


def numpy_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """The indices that are kept, best first."""
    x1, y1, x2, y2 = boxes.T
    areas, order, kept = (x2 - x1) * (y2 - y1), np.argsort(-scores, kind="stable"), []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[rest]) - np.maximum(x1[best], x1[rest])
        height = np.minimum(y2[best], y2[rest]) - np.maximum(y1[best], y1[rest])
        both = np.maximum(width, 0) * np.maximum(height, 0)
        order = rest[both / (areas[best] + areas[rest] - both) <= threshold]
    return kept


def several(model: Model, weights: Path, files: list[Path], rounds: int) -> None:
    def plain_decode(output: DetectorOutput, size: Array) -> PaddedDetections:
        with nn.replaced(select_rows=plain_nms.select_rows):
            return model.detector.decode(output, size)

    plain = dataclasses.replace(model, detector=dataclasses.replace(model.detector, decode=plain_decode))
    ways: dict[str, Callable[[], list[Detections]]] = {
        "script": lambda: list(script(weights, files, model.image_size[0])),
        "stream": lambda: [found for _, found in model.stream(read_image(file) for file in files)],
        "detect": lambda: [model.detect(file) for file in files],
        "stream, plain NMS": lambda: [found for _, found in plain.stream(read_image(file) for file in files)],
    }
    model.detect(files[0])
    for one in (model, plain):
        list(one.stream([read_image(files[0])]))  # compiles
    times: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, list[Detections]] = {}
    for _ in range(rounds):
        for way, call in ways.items():
            start = time.perf_counter()
            results[way] = call()
            times[way].append(time.perf_counter() - start)
    print(f"| {len(files)} images, {model.image_size[0]} px | seconds | of the script's |\n|---|---|---|")
    took = {way: float(np.median(values)) for way, values in times.items()}
    for way, seconds in took.items():
        print(f"| {way} | {seconds:.1f} | {seconds / took['script']:.2f} |")
    for way in ("stream", "detect"):
        pairs = list(zip(results["script"], results[way], strict=True))
        strong = [(a[a.scores > 0.3], b[b.scores > 0.3]) for a, b in pairs]
        equal = sum(len(a) == len(b) and np.array_equal(a.labels, b.labels) for a, b in strong)
        print(f"{way}: the same labels as the script's above 0.3 in {equal} of {len(files)} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "images"))
    parser.add_argument("--weights", type=Path, required=True, help="the authors' yolox_nano.onnx")
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--size", type=int, help="side of the canvas in pixels; 640 for decode, else 416")
    parser.add_argument("--runs", type=int, help="21 for decode, else 3")
    args = parser.parse_args()
    files = sorted(args.images.glob("*.jpg"))[: args.count]
    side = args.size or (640 if args.what == "decode" else 416)
    model = kdjax.load(args.weights, detector="yolox_nano", image_size=(side, side))
    if args.what == "decode":
        decode(model, files, side, args.runs or 21)
    else:
        several(model, args.weights, files, args.runs or 3)


if __name__ == "__main__":
    main()
