"""The contract of a teacher: live, recorded or on the host, it gives the same terms; what it lacks is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import detectors, methods
from kdjax.distill import Custom, Distiller, from_file, on_host, recorded, spec_of, taps
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput
from tests.support.arrays import quick_jit

SIZE, BATCH = (64, 64), 8
STUDENT, TEACHER = (detectors.build("rtmdet_pico", 3, widen=widen) for widen in (0.0625, 0.125))
METHODS = [methods.cwd(), methods.hinton(), methods.mkd()]  # of maps, of predictions, with a key


@pytest.fixture(scope="module")
def data():
    """(batch, output of the student, variables of the teacher, what it observes); the student's maps are random."""
    rng = np.random.default_rng(0)
    boxes = np.zeros((BATCH, 2, 4), np.float32)
    boxes[:, 0] = 4, 6, 50, 60
    batch = {
        "image": rng.integers(0, 255, (BATCH, *SIZE, 3)).astype(np.uint8),
        "boxes": boxes,
        "labels": np.ones((BATCH, 2), np.int32),
        "valid": np.tile([True, False], (BATCH, 1)),
        "image_size": np.full((BATCH, 2), 64, np.int32),
    }
    spec = dataclasses.replace(STUDENT.spec(SIZE), rows=None)
    output = jax.tree.map(lambda leaf: rng.normal(size=(BATCH, *leaf.shape[1:])).astype(np.float32), spec)
    boxes_of = tuple(stride * (2 + m) for stride, m in zip(output.strides, output.box_reg, strict=True))
    variables = TEACHER.init(jax.random.key(1))
    observed = jax.tree.map(np.asarray, quick_jit(TEACHER.observe)(variables, batch))
    return batch, dataclasses.replace(output, box_reg=boxes_of), variables, observed


def terms(distiller: Distiller, output, batch, variables) -> dict[str, float]:
    adapters = distiller.init(jax.random.key(2), SIZE)
    run = quick_jit(lambda *arrays: distiller.terms(adapters, *arrays, key=jax.random.key(3), step=5))
    return jax.tree.map(float, run(output, batch, variables))


@pytest.fixture(scope="module")
def live(data):
    batch, output, variables, _ = data
    return terms(Distiller(STUDENT, TEACHER, METHODS), output, batch, variables)


def test_recorded_and_on_the_host_equal_live(data, live):
    batch, output, _, observed = data
    seen = []

    def host(images):
        seen.append(np.asarray(images))
        return observed

    by_host = terms(Distiller(STUDENT, on_host(host, TEACHER.spec), METHODS), output, batch, None)
    of_batch = {**batch, "teacher": observed}
    by_batch = terms(Distiller(STUDENT, recorded(TEACHER.spec), METHODS), output, of_batch, None)
    assert by_host == by_batch and set(live) == set(by_batch)
    # The live teacher is computed by another program, in which sums may be ordered in another way.
    assert by_batch == pytest.approx(live, rel=1e-5)
    assert {name.partition("/")[0] for name in live} == {"cwd", "hinton", "mkd"}
    assert seen and all(np.array_equal(images, batch["image"]) and images.dtype == np.uint8 for images in seen)


@pytest.mark.parametrize("kind", ["live", "recorded", "host"])
def test_eight_devices_change_nothing(data, live, kind):
    batch, output, variables, observed = data
    teacher = {"live": TEACHER, "recorded": recorded(TEACHER.spec), "host": on_host(lambda _: observed, TEACHER.spec)}
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))

    def put(leaf):
        split = PartitionSpec("data") if len(leaf) == BATCH else PartitionSpec()  # locations have no batch
        return jax.device_put(leaf, NamedSharding(mesh, split))

    arrays = jax.tree.map(put, (output, {**batch, "teacher": observed} if kind == "recorded" else batch))
    frozen = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    found = terms(Distiller(STUDENT, teacher[kind], METHODS), *arrays, frozen if kind == "live" else None)
    assert found == pytest.approx(live, rel=1e-4)


def test_a_teacher_with_nothing_but_a_neck(data, live):
    batch, output, variables, observed = data
    neck = Custom(
        spec=lambda image_size: taps.only(TEACHER.spec(image_size), ["neck"]),
        observe=lambda variables, batch: taps.only(observed, ["neck"]),
    )
    found = terms(Distiller(STUDENT, neck, [methods.cwd(), methods.mkd()]), output, batch, variables)
    assert found == pytest.approx({name: v for name, v in live.items() if "hinton" not in name}, rel=1e-5)
    with pytest.raises(UserError, match=r"^hinton: teacher: tap 'rows.logits': this model has no such tap.*neck"):
        Distiller(STUDENT, neck, [methods.hinton()]).init(jax.random.key(0), SIZE)


def test_crosskd_needs_a_teacher_with_a_head():
    Distiller(STUDENT, TEACHER, [methods.crosskd()]).init(jax.random.key(0), SIZE)
    with pytest.raises(UserError, match=r"^crosskd: the method reads the teacher's head, which this teacher does not"):
        Distiller(STUDENT, recorded(TEACHER.spec), [methods.crosskd()]).init(jax.random.key(0), SIZE)


def test_a_student_of_your_own_needs_an_assigner_where_one_is_read():
    student = Custom(spec=STUDENT.spec)
    with pytest.raises(UserError, match=r"^hinton: the method reads the student's assignment, which this student does"):
        Distiller(student, TEACHER, [methods.hinton()]).init(jax.random.key(0), SIZE)
    assert Distiller(student, TEACHER, [methods.mkd()]).init(jax.random.key(0), SIZE)["mkd"]


def test_spec_of_computes_nothing():
    calls = []

    def net(weight, images):
        calls.append(isinstance(images, jax.core.Tracer))
        return DetectorOutput(strides=(8,), neck=(images[:, ::8, ::8] * weight,))

    spec = spec_of(net, jax.ShapeDtypeStruct((), jnp.float32))
    assert spec((64, 32)).neck[0].shape == (1, 8, 4, 3) and calls == [True]


def test_a_file_of_detections_teaches_what_a_detector_with_these_detections_does(data):
    batch, output, variables, observed = data
    live = Distiller(STUDENT, TEACHER, [methods.teach_boxes(score_threshold=0.0)])
    found = TEACHER.decode(observed, batch["image_size"], pre_nms=1000, max_detections=100)
    batch = batch | {f"found_{name}": getattr(found, name) for name in ("boxes", "labels", "scores", "valid")}
    file = Distiller(STUDENT, from_file(), live.methods)
    assert file.init(jax.random.key(0), SIZE) == live.init(jax.random.key(0), SIZE)

    @quick_jit
    def both(batch, output):
        given = dict(key=jax.random.key(0), step=0)
        ours = file.terms({"teach_boxes": {}}, output, batch, (), **given)
        return ours, live.terms({"teach_boxes": {}}, output, batch, variables, **given)

    ours, theirs = both(batch, output)
    assert ours["teach_boxes/targets"] > 0 and ours["teach_boxes/soft"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, theirs)
    with pytest.raises(UserError, match="found_scores, found_labels missing: open the data with"):
        file.observe({name: batch[name] for name in batch if name not in ("found_scores", "found_labels")}, ())
    with pytest.raises(UserError, match="cwd: teacher: tap 'neck': this model has no such tap: its taps are none"):
        Distiller(STUDENT, from_file(), METHODS).init(jax.random.key(0), SIZE)
