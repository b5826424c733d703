"""The trainer: exact resumption, the twin, devices, checkpoints, refusals. One tiny run serves most of it."""

import collections
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from kdjax import data, detectors, weights
from kdjax.detectors.api import flatten
from kdjax.methods import api
from kdjax.report import model_card
from kdjax.training import checkpoint, checks, loop, optim, outputs, run, sharding
from kdjax.training import config as settings
from kdjax.training import step as steps
from kdjax.training.log import Log
from kdjax.training.setup import load_detector, prepare
from tests.support.checkpoints import spoilt
from tests.support.data import small_folder

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def teacher_folder(folder):
    """A teacher with random weights and the class map of the scenes."""
    config = tiny_config(folder, teacher=None)
    classes = data.open_dataset(config.data).classes
    detector = detectors.build("rtmdet_pico", len(classes))
    params, stats = detector.init(jax.random.PRNGKey(99))
    weights.save(folder / "teacher", detector, params, stats, classes=list(classes), image_size=(64, 64))
    return folder / "teacher"


def tiny_config(folder, *, teacher, method: str = "mkd") -> ConfigDict:
    config = settings.base()
    config.update(dict(batch_size=8, steps=STEPS, log_every=5, compile_cache=str(ROOT / ".cache" / "jax")))
    config.student.detector = "rtmdet_pico"
    config.data.update(dict(cache=str(folder / "cache"), scenes_train=24, scenes_val=10, image_size=(64, 64)))
    config.data.augment.update(dict(mosaic=True, mixup=0.5, cache=8))
    config.data.stage2.start = STEPS // 2
    config.optimizer.update(dict(warmup=4, lr=0.002))
    config.eval.batch_size = 8
    config.checkpoint.every = 5
    if teacher is not None:
        config.teacher.weights = str(teacher)
        config.methods = settings.methods(method)
        config.twin = True
    return config


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """Programs for eight devices take twice as long to compile; one test below compares the two."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
        yield


@pytest.fixture(scope="session")
def finished(folder, teacher_folder):
    """(workdir, results, how often each program was traced) of an uninterrupted run with teacher and twin."""
    workdir = folder / "whole"
    finish, traced = outputs.finish, {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            outputs, "finish", lambda setup, *rest: (finish(setup, *rest), traced.update(setup.programs))[0]
        )
        return workdir, run.run(tiny_config(folder, teacher=teacher_folder), workdir), traced


def arrays(workdir: Path, role: str) -> dict:
    _, params, stats, _ = weights.load(workdir / role)
    return checkpoint.flat({"params": params, "stats": stats})


def assert_equal_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_workdir_holds_what_a_user_takes_away(finished):
    workdir, results, _ = finished
    assert (
        set(results)
        == {"teacher", "twin", "student", "gain"}
        == set(json.loads((workdir / "results.json").read_text()))
    )
    metrics = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}
    for role in ("teacher", "twin", "student"):
        assert set(results[role]) == metrics | {"params", "flops"}
        assert all(-1 <= results[role][name] <= 1 for name in metrics)
    assert set(results["gain"]) == metrics
    assert results["student"]["params"] == results["twin"]["params"] > 100_000
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [5, 10, 15, 20]
    assert {f"student/mkd/{t}" for t in ("feature", "multiscale", "frequency", "alignment")} <= trained[0].keys()
    logged = {"twin/loss_cls", "twin/loss_box", "student/loss_cls", "lr", "images_per_s", "wait_share"}
    assert logged | {"decoded_per_image"} <= trained[0].keys()
    assert not any(name.startswith("twin/mkd") for name in trained[0])
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["methods"]["mkd"]["zeta"] == 0.5 and config["runs"][0]["jax"] == jax.__version__
    assert "<html" in (workdir / "report.html").read_text()[:200].lower()
    detector, *_, classes = weights.load(workdir / "student")
    assert detector.name == "rtmdet_pico" and len(classes) == detector.num_classes
    assert list((workdir / "tensorboard").iterdir())


def test_a_model_card_says_where_the_weights_come_from(finished, teacher_folder):
    workdir, results, _ = finished
    texts = {role: (workdir / role / "README.md").read_text() for role in ("student", "twin")}
    for role, text in texts.items():
        _, header, body = text.split("---\n", 2)
        [entry] = yaml.safe_load(header)["model-index"]
        [metric] = entry["results"][0]["metrics"]
        assert metric["value"] == pytest.approx(results[role]["AP"], abs=1e-4)
        _, params, stats, classes = weights.load(workdir / role)
        assert f"hash of the weights: {checkpoint.fingerprint(steps.Teacher(params, stats))}" in body
        assert f"classes: {', '.join(classes)}" in body and f"- jax: {jax.__version__}" in body
        assert "data, train: scenes, split `train`: 24 images" in body and "seed 0" in body
        assert "20 steps of 8 images" in body and "claims no rights" in body
    student = texts["student"]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", student, re.MULTILINE))
    assert rows["AP"].split(" | ") == [
        *(f"{100 * results[role]['AP']:.1f}" for role in ("teacher", "twin", "student")),
        f"{100 * results['gain']['AP']:+.1f}",
    ]
    assert rows["params"].split(" | ")[1] == f"{results['student']['params']:,}"
    of_teacher = checkpoint.fingerprint(steps.Teacher(*weights.load(teacher_folder)[1:3]))
    assert f"weights `{teacher_folder}`, hash {of_teacher}" in student
    assert "method mkd: weight 1.0; other options at their defaults" in student and "the teacher's weights" in student
    assert "- teacher" not in texts["twin"] and "- method" not in texts["twin"] and "gain" not in texts["twin"]


def test_the_card_names_the_licences_that_the_data_names():
    config = settings.base()
    config.data.source = "coco_folder"
    told = model_card._licence(("CC BY 4.0, https://example.org",), config, distilled=False)
    assert "- CC BY 4.0, https://example.org\n" in told and "teacher" not in told
    assert "names no licence" in model_card._licence((), config, distilled=False)


def test_five_steps_and_the_rest_equal_all_at_once_to_the_bit(finished, folder, teacher_folder, monkeypatch):
    """The run is stopped by a signal at an odd step, and resumed by the same call."""
    workdir = folder / "resumed"
    config = tiny_config(folder, teacher=teacher_folder)
    place, placed = sharding.shard_batch, iter(range(10**6))

    def stop_in_step_seven(*args):
        if next(placed) == 7:  # the first batch goes to the check of the terms
            signal.raise_signal(signal.SIGTERM)
        return place(*args)

    with monkeypatch.context() as patched:
        patched.setattr(sharding, "shard_batch", stop_in_step_seven)
        with pytest.raises(loop.Stopped, match="step 7 of 20"):
            run.run(config, workdir)
    assert not (workdir / "results.json").exists()
    results = run.run(config, workdir)
    assert results == finished[1]
    for role in ("student", "twin"):
        assert_equal_bits(arrays(workdir, role), arrays(finished[0], role))


def test_twin_is_a_supervised_run_to_the_bit(finished, folder, monkeypatch):
    """On the way it shows that no state is saved before the metrics of its steps have been looked at."""
    check_finite, save, seen, saved = loop.check_finite, checkpoint.Checkpoints.save, [], []

    def check(step, metrics):
        seen.append(step)
        return check_finite(step, metrics)

    def save_seen(self, step, *rest):
        saved.append((step, seen[-1]))
        return save(self, step, *rest)

    monkeypatch.setattr(loop, "check_finite", check)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_seen)
    config = tiny_config(folder, teacher=None)
    config.checkpoint.every = 7
    results = run.run(config, folder / "alone")
    assert saved == [(7, 7), (14, 14), (20, 20)]
    assert results["teacher"] is results["twin"] is results["gain"] is None
    assert results["student"] == finished[1]["twin"]
    assert_equal_bits(arrays(folder / "alone", "student"), arrays(finished[0], "twin"))


def test_one_trace_a_program_in_twenty_steps(finished):
    assert finished[2] == {"student": 1, "twin": 1, "predict_student": 1, "predict_teacher": 1}


def test_eight_devices_equal_one(folder, teacher_folder):
    """SGD, 4 steps, relative 1e-5: batch statistics, counts and gradients are those of the global batch."""
    config = tiny_config(folder, teacher=teacher_folder)
    dataset = data.open_dataset(config.data)
    detector, *variables, _ = weights.load(teacher_folder)
    student = detectors.build("rtmdet_pico", len(dataset.classes))
    method = {"mkd": api.build("mkd", normalize="pkd")}
    key = jax.random.PRNGKey(0)
    spec = student.spec((64, 64))
    optimizer = optax.sgd(1e-4)  # small: an assigner that tips over is no matter of devices
    update = steps.make_step(student, optimizer, lambda at: 0.1, teacher=detector, methods=method)
    batches = data.train_batches(dataset, config.data, batch_size=8, seed=0)
    batches = [next(batches) for _ in range(4)]

    def outcome(devices):
        mesh = Mesh(np.array(devices), ("data",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        state = steps.init_state(student, key, None, steps.init_adapters(method, key, spec, spec), optimizer)
        state, frozen = jax.device_put((state, steps.Teacher(*variables)), everywhere)
        program = jax.jit(update, donate_argnums=0, out_shardings=everywhere)
        program = program.lower(state, frozen, sharding.shard_batch(mesh, batches[0])).compile()
        totals = []
        for batch in batches:
            state, metrics = program(state, frozen, sharding.shard_batch(mesh, batch))
            totals.append(float(metrics["total"]))
        return totals, checkpoint.flat(state), program.as_text()

    (totals, one, alone), (others, eight, spread) = outcome(jax.devices()[:1]), outcome(jax.devices())
    assert not messages(alone)
    # A norm of the student adds up two sums forward and two backward; losses and one group of gradients are the rest.
    norms = sum(name.startswith("stats") and name.endswith("mean") for name in one)
    sent = messages(spread)
    assert norms > 50 and sent.pop("all-reduce") <= 4 * norms + 10
    sent.pop("all-gather of reduce")  # of the CPU's depthwise form alone (kdjax/nn/conv_cpu.py)
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12):  # since then XLA transforms a spread batch in place
        sent.pop("all-gather of fft")
    assert not sent
    np.testing.assert_allclose(others, totals, rtol=1e-5)
    start = checkpoint.flat(
        steps.init_state(student, key, None, steps.init_adapters(method, key, spec, spec), optimizer)
    )
    for name in one:
        # Norm biases and means start at 0 and are still tiny: 0.1, the usual size, is their measure.
        size = max(np.linalg.norm(one[name]), 0.1 * np.sqrt(one[name].size))
        assert np.linalg.norm(eight[name] - one[name]) < 1e-5 * size, name
        learnt = np.linalg.norm(one[name] - start[name])
        if name.startswith("params") and learnt > 1e-5:
            assert np.linalg.norm(eight[name] - one[name]) < 0.02 * learnt, name


def messages(program: str) -> collections.Counter:
    """What devices send each other in a compiled program: all-reduces, and other kinds with what they are for."""
    sent = collections.Counter()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for kind, rest in re.findall(rf" ({kinds})(?:-start)?\((.*)", program):
        source = re.search(r'op_name="[^"]*/(\w+)"', rest)
        sent[kind if kind == "all-reduce" else f"{kind} of {source and source.group(1)}"] += 1
    return sent


def test_a_step_that_is_not_finite_changes_nothing(finished, folder, teacher_folder):
    config = tiny_config(folder, teacher=teacher_folder)
    dataset = data.open_dataset(config.data)
    setup = prepare(config, dataset)
    state = setup.states["twin"]
    poisoned = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan) if x.ndim == 4 else x, state.params)
    before = checkpoint.flat(state._replace(params=poisoned))
    batch = sharding.shard_batch(setup.mesh, checks.first_batch_with_objects(setup))
    after, metrics = setup.steps["twin"](state._replace(params=poisoned), None, batch)
    after = checkpoint.flat(after)
    assert after.pop("step") == 1 and before.pop("step") == 0
    assert_equal_bits(after, before)
    with pytest.raises(FloatingPointError, match="twin/loss_.*step 3"):
        loop.check_finite(3, {f"twin/{name}": value for name, value in metrics.items()})


def test_damaged_checkpoint_falls_back_to_the_one_before(finished, folder, tmp_path):
    tree = {"a": np.random.default_rng(0).normal(size=100_000), "b": {"c": np.ones(3, np.int32)}}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    for at in (1, 2):
        store.save(at, {"a": tree["a"] * at, "b": tree["b"]}, {"next_batch": at})
    store.close()
    largest = max((tmp_path / "2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    largest.write_bytes(damaged)
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    restored, note = store.restore(tree)
    assert note["next_batch"] == 1 and store.latest() == 1
    np.testing.assert_array_equal(restored["a"], tree["a"])
    store.close()


@pytest.mark.parametrize("part", ["note", "state"])
def test_a_checkpoint_of_which_a_part_is_cut_off_is_passed_over(tmp_path, part):
    tree = {"a": np.arange(10_000.0)}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    for at in (1, 2):
        store.save(at, {"a": tree["a"] * at}, {"next_batch": at})
    store.close()
    for at, left in ((2, 1), (1, None)):
        for path in (tmp_path / str(at) / part).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        store = checkpoint.Checkpoints(tmp_path, keep=3)
        if left:
            assert store.note()["next_batch"] in (1, 2) and store.restore(tree)[1]["next_batch"] == left
        else:
            with pytest.raises(ValueError, match="no checkpoint in .* can be used"):
                store.note()
                store.restore(tree)
        store.close()


def wrong(folder, teacher_folder, **changes):
    config = tiny_config(folder, teacher=teacher_folder)
    with config.unlocked():
        for name, value in changes.items():
            *parents, leaf = name.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            node[leaf] = value
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(optimzer=1), "config.optimzer is no setting"),
        (dict(data__augment__flipp=1.0), "config.data.augment.flipp is no setting"),
        (dict(methods__mkdd=ConfigDict()), "no method 'mkdd'.*mkd.*rtmdet_cwd"),
        (dict(methods__mkd__wieght=1.0), "no option 'wieght'.*weight"),
        (dict(methods__mkd__student="neckk"), "no tap 'neckk'.*neck.*cls_tower"),
        (dict(methods__mkd__zeta=2.0), "zeta.*0 .. 1"),
        (dict(methods__mkd__weight=0.0), "config.methods.mkd would do nothing"),
        (dict(student__detector=""), "no student.*rtmdet_tiny"),
        (dict(student__detector="rtmdet_huge"), "rtmdet_huge.*rtmdet_tiny"),
        (dict(teacher__weights="/nowhere"), "/nowhere"),
        (dict(teacher__detector="rtmdet_s"), "rtmdet_pico"),
        (dict(teacher__weights=""), "no teacher"),
        (dict(data__image_size=(60, 64)), "60x64.*multiples of 32"),
        (dict(data__source="coco"), "coco"),
        (dict(batch_size=0), "batch_size is 0; it must be at least 1"),
        (dict(steps=0), "steps is 0; it must be at least 1"),
        (dict(seed=-1), "seed is -1; it must be in 0 .. 4294967295"),
        (dict(log_every=0), "log_every"),
        (dict(checkpoint__every=0), "checkpoint.every"),
        (dict(eval__batch_size=0), "eval.batch_size"),
        (dict(data__scenes_train=0), "data.scenes_train"),
        (dict(data__max_boxes=-5), "data.max_boxes"),
        (dict(optimizer__lr=float("nan")), "optimizer.lr is nan"),
        (dict(optimizer__end=1.5), "optimizer.end is 1.5; it must be in 0 .. 1"),
        (dict(data__image_size=(64,)), "config.data: image_size must be .height, width. .*, not .64,."),
        (dict(data__augment__flip=2.0), "augment.flip"),
        (dict(optimizer__warmup=11), "warm-up"),
        (dict(optimizer__name="adam"), "adamw"),
        (dict(methods=ConfigDict()), "no method"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence_before_training(folder, teacher_folder, tmp_path, changes, words):
    with pytest.raises(run.BadInput, match=words) as caught:
        run.run(wrong(folder, teacher_folder, **changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("empty", ["train", "val"])
def test_a_split_without_objects_is_refused(folder, tmp_path, empty):
    """Also where nothing is distilled: a detector would learn that there is nothing to see."""
    root = small_folder(tmp_path / "set")
    path = root / "annotations" / f"instances_{empty}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    config = tiny_config(folder, teacher=None)
    config.data.update(dict(source="coco_folder", root=str(root)))
    words = {
        "train": "the first 100 batches of the training data hold no",
        "val": "validation split 'val' of set holds no",
    }
    with pytest.raises(run.BadInput, match=words[empty]):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_config_that_lacks_a_setting_is_refused(folder, tmp_path):
    config = tiny_config(folder, teacher=None)
    del config.optimizer.clip_norm
    with pytest.raises(run.BadInput, match="config.optimizer.clip_norm is missing"):
        run.run(config, tmp_path)


def test_class_map_of_the_teacher_must_fit(folder, teacher_folder, tmp_path):
    detector, params, stats, classes = weights.load(teacher_folder)
    classes = ["zebra", *classes[1:]]
    weights.save(tmp_path / "other", detector, params, stats, classes=classes, image_size=(64, 64))
    with pytest.raises(run.BadInput, match="class map of the teacher.*unknown to the teacher"):
        run.run(wrong(folder, teacher_folder, teacher__weights=str(tmp_path / "other")), tmp_path / "run")


def test_a_teacher_of_another_number_of_classes_is_refused(folder, teacher_folder, tmp_path):
    """A PyTorch file does not name its classes; classifiers that start anew would teach noise."""
    detector = detectors.build("rtmdet_pico", 80)
    np.savez(tmp_path / "coco.npz", **weights.to_torch(detector, *detector.init(jax.random.PRNGKey(0))))
    changes = dict(teacher__weights=str(tmp_path / "coco.npz"), teacher__detector="rtmdet_pico")
    with pytest.raises(run.BadInput, match="coco.npz: the weights are for 80 classes, but 6 are needed"):
        run.run(wrong(folder, teacher_folder, **changes), tmp_path / "run")


def test_spoilt_weights_of_a_teacher_are_refused(folder, teacher_folder, tmp_path):
    told = spoilt(tmp_path, {"bbox_head.rtm_cls.0.bias": np.zeros(6)})
    for name in sorted(name for name in told if name.startswith(("pickle", "code"))):
        changes = dict(teacher__weights=str(tmp_path / name), teacher__detector="rtmdet_pico")
        with pytest.raises(run.BadInput, match=name) as caught:
            run.run(wrong(folder, teacher_folder, **changes), tmp_path / "run")
        assert told[name] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_of_another_detector_get_one_line(folder, teacher_folder, tmp_path):
    detector = detectors.build("rtmdet_nano", 6)
    np.savez(tmp_path / "nano.npz", **weights.to_torch(detector, *detector.init(jax.random.PRNGKey(0))))
    changes = dict(teacher__weights=str(tmp_path / "nano.npz"), teacher__detector="rtmdet_pico")
    with pytest.raises(run.BadInput, match="do not fit rtmdet_pico.*; and [0-9]+ more$") as caught:
        run.run(wrong(folder, teacher_folder, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_dry_run_needs_no_teacher_and_no_workdir(folder, capsys):
    config = tiny_config(folder, teacher="")
    config.data.check = True
    assert run.run(config, "/nowhere/x") is None
    assert "disc" in capsys.readouterr().out


def test_a_student_may_start_from_weights_of_other_classes(folder, teacher_folder, tmp_path):
    """Fine-tuning: everything is taken over but the classifiers, and a warning says so."""
    dataset, key = data.open_dataset(tiny_config(folder, teacher=None).data), jax.random.PRNGKey(0)
    fresh = flatten(detectors.build("rtmdet_pico", len(dataset.classes)).init(key)[0])
    for classes in (["zebra", *dataset.classes[1:]], ["zebra"]):
        detector = detectors.build("rtmdet_pico", len(classes))
        params, stats = detector.init(jax.random.PRNGKey(99))
        weights.save(tmp_path, detector, params, stats, classes=classes, image_size=(64, 64))
        chosen = ConfigDict(dict(detector="rtmdet_pico", options={}, weights=str(tmp_path)))
        with pytest.warns(UserWarning, match="classifiers of rtmdet_pico are re-initialised"):
            started, (found, _) = load_detector("student", chosen, dataset, key)
        assert started.num_classes == len(dataset.classes)
        old = flatten(params)
        for path, value in flatten(found).items():
            np.testing.assert_array_equal(value, (fresh if "rtm_cls" in path else old)[path], err_msg=path)


def test_a_term_without_effect_is_named(folder, teacher_folder, tmp_path):
    """A mask that drops every frequency leaves the student no gradient: the run must not start."""
    with pytest.raises(run.BadInput, match="mkd/frequency.*gradient of size 0"):
        run.run(wrong(folder, teacher_folder, methods__mkd__zeta=1.0), tmp_path)


def test_a_setting_newer_than_the_run_is_at_its_default(folder, tmp_path):
    config = tiny_config(folder, teacher=None)
    written = json.loads(config.to_json())
    del written["data"]["stage2"]["augment"], written["eval"]["limit"], written["optimizer"]["clip_norm"]
    (tmp_path / "config.json").write_text(json.dumps({"config": written}))
    checks.check_workdir(config, tmp_path)
    config.optimizer.clip_norm = 1.0
    with pytest.raises(ValueError, match="optimizer.clip_norm was 0.0, is 1.0"):
        checks.check_workdir(config, tmp_path)


def test_workdir_of_another_run_is_refused(finished, folder, teacher_folder):
    with pytest.raises(run.BadInput, match="other settings.*seed was 0, is 1"):
        run.run(wrong(folder, teacher_folder, seed=1), finished[0])


@pytest.mark.parametrize("changed", ["data", "teacher", "options"])
def test_a_run_is_not_resumed_with_other_data_or_another_teacher(finished, folder, teacher_folder, tmp_path, changed):
    """Under the same settings: a folder whose content has been replaced."""
    config = wrong(folder, teacher_folder)
    if changed == "data":
        config.data.scenes_train += 1  # the workdir's config.json is not copied, so only the checkpoint knows
    elif changed == "options":  # that change no shape
        config.student.options.exp_on_reg = False
    else:
        detector, params, stats, classes = weights.load(teacher_folder)
        params = jax.tree.map(lambda leaf: leaf + 1e-3, params)
        weights.save(tmp_path / "teacher", detector, params, stats, classes=classes, image_size=(64, 64))
        config.teacher.weights = str(tmp_path / "teacher")
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(run.BadInput, match=f"of another run: its {changed} is"):
        run.run(config, tmp_path / "run")


def test_workdir_that_cannot_be_used_is_refused(folder, teacher_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(run.BadInput, match="--workdir=.*file/run cannot be made .Not a directory"):
        run.run(wrong(folder, teacher_folder), tmp_path / "file" / "run")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(run.BadInput, match="config.json is not the config of a run"):
        run.run(wrong(folder, teacher_folder), tmp_path)


def test_checkpoint_of_another_detector_is_refused(finished, folder, teacher_folder, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    config = wrong(folder, teacher_folder, student__detector="rtmdet_nano")
    with pytest.raises(run.BadInput, match="another run: its student is 'rtmdet_pico', this run's is 'rtmdet_nano'"):
        run.run(config, tmp_path)


def test_the_command_line_answers_with_a_sentence_and_an_exit_code(folder):
    def call(*flags):
        command = [sys.executable, "train.py", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    for flags, words in (
        (["--config=configs/quickstart.py", "--workdir=/nowhere/x", "--config.stepz=3"], "stepz"),
        (["--config=configs/quickstart.py:mkdd", "--workdir=/nowhere/x"], "no method 'mkdd'"),
        (["--config=configs/missing.py", "--workdir=/nowhere/x"], "missing.py"),
        (["--config=configs/quickstart.py", "--workdir=/nowhere/x", "--config.data.source=coco_folder"], "root"),
    ):
        done = call(*flags)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("train.py: ")]) == 1, done.stderr


def test_a_half_written_line_is_cut_off(tmp_path):
    with Log(tmp_path, 0) as log:
        assert log.rows() == []
        log.write(1, "train", {"lr": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "ki')
    with Log(tmp_path, 1) as log:
        log.write(2, "train", {"lr": 0.25})
        assert [(row["step"], row["lr"]) for row in log.rows()] == [(1, 0.5), (2, 0.25)]


def test_learning_rate_and_moving_average():
    config = settings.base()
    config.update(dict(batch_size=64, steps=1000))
    config.optimizer.warmup = 100
    rate = optim.learning_rate(config)
    full = 0.004 * 64 / 256
    for at, share in ((0, 1e-5), (50, 0.500005), (100, 1), (500, 1), (750, 0.525), (1000, 0.05)):
        assert float(rate(at)) == pytest.approx(share * full, rel=2e-3), at
    for at in (0, 100, 5000, 10**6):
        assert float(optim.ema_rate(config, at)) == pytest.approx(
            (1 - 2e-4) * np.exp(-(1 + at) / 2000) + 2e-4, rel=1e-4
        )


def test_data_that_is_damaged_while_it_trains_gets_a_sentence(folder, tmp_path, monkeypatch):
    def train(*_):
        raise data.Damaged("DIR: record 3 cannot be read: prepare the data again")

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(run.BadInput, match="DIR: record 3"):  # train.py prints it and exits with 2
        run.run(tiny_config(folder, teacher=None), tmp_path / "run")


def test_weight_decay_leaves_norms_and_biases_alone():
    config = settings.base()
    config.optimizer.update(dict(lr=0.1, warmup=0))
    detector = detectors.build("rtmdet_pico", 2)
    params, _ = detector.init(jax.random.PRNGKey(0))
    optimizer = optim.optimizer(config, detector.no_decay)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda zeros, params: optimizer.update(zeros, optimizer.init(params), params))(zeros, params)
    for name, update in checkpoint.flat(updates).items():
        leaf = checkpoint.flat(params)[name]
        np.testing.assert_allclose(update, -0.1 * 0.05 * leaf if leaf.ndim > 1 else 0 * leaf, atol=1e-9, err_msg=name)
