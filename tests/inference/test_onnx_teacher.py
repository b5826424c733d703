"""ONNX files as teachers: what they are given, where maps and boxes lie on the canvas, names of classes."""

import json

import cv2
import jax
import numpy as np
import pytest

from kdjax import detectors
from kdjax.data import classes
from kdjax.distill import Distiller
from kdjax.distill.teachers import without_places
from kdjax.errors import UserError
from kdjax.evals import coco as evals
from kdjax.inference import load, predict
from kdjax.inference.onnx_teacher import load_teacher
from kdjax.methods import build
from kdjax.structs import targets_of
from tests.shared import SHARED
from tests.support import onnx_files
from tests.support.arrays import quick_jit

pytest.importorskip("onnx", reason="files are made by onnx")
pytest.importorskip("onnxruntime", reason="teachers in ONNX files need kdjax[export]")

NAMES = ("disc", "wedge", "star")
YOLOX = SHARED and SHARED / "weights" / "yolox_nano.onnx"


def canvases(count: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> np.ndarray:
    """Smooth images u8[B, H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([cv2.resize(image, size[::-1]) for image in small])


def patches(path, *, image, dtype=np.float32, last: bool = False):
    """A file whose map "mean" holds the mean of each colour of its input over patches of 16 px."""
    nodes = [("Cast", ["image"], ["floats"], {"to": 1})]
    nodes += [("Transpose", ["floats"], ["first"], {"perm": [0, 3, 1, 2] if last else [0, 1, 2, 3]})]
    nodes += [("AveragePool", ["first"], ["mean"], {"kernel_shape": [16, 16], "strides": [16, 16]})]
    return onnx_files.write(path, nodes, image=image, outputs={"mean": [image[0], 3, "h", "w"]}, dtype=dtype)


@pytest.mark.parametrize("form", ["floats", "halves", "bytes", "last", "BGR"])
def test_a_file_gets_images_as_it_takes_them(form, tmp_path):
    last, dtype = form in ("bytes", "last"), {"halves": np.float16, "bytes": np.uint8}.get(form, np.float32)
    shape = ["B", 64, 64, 3] if last else ["B", 3, 64, 64]
    file = patches(tmp_path / "a.onnx", image=shape, dtype=dtype, last=last)
    options = {"mean": (10, 20, 30), "std": (2, 4, 8)}
    images = canvases(3)
    seen = load_teacher(file, "maps", options | {"colors": "BGR" if form == "BGR" else "RGB"}).observe(
        None, {"image": images}
    )
    colours = images.astype(np.float64).reshape(3, 4, 16, 4, 16, 3).mean((2, 4))
    if form == "BGR":
        colours = colours[..., ::-1]
    wanted = colours if form == "bytes" else (colours - options["mean"]) / options["std"]
    assert seen.strides == (16,) and seen.rows is None and seen.neck[0].dtype == np.float32
    np.testing.assert_allclose(seen.neck[0], wanted, atol=0.05 if form == "halves" else 1e-3)


@pytest.mark.parametrize("batch", [1, 4, "B"])
def test_a_batch_is_split_as_the_file_needs_it(batch, tmp_path):
    images = canvases(6)
    teacher = load_teacher(onnx_files.backbone(tmp_path / "a.onnx", batch=batch), "maps")
    seen = teacher.observe(None, {"image": images}).neck[0]
    assert seen.shape == (6, 4, 4, 5)
    for k in (0, 5):
        np.testing.assert_allclose(seen[k], teacher.observe(None, {"image": images[k : k + 1]}).neck[0][0], atol=1e-6)
    spec = teacher.spec((64, 64))
    assert spec.neck[0].shape == (1, 4, 4, 5) and not teacher.detects and teacher.decode is None


def test_an_input_of_any_size_is_the_canvas_unless_the_layout_names_one(tmp_path):
    file = patches(tmp_path / "a.onnx", image=["B", 3, "height", "width"])
    for options, cells, stride in (({}, (4, 6), 16), ({"image_size": (32, 48)}, (2, 3), 32)):
        spec = load_teacher(file, "maps", options).spec((64, 96))
        assert spec.neck[0].shape == (1, *cells, 3) and spec.strides == (stride,)


def test_maps_lie_on_the_whole_canvas(tmp_path):
    """Stretched, or in its proportions where these are the input's; otherwise they are refused."""
    file = patches(tmp_path / "a.onnx", image=[1, 3, 64, 64])
    image = np.zeros((1, 128, 128, 3), np.uint8)
    image[:, 64:, 96:] = 255
    for fit in ("stretch", "round"):
        seen = load_teacher(file, "maps", {"mean": 0, "std": 1, "fit": fit}).observe(None, {"image": image})
        wanted = np.zeros((4, 4, 3))
        wanted[2:, 3:] = 255
        assert seen.strides == (32,)
        np.testing.assert_allclose(seen.neck[0][0], wanted, atol=1)
    assert load_teacher(file, "maps", {"fit": "stretch"}).spec((64, 128)).strides == (24,)
    with pytest.raises(
        UserError, match=r"a\.onnx: the canvas of 64x128 px fills only 32x64 px of the input of 64x64 px"
    ):
        load_teacher(file, "maps", {"fit": "round"}).spec((64, 128))


def rows_file(path, boxes, probs, *, size=64, facts=None, batch="B"):
    """A file of the layout yolov8 that finds the same in every image."""
    centre = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    output = np.concatenate([centre, probs], 1).T[None].astype(np.float32)
    return onnx_files.constant(path, {"output0": output}, image=[batch, 3, size, size], facts=facts)


def some_rows(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, 40, (count, 2))
    return np.concatenate([first, first + rng.uniform(4, 20, (count, 2))], 1), rng.uniform(0.01, 0.99, (count, 3))


def test_boxes_come_back_to_the_canvas(tmp_path):
    boxes, probs = some_rows(84)
    file = rows_file(tmp_path / "a.onnx", boxes, probs)
    for canvas, options, ratio, strides in (
        ((64, 64), {}, (1, 1), (8, 16, 32)),
        ((128, 128), {}, (2, 2), (16, 32, 64)),
        ((64, 128), {}, (2, 2), ()),  # fills the upper half of the input: rows without a grid
        ((64, 128), {"fit": "stretch"}, (2, 1), ()),
        ((80, 80), {}, (1.25, 1.25), (10, 20, 40)),
        ((72, 72), {}, (1.125, 1.125), (9, 18, 36)),
        ((65, 65), {}, (65 / 64, 65 / 64), ()),  # strides that are no whole pixels
    ):
        teacher = load_teacher(file, "yolov8", options)
        seen = teacher.observe(None, {"image": np.zeros((2, *canvas, 3), np.uint8)})
        np.testing.assert_allclose(seen.rows.boxes[1], boxes * [*ratio, *ratio], atol=1e-4)
        assert seen.strides == strides and seen.rows.level_sizes == ((64, 16, 4) if strides else ())
        assert len(seen.cls_logits) == len(strides) and seen.rows.location is None
        if canvas == (128, 128):
            np.testing.assert_array_equal(teacher.priors(canvas)[:2], [[0, 0, 16, 16], [16, 0, 16, 16]])


def test_detections_of_rows_are_clipped_and_without_overlapping_ones(tmp_path):
    boxes = np.array([[8, 8, 40, 40], [9, 8, 40, 40], [30, 50, 60, 70], [50, 2, 60, 12]], float)
    probs = np.array([[0.9, 0.1, 0], [0.8, 0, 0.3], [0, 0.7, 0], [0.6, 0, 0]])
    teacher = load_teacher(rows_file(tmp_path / "a.onnx", boxes, probs), "yolov8")
    images, sizes = np.zeros((2, 64, 64, 3), np.uint8), np.array([[64, 64], [60, 40]], np.int32)
    found = teacher.program(None, images, sizes)
    kept = [found.boxes[k][found.valid[k] & (found.scores[k] > 0.2)].tolist() for k in (0, 1)]
    first, second, third, fourth = ([8, 8, 40, 40], [9, 8, 40, 40], [30, 50, 60, 64], [50, 2, 60, 12])
    np.testing.assert_allclose(kept[0], [first, third, fourth, second], atol=1e-4)  # the last one as class 2
    np.testing.assert_allclose(kept[1], [first, [30, 50, 40, 60], second], atol=1e-4)
    own = Distiller(detectors.build("rtmdet_pico", 3), teacher, [build("teach_detr")])
    seen = own.observe({"image": images, "image_size": sizes}).detections
    assert seen.boxes.shape == (2, 100, 4)
    np.testing.assert_allclose(seen.boxes[:, :20], found.boxes[:, :20], atol=1e-4)


def test_detections_of_a_file_are_clipped_to_the_image(tmp_path):
    dets = np.array([[[10, 10, 20, 30, 0.5], [40, 2, 60, 30, 0.9], [2, 2, 30, 31, 0.1]]], np.float32)
    file = onnx_files.constant(
        tmp_path / "a.onnx", {"dets": dets, "labels": np.array([[2, 0, 1]])}, image=["B", 3, 64, 64]
    )
    teacher = load_teacher(file, "mmdeploy", class_names=NAMES)
    batch = {"image": np.zeros((2, 128, 128, 3), np.uint8), "image_size": np.array([[128, 128], [40, 70]])}
    found = teacher.observe(None, batch).detections
    assert found.boxes.shape == (2, 100, 4) and found.valid.sum(1).tolist() == [3, 2]
    np.testing.assert_allclose(found.boxes[0, :3], [[80, 4, 120, 60], [20, 20, 40, 60], [4, 4, 60, 62]])
    np.testing.assert_allclose(found.boxes[1, :3], [[20, 20, 40, 40], [4, 4, 60, 40], [0] * 4])
    assert found.labels[0, :3].tolist() == [0, 2, 1]
    chosen = teacher.matched(("star", "disc")).observe(None, batch).detections
    assert chosen.labels[0, :3].tolist() == [1, 0, 0] and chosen.valid[0].tolist() == [True, True] + [False] * 98
    np.testing.assert_allclose(chosen.scores[1, :2], [0.5, 0])


@pytest.mark.parametrize(("sizes", "told"), [("image_hw", [30, 40]), ("input_wh", [96, 64]), ("input_hw", [64, 96])])
def test_a_second_input_gets_the_sizes(sizes, told, tmp_path):
    nodes = [
        ("Cast", ["sizes"], ["floats"], {"to": 1}),
        ("Concat", ["zeros", "floats"], ["flat"], {"axis": 1}),
        ("Unsqueeze", ["flat", "one"], ["boxes"], {}),
    ]
    constants = {"zeros": np.zeros((1, 2), np.float32), "one": np.array([1]), "scores": np.ones((1, 1), np.float32)}
    constants |= {"labels": np.zeros((1, 1), np.int64)}
    nodes += [("Identity", ["scores"], ["score"], {}), ("Identity", ["labels"], ["label"], {})]
    outputs = {"boxes": [1, 1, 4], "score": [1, 1], "label": [1, 1]}
    file = onnx_files.write(
        tmp_path / "a.onnx",
        nodes,
        image=[1, 3, 64, 96],
        outputs=outputs,
        constants=constants,
        sizes=np.int64,
        labels=["label"],
    )
    teacher = load_teacher(file, "detections", {"std": 1, "sizes": sizes})
    batch = {"image": np.zeros((1, 64, 96, 3), np.uint8), "image_size": np.array([[30, 40]])}
    clipped = np.minimum(told, [40, 30])
    np.testing.assert_array_equal(teacher.observe(None, batch).detections.boxes[0, 0], [0, 0, *clipped])


def test_classes_are_matched_by_name(tmp_path):
    boxes, probs = some_rows(84)
    facts = {"names": str(dict(enumerate(NAMES)))}  # as Ultralytics writes them
    teacher = load_teacher(rows_file(tmp_path / "a.onnx", boxes, probs, facts=facts), "yolov8")
    batch = {"image": np.zeros((1, 64, 64, 3), np.uint8)}
    assert teacher.names == NAMES and teacher.num_classes == 3
    whole, chosen = teacher.observe(None, batch), teacher.matched(["star", "disc"])
    seen = chosen.observe(None, batch)
    assert chosen.names == ("star", "disc") and chosen.num_classes == 2
    np.testing.assert_array_equal(seen.rows.logits, whole.rows.logits[..., [2, 0]])
    np.testing.assert_array_equal(seen.cls_logits[1], whole.cls_logits[1][..., [2, 0]])
    assert chosen.fingerprint != teacher.fingerprint
    with pytest.raises(
        UserError, match=r"a\.onnx: class 'cross' of the data is unknown to the teacher, which has disc, "
    ):
        teacher.matched(["star", "cross"])
    unnamed = load_teacher(rows_file(tmp_path / "b.onnx", boxes, probs), "yolov8")
    with pytest.raises(UserError, match=r"b\.onnx: the names of its classes are not known: set options\.classes"):
        unnamed.matched(NAMES)
    wrong = load_teacher(rows_file(tmp_path / "b.onnx", boxes, probs), "yolov8", {"classes": "voc"})
    with pytest.raises(UserError, match=r"b\.onnx: it tells the scores of 3 classes, but 20 are named \(aeroplane, "):
        wrong.spec((64, 64))


@pytest.mark.user_input(
    "Models and exports", "a teacher's ONNX file that cannot be run or read", "refused, with the reason"
)
def test_files_that_cannot_be_teachers_are_refused(tmp_path):
    def told(path, layout="maps", **options):
        with pytest.raises(UserError) as caught:
            load_teacher(path, layout, options).spec((64, 64))
        return str(caught.value)

    assert told(tmp_path / "none.onnx").endswith("none.onnx: there is no such file")
    (tmp_path / "broken.onnx").write_bytes(b"no onnx at all")
    assert "broken.onnx: onnxruntime cannot read it" in told(tmp_path / "broken.onnx")
    file = onnx_files.backbone(tmp_path / "a.onnx")
    assert "it has no output 'neck': its outputs are features" in told(file, "rows", outputs="neck", std=1)
    assert "there is no tensor 'p4' in it: its outputs are features, its last inner tensors features, patches" in told(
        file, maps="p4"
    )
    assert "its input is 'image' float32[?, 3, 64, 64]: options.std (and mean) must say" in told(file, "rows")
    assert "it is no export of kdjax: layout must be one of kdjax, yolox" in told(file, "kdjax")
    grey = onnx_files.write(
        tmp_path / "grey.onnx", [("Relu", ["image"], ["y"], {})], image=[1, 1, 64, 64], outputs={"y": [1, 1, 64, 64]}
    )
    assert "its input is 'image' float32[1, 1, 64, 64]: it must be [B, 3, H, W] or [B, H, W, 3]" in told(grey)


def test_tensors_inside_the_graph_are_maps_too(tmp_path):
    teacher = load_teacher(onnx_files.backbone(tmp_path / "a.onnx"), "maps", {"maps": "patches"})
    images = canvases(2)
    inner = teacher.observe(None, {"image": images}).neck[0]
    outer = load_teacher(tmp_path / "a.onnx", "maps").observe(None, {"image": images}).neck[0]
    assert np.abs(inner).max() > 1
    np.testing.assert_allclose(np.tanh(inner), outer, atol=1e-6)


# ------------------------------------------------------------------------------------------------ kdjax's own exports


def test_an_export_of_kdjax_teaches_as_the_live_teacher(made, tmp_path_factory):
    """Terms of methods that read rows and maps of predictions, and their gradients at the student's output: 1e-4."""
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    from kdjax.export import metadata, onnx

    live = load(made / "model")
    file = tmp_path_factory.mktemp("raw") / "raw.onnx"
    onnx.write(live, file, raw=True)
    onnx.add_metadata(file, metadata.describe(live, "onnx", raw=True))
    teacher = load_teacher(file, "kdjax").matched(live.class_names)
    student = detectors.build("rtmdet_pico", 6)
    params, stats = student.init(jax.random.key(3))
    batch = {
        "image": canvases(2),
        "image_size": np.full((2, 2), 64, np.int32),
        "boxes": np.tile(np.array([[4, 4, 40, 36], [30, 20, 60, 62]], np.float32), (2, 1, 1)),
        "labels": np.array([[0, 3], [2, 5]], np.int32),
        "valid": np.ones((2, 2), bool),
    }
    chosen = [build("bckd"), build("hinton"), build("cwd", student="cls_logits", teacher="cls_logits")]
    distillers = [Distiller(student, model, chosen) for model in (live, teacher)]
    adapters = distillers[0].init(jax.random.key(0), (64, 64))
    assert jax.tree.structure(adapters) == jax.tree.structure(distillers[1].init(jax.random.key(0), (64, 64)))
    observed = [quick_jit(distillers[0].observe)(batch), distillers[1].observe(batch)]  # a file is asked on the host
    seen = [without_places(one) for one in observed]
    assert seen[0].rows.level_sizes == seen[1].rows.level_sizes == (64, 16, 4)

    output, _ = quick_jit(lambda x: student.apply(params, stats, student.preprocess(x), train=True))(batch["image"])

    @quick_jit
    def step(output, observed):
        def loss(output):
            assignment = student.assign(output, targets_of(batch), None)
            given = {"observed": observed, "assignment": assignment, "key": jax.random.key(1)}
            terms = distillers[0].terms(adapters, output, batch, **given)
            return sum(terms.values()), terms

        return jax.grad(loss, has_aux=True)(output)

    (of_live, live_terms), (of_file, file_terms) = step(output, seen[0]), step(output, seen[1])
    assert len(live_terms) == 4 and all(float(value) > 0 for value in live_terms.values())
    for name, value in live_terms.items():
        assert float(file_terms[name]) == pytest.approx(float(value), rel=1e-4), name
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(of_live))
    for one, other in zip(jax.tree.leaves(of_live), jax.tree.leaves(of_file), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * size)
    asked = [Distiller(student, model, [build("teach_detr")]).observe for model in (live, teacher)]
    finds = [quick_jit(asked[0])(batch).detections, asked[1](batch).detections]
    assert finds[0].valid.sum() > 20
    np.testing.assert_allclose(finds[1].scores, finds[0].scores, atol=1e-5)
    np.testing.assert_allclose(finds[1].boxes[:, :10], finds[0].boxes[:, :10], atol=1e-3)


