"""States split over eight devices: the rule, equality with copies, messages, checkpoints, evaluation."""

import collections
import contextlib
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kdjax import data, detectors, sharding, weights
from kdjax.doctor import gradients, memory
from kdjax.doctor.findings import OK
from kdjax.training import checkpoint, checks, optim
from kdjax.training import config as settings
from kdjax.training import step as steps
from kdjax.training.run import run
from kdjax.training.setup import given, placed, prepare, resume, run_fingerprint
from tests.support.runs import random_teacher, stopped_in_step, tiny_config

# Few layers, so that programs for eight devices are compiled in seconds.
OPTIONS = dict(base_channels=8, neck_channels=32, head_channels=32)
# Small steps, so that rounding does not grow.
CHANGES = dict(student__detector="retinanet_r18", optimizer__name="sgd", optimizer__lr=2e-5, optimizer__warmup=0)
CHANGES |= {f"student__options__{name}": value for name, value in OPTIONS.items()}


def use(monkeypatch, count: int) -> None:
    monkeypatch.setattr(sharding, "make_mesh", lambda: sharding.mesh_of(jax.devices()[:count]))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher with a wider neck, so that the student has an adapter."""
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny_config(folder, teacher=None, **CHANGES)
    return random_teacher(folder, "retinanet_r18", config, **OPTIONS | dict(neck_channels=64))


def setup_of(folder, teacher, kind, **changes):
    config = tiny_config(folder, teacher=teacher, method="cwd", twin=False, sharding=kind, **CHANGES | changes)
    return prepare(config, data.open_dataset(config.data))


def leaves(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_largest_axis_that_the_devices_divide_is_split():
    shapes = dict(a=(3, 3, 64, 128), b=(128, 64), c=(64, 64), d=(1023,), e=(1024,), f=(3, 1023), g=(40, 77), h=())
    tree = {"params": {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}}
    tree["stats"] = tree["params"]
    split = {
        8: dict(a=(None, None, None, "data"), b=("data",), c=(None, "data"), e=("data",), g=("data",)),
        3: dict(a=(None, "data"), f=(None, "data")),
        1: {},
    }
    for count, expected in split.items():
        mesh = sharding.mesh_of(jax.devices()[:count])
        found = sharding.state_shardings(tree, mesh, "fsdp")
        assert {name: found["params"][name].spec for name in shapes} == {
            name: PartitionSpec(*expected.get(name, ())) for name in shapes
        }
        copies = [*found["stats"].values(), *jax.tree.leaves(sharding.state_shardings(tree, mesh, "replicated"))]
        assert all(one.is_fully_replicated and one.mesh == mesh for one in copies)


def test_a_device_holds_an_eighth_of_a_small_detector_s_state():
    """RTMDet-tiny with AdamW: 13.06 % on each device; what stays whole are small leaves, statistics and one kernel."""
    student, config = detectors.build("rtmdet_tiny", 80), settings.base()
    config.optimizer.warmup = 0
    optimizer = optim.optimizer(config, lambda params: jax.tree.map(lambda leaf: leaf.ndim <= 1, params))
    state = steps.init_state(student, jax.random.PRNGKey(0), None, {}, optimizer)
    placed = sharding.Layout(sharding.mesh_of(jax.devices()[:8]), "fsdp").put(state)
    held = collections.Counter()
    for leaf in jax.tree.leaves(placed):
        for part in leaf.addressable_shards:
            held[part.device] += part.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert set(held.values()) == {sharding.bytes_of_device(placed)} and len(held) == 8
    assert held[jax.devices()[0]] / whole == pytest.approx(0.1306, abs=5e-5)
    assert sharding.bytes_of_device(state) == whole
    large = {name for name, leaf in leaves(placed).items() if leaf.is_fully_replicated and leaf.size >= 1024}
    moments, stem = ("opt_state/0/mu/student", "opt_state/0/nu/student"), "backbone/stem/1/conv/kernel"
    # 3 x 3 x 12 x 12: eight divides none of its axes
    assert large == {f"{tree}/{stem}" for tree in ("params/student", "ema/params", *moments)}


def trained(setup, batches):
    """Totals of the student, states after all batches, and the compiled programs by name."""
    states, totals, compiled, flag = dict(setup.states), [], {}, sharding.spec_of_flag(setup.mesh)
    for batch in batches:
        arrays, before = placed(setup, batch), {role: steps.Step.changed(state) for role, state in states.items()}
        for role in states:
            arguments = given(setup, role, arrays)
            if role not in compiled:
                step, state = setup.steps[role], states[role]
                compiled[role] = [
                    step.gradients.lower(step.read(state), *arguments).compile(),
                    step.update.lower(step.changed(state), state.params, state.stats, flag).compile(),
                ]
            states[role], metrics = setup.steps[role](states[role], *arguments)
            totals.append({name: float(value) for name, value in metrics.items()})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # updated in place
    assert set(setup.programs.values()) == {1}
    [one] = setup.teachers
    seen = {name: arrays[name] for name in ("image", "image_size")}
    compiled["teacher"] = [one.observer.program.lower(one.variables, seen).compile()]
    return totals, states, {name: "\n".join(one.as_text() for one in made) for name, made in compiled.items()}


def messages(program: str) -> collections.Counter:
    """The collectives of a compiled program by kind, and by shape those that gather."""
    found = collections.Counter()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    for shapes, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", program):
        found[kind] += kind != "all-gather"
        if kind == "all-gather":
            found.update((kind, tuple(map(int, s.split(",")))) for s in re.findall(r"\w+\[([\d,]+)\]", shapes))
    return +found


def test_split_states_train_as_copies_do(folder, teacher, monkeypatch):
    """SGD, 4 steps, relative 1e-5. Beside what copies send, a step gathers each split parameter once, no activation."""
    use(monkeypatch, 8)
    copies, split = (setup_of(folder, teacher, kind) for kind in sharding.KINDS)
    assert copies.teachers[0].hash == split.teachers[0].hash
    with contextlib.closing(data.train_batches(copies.dataset, copies.config.data, batch_size=8, seed=0)) as loader:
        batches = [next(loader) for _ in range(4)]
    start = jax.device_get(copies.states)
    totals, one, alone = trained(copies, batches)
    others, eighth, shared = trained(split, batches)
    for a, b in zip(totals, others, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    expected = split.layout.shardings(eighth)
    for (name, leaf), where in zip(leaves(eighth).items(), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), name
    one, eighth, start = (leaves(sharding.gather(tree)) for tree in (one, eighth, start))
    for name in one:
        # Biases and means of norms start at 0 and are still tiny: they are compared with 0.1, their usual size.
        size = max(np.linalg.norm(one[name]), 0.1 * np.sqrt(one[name].size))
        assert np.linalg.norm(eighth[name] - one[name]) < 1e-5 * size, name
        change = np.linalg.norm(one[name] - start[name])
        if "/params/" in name and change > 1e-5:
            assert np.linalg.norm(eighth[name] - one[name]) < 0.02 * change, name

    held = {"student": split.states["student"].params, "teacher": split.teachers[0].variables}
    for program, tree in held.items():
        before, after = messages(alone[program]), messages(shared[program])
        parts = [x.shape for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated]
        more = after - before
        gathered = collections.Counter({key: n for key, n in more.items() if isinstance(key, tuple)})
        assert len(parts) > 20 and not gathered - collections.Counter(("all-gather", shape) for shape in parts)
        assert gathered.total() == len(parts) if program != "teacher" else gathered.total() > 10  # its head is not read
        # Each split gradient adds at most its sum of squares to the norm.
        assert {key for key in more if key not in gathered} <= {"all-reduce", "reduce-scatter"}
        assert more["all-reduce"] + more["reduce-scatter"] <= len(parts) * (program != "teacher")


def test_a_checkpoint_of_eight_devices_is_restored_on_others(folder, tmp_path, monkeypatch):
    """To the bit, on 1 and 2 devices, with copies and split, through a run's own `resume`."""
    use(monkeypatch, 8)
    config = tiny_config(folder, teacher=None, **CHANGES | dict(sharding="fsdp", optimizer__name="adamw"))
    setup = prepare(config, data.open_dataset(config.data))
    rng = np.random.default_rng(0)

    def drawn(leaf):
        value = rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else np.full(leaf.shape, 7)
        return value.astype(leaf.dtype)

    states = {role: jax.tree.map(drawn, state) for role, state in setup.states.items()}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=1)) as store:
        note = {"run": json.loads(json.dumps(run_fingerprint(setup))), "next_batch": 7}
        note["config"] = json.loads(setup.config.to_json())
        store.save(7, setup.layout.put(states), note)
        for count, kind in ((1, "fsdp"), (2, "fsdp"), (2, "replicated")):
            config.sharding = kind  # free to change, as the number of devices is
            other = setup._replace(layout=sharding.Layout(sharding.mesh_of(jax.devices()[:count]), kind))
            step, resumed, _ = resume(other, store)
            assert step == 7 and {len(leaf.devices()) for leaf in jax.tree.leaves(resumed.states)} == {count}
            for name, leaf in leaves(resumed.states).items():
                np.testing.assert_array_equal(leaf, leaves(states)[name], err_msg=name, strict=True)
            share = sharding.bytes_of_device(resumed.states) / sharding.bytes_of_device(states)
            assert (0.5 < share < 0.52) if (count, kind) == (2, "fsdp") else share == 1


