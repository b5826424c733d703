"""RTMDet with depthwise separable convolutions, ONNX files of RTMDet, and the published RTMDet-nano for persons."""

import functools

import jax
import numpy as np
import pytest

from kdjax import weights
from kdjax.boxes import nms
from kdjax.data import records
from kdjax.detectors import build, levels, rtmdet_ins
from kdjax.detectors.api import flatten, unflatten
from kdjax.errors import UserError
from kdjax.inference import load
from kdjax.inference.predict import on_canvas
from kdjax.structs import Targets
from kdjax.weights import folded
from tests.shared import SHARED

CLASSES = 3
# A program that runs once spends its time in the compiler.
QUICK = {"xla_backend_optimization_level": 0}


def noisy(detector):
    """Weights with statistics that are not those of a new network."""
    params, stats = detector.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = {path: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) for path, leaf in flatten(stats).items()}
    return params, unflatten(noise)


@functools.cache
def narrow():
    return build("rtmdet_nano", CLASSES, widen=0.0625, stacked_convs=1)


def as_file(detector, variables):
    """The weights as an ONNX file holds them."""
    apart = build(detector.name, CLASSES, **detector.options | {"share_conv": False})
    state, held = weights.to_torch(detector, *variables), {}
    for number, module in enumerate(folded.in_order(apart)):
        kernel = state[f"{module}.weight"]
        if f"{module}.bias" in state:
            held |= {f"{module}.weight": kernel, f"{module}.bias": state[f"{module}.bias"]}
            continue
        norm = (
            state[f"{module.removesuffix('conv')}bn.{leaf}"]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale, bias, mean, var = norm
        factor = scale / np.sqrt(var + 1e-5)
        held[f"onnx.{number}.weight"] = kernel * factor[:, None, None, None]
        held[f"onnx.{number}.bias"] = bias - mean * factor
    return held


def test_nano_is_openmmlabs_network():
    detector = build("rtmdet_nano", 1)
    params = flatten(detector.shapes[0])
    scales = [leaf.shape[0] for path, leaf in params.items() if path.endswith("/scale")]
    # As many as the published file has, whose norms are folded: each channel has one number less.
    assert sum(int(np.prod(leaf.shape)) for leaf in params.values()) - sum(scales) == 985_927
    state = set(weights.to_torch(detector, *detector.init(jax.random.key(0))))
    for name in (
        "backbone.stem.1.conv.weight",
        "backbone.stage2.1.blocks.1.conv1.pointwise_conv.bn.running_var",
        "neck.downsamples.1.depthwise_conv.conv.weight",
        "neck.out_convs.2.pointwise_conv.conv.weight",
        "bbox_head.cls_convs.2.1.depthwise_conv.bn.bias",
        "bbox_head.rtm_reg.0.bias",
    ):
        assert name in state, name
    kernel = flatten(detector.init(jax.random.key(0))[0])["bbox_head/reg_convs/1/0/pointwise_conv/conv/kernel"]
    assert np.asarray(kernel).std() == pytest.approx(0.01, rel=0.05)


def test_default_sizes_are_those_of_the_published_weights():
    sides = {"rtmdet_nano": 320, "yolox_nano": 416, "yolox_tiny": 416}
    for name in (*sides, "rtmdet_micro", "rtmdet_tiny", "rtmdet_ins_pico", "yolox_pico", "fcos_r18"):
        assert build(name, 1).image_size == (sides.get(name, 640),) * 2


def test_separable_convolutions_are_not_shared():
    assert build("rtmdet_tiny", CLASSES, depthwise=True).torch.copies("bbox_head/cls_convs/0/0/conv/kernel") == []
    with pytest.raises(UserError, match=r"^share_conv of RTMDet: depthwise separable convolutions cannot be shared"):
        build("rtmdet_nano", CLASSES, share_conv=True)
    with pytest.raises(UserError, match="'nano' of RTMDet-Ins: the variants are pico, micro, tiny, s, m, l, x"):
        rtmdet_ins.make("nano", CLASSES)


@functools.cache
def step():
    """Loss, its gradients, the output and the head entered everywhere, of a narrow network and one image."""
    detector = narrow()
    images = np.random.default_rng(1).integers(0, 255, (1, 64, 64, 3)).astype(np.uint8)
    size = np.full((1, 2), 64, np.int32)
    truth = Targets(np.float32([[[8, 8, 40, 48]]]), np.int32([[1]]), np.array([[True]]), size, size)
    x = detector.preprocess(images)

    def loss(params, stats):
        output, _ = detector.apply(params, stats, x, train=False)
        losses = detector.loss(output, truth, detector.assign(output, truth))
        entered = [
            detector.head(params, stats, maps, branch=branch, start=start)
            for branch, tower in (("cls", output.cls_tower), ("reg", output.reg_tower))
            for start, maps in enumerate((output.neck, tower[0]))
        ]
        return sum(losses.values()), (output, entered)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


@pytest.mark.slow
def test_taps_and_gradients_of_separable_convolutions():
    params, stats = noisy(narrow())
    (value, (output, entered)), gradients = step()(params, stats)
    assert np.isfinite(value) and [m.shape[1:] for m in output.neck_conv] == [(s, s, 16) for s in (8, 4, 2)]
    for got, want in zip(entered, (output.cls_logits,) * 2 + (output.box_reg,) * 2, strict=True):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    # Before norm and activation.
    scale, mean = (tree["neck"]["out_convs"]["0"]["pointwise_conv"]["bn"] for tree in (params, stats))
    normed = (output.neck_conv[0] - mean["mean"]) / np.sqrt(mean["var"] + 1e-5) * scale["scale"] + scale["bias"]
    np.testing.assert_allclose(jax.nn.silu(normed), output.neck[0], rtol=1e-3, atol=1e-5)
    # A level without a positive prior teaches its regression nothing.
    still = [path for path, leaf in flatten(gradients).items() if not np.abs(leaf).max()]
    assert all(path.startswith(("bbox_head/reg_convs/", "bbox_head/rtm_reg/")) for path in still)


def test_norms_of_an_onnx_file_are_unfolded():
    detector, variables = narrow(), noisy(narrow())
    filled = weights.from_torch(detector, as_file(detector, variables), keep_classifiers=True)
    (_, (output, _)), (_, (again, _)) = (step()(*given)[0] for given in (variables, filled))
    for field in ("cls_logits", "box_reg"):
        for one, other in zip(getattr(output, field), getattr(again, field), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_shared_convolutions_are_apart_in_an_onnx_file(tmp_path):
    detector = build("rtmdet_pico", CLASSES, widen=0.0625)
    held = as_file(detector, noisy(detector))
    assert weights.infer_options(detector, held).options == detector.options | {"share_conv": False}
    apart = weights.infer_options(detector, held)
    params = flatten(weights.from_torch(apart, held, keep_classifiers=True)[0])
    towers = [params[f"bbox_head/cls_convs/{level}/0/conv/kernel"] for level in range(3)]
    place = folded.in_order(apart).index("bbox_head.cls_convs.2.0.conv")
    np.testing.assert_array_equal(towers[2], held[f"onnx.{place}.weight"].transpose(2, 3, 1, 0))
    assert not np.array_equal(towers[0], towers[2])


def test_onnx_files_are_of_yolox_or_rtmdet():
    with pytest.raises(UserError, match="can only be read for YOLOX and RTMDet, not for fcos_r18"):
        weights.from_torch(build("fcos_r18", CLASSES), {"onnx.0.weight": np.zeros((1, 1, 1, 1), np.float32)})


# ------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def published():
    """The published RTMDet-nano for persons."""
    pytest.importorskip("onnx", reason="ONNX files need the package onnx")
    if SHARED is None or not (SHARED / "weights" / "rtmdet_nano_person.onnx").is_file():
        pytest.skip("the published weights are not here")
    file = SHARED / "weights" / "rtmdet_nano_person.onnx"
    return load(file, "rtmdet_nano", class_names=["person"])


@pytest.fixture(scope="module")
def network(published):
    return jax.jit(functools.partial(published.detector.apply, train=False), compiler_options=QUICK)


def test_maps_equal_the_stored_ones(published, network):
    """Within 1e-4; for values above 1, of the value: float32 itself rounds the largest by as much."""
    stored = np.load(SHARED / "weights" / "rtmdet_nano_person_maps.npz")
    assert published.image_size == stored["input"].shape[2:] == (320, 320)
    output, _ = network(*published.variables, stored["input"].transpose(0, 2, 3, 1))
    for level, stride in enumerate(published.detector.strides):
        for name, maps in (("rtm_cls", output.cls_logits[level]), ("rtm_reg", output.box_reg[level] / stride)):
            theirs = stored[f"{name}.{level}"].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(maps, theirs, rtol=1e-4, atol=1e-4, err_msg=f"{name}.{level}")


def test_detections_equal_those_of_the_file(published, network):
    """Preprocessing, boxes and NMS on photographs: the file does its own NMS, in onnxruntime, on unclipped boxes."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    file = str(SHARED / "weights" / "rtmdet_nano_person.onnx")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    detector, number = published.detector, 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def select(output):
        boxes, scores = detector.decode_boxes(output), jax.nn.sigmoid(detector.class_logits(output))
        settings = dict(score_threshold=0.05, iou_threshold=0.6, pre_nms=5000, max_detections=100, image_size=None)
        return nms.select_detections(boxes, scores, level_sizes=levels.level_sizes(output), **settings)

    folder = SHARED / "data" / "coco_mini" / "images"
    for path in (*sorted((folder / "val").glob("*.jpg")), *sorted((folder / "train").glob("*.jpg"))[:6]):
        canvas, _ = on_canvas(records.decode(path.read_bytes()), published.image_size, fit=detector.fit)
        x = detector.preprocess(canvas[None])
        mine = jax.device_get(select(network(*published.variables, x)[0]))
        (rows,), (labels,) = session.run(["dets", "labels"], {"input": np.asarray(x).transpose(0, 3, 1, 2)})
        theirs = rows[(labels >= 0) & (rows[:, 4] > 0.05)]
        boxes, scores = mine.boxes[mine.valid], mine.scores[mine.valid]
        away = np.abs(boxes[:, None] - theirs[:, :4]).max(-1)
        same = (away < 0.02) & (np.abs(scores[:, None] - theirs[:, 4]) < 1e-4)
        assert same.any(0).all() and same.any(1).all(), path
        number += len(scores)
    assert number > 100