def test_an_export_with_detections_finds_what_the_model_finds(made, exported):
    live, teacher = load(made / "model"), load_teacher(exported[0], "kdjax")
    assert teacher.names == live.class_names and teacher.decode is None and teacher.fit == live.detector.fit
    images = list(canvases(3, (48, 80)))
    for found, wanted in zip(teacher.detect(images), live.detect(images), strict=True):
        assert len(found) == len(wanted) > 5
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes[:5], wanted.boxes[:5], atol=1e-3)
        np.testing.assert_array_equal(found.labels[:5], wanted.labels[:5])


# ------------------------------------------------------------------------------------------------- a published file


def published():
    return load_teacher(YOLOX, "yolox", {"classes": "coco"}), load(YOLOX, "yolox_nano", class_names=classes.COCO)


@pytest.mark.slow
@pytest.mark.skipif(not YOLOX, reason="needs the team's shared folder")
def test_yolox_has_the_same_rows_as_file_and_as_imported_detector():
    teacher, live = published()
    folder = SHARED / "data" / "coco_mini" / "images" / "val"
    images = [predict.read_image(file) for file in sorted(folder.iterdir())[:2]]
    (batch,) = predict.canvases(images, (416, 416), batch_size=2, fit="down")
    seen, wanted = teacher.observe(None, batch).rows, live.detector.observe(live.variables, batch).rows
    assert seen.level_sizes == wanted.level_sizes
    np.testing.assert_allclose(seen.boxes, wanted.boxes, rtol=1e-4, atol=0.1)
    for field in ("logits", "quality"):
        scores = (jax.nn.sigmoid(getattr(rows, field)) for rows in (seen, wanted))
        np.testing.assert_allclose(*scores, atol=4e-5)  # 2.2e-5 on a CPU without AVX-512
    np.testing.assert_array_equal(teacher.priors((416, 416)), wanted.location)


@pytest.mark.slow
@pytest.mark.skipif(not YOLOX, reason="needs the team's shared folder")
def test_yolox_has_the_same_ap_as_file_and_as_imported_detector():
    folder = SHARED / "data" / "coco_mini"
    truth = json.loads((folder / "annotations" / "instances_val.json").read_text())
    images = [predict.read_image(folder / "images" / "val" / entry["file_name"]) for entry in truth["images"]]
    ids = [entry["id"] for entry in sorted(truth["categories"], key=lambda entry: entry["id"])]
    teacher, live = published()
    metrics = []
    for model in (teacher, live):
        rows = []
        for entry, found in zip(truth["images"], model.detect(images), strict=True):
            rows.append((entry["id"], found))
        found = {k: type(one)(one.boxes, one.scores, one.labels, one.class_names, tuple(ids)) for k, one in rows}
        metrics.append(evals.coco_metrics(truth, found)["AP"])
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3) and metrics[0] == pytest.approx(0.469, abs=0.005)