def test_split_arrays_are_put_on_other_devices_and_fetched_whole():
    """Not a part in place of the whole."""
    mesh, value = sharding.mesh_of(jax.devices()[:8]), np.arange(2048.0, dtype=np.float32).reshape(64, 32)
    tree = sharding.Layout(mesh, "fsdp").put({"a": value, "b": np.float32(3)})
    assert tree["a"].addressable_data(0).shape == (8, 32)
    np.testing.assert_array_equal(sharding.gather(tree)["a"], value)
    for devices in (jax.devices()[:8], jax.devices()[2:4], jax.devices()[:1]):
        found = sharding.replicate(tree, sharding.mesh_of(devices))
        for leaf, expected in ((found["a"], value), (found["b"], 3)):
            assert leaf.sharding.device_set == set(devices) and leaf.is_fully_replicated
            np.testing.assert_array_equal(leaf.addressable_data(0), expected)
        again = sharding.replicate(found, sharding.mesh_of(devices))
        assert again["a"] is found["a"] and again["b"] is found["b"]
    assert sharding.from_every_host({"a": 1}) == [{"a": 1}]


@pytest.mark.slow
def test_a_split_run_is_checked_evaluated_and_ends_on_other_devices(folder, teacher, tmp_path, monkeypatch):
    """Stopped on eight devices, it goes on with copies on two, and agrees with a run that had copies all along."""

    def config(kind):
        changes = dict(sharding=kind, steps=10, optimizer__warmup=0, data__stage2__start=0, eval__every=5)
        changes["auto_weight__log"] = True
        return tiny_config(folder, teacher=teacher, method="cwd", **CHANGES | changes)

    use(monkeypatch, 8)
    with stopped_in_step(7):
        run(config("fsdp"), tmp_path / "split")
    use(monkeypatch, 2)
    results = run(config("replicated"), tmp_path / "split")
    assert run(config("replicated"), tmp_path / "copies")["student"]["params"] == results["student"]["params"]
    use(monkeypatch, 8)
    (tmp_path / "split" / "results.json").unlink()
    again = run(config("fsdp"), tmp_path / "split")  # evaluates the finished run
    for role in ("student", "twin", "teacher"):
        assert again[role]["AP"] == pytest.approx(results[role]["AP"], abs=1e-3)
    for role in ("student", "twin"):
        split, copies = (leaves(weights.load(tmp_path / name / role)[1:3]) for name in ("split", "copies"))
        for name in copies:
            size = max(np.linalg.norm(copies[name]), 0.1 * np.sqrt(copies[name].size))
            assert np.linalg.norm(split[name] - copies[name]) < 1e-5 * size, name


@pytest.mark.slow
def test_the_doctor_measures_split_states_as_it_does_copies(folder, teacher, monkeypatch):
    use(monkeypatch, 8)
    copies, split = (setup_of(folder, teacher, kind) for kind in sharding.KINDS)
    batch = checks.first_batch_with_objects(copies)
    checks.check_terms(split, batch)
    a, b = (
        gradients.measure_gradients(setup, batch, gradients.train_adapters(setup, batch)) for setup in (copies, split)
    )
    assert a.values == pytest.approx(b.values, rel=1e-4) and a.grad_norms == pytest.approx(b.grad_norms, rel=1e-4)
    assert a.score == pytest.approx(b.score, rel=1e-5)
    assert memory.check_memory(split, batch)[0].level == OK
