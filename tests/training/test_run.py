"""Whole runs: their outputs, exact resumption, the twin, refusals to resume. One tiny run serves most of it."""

import collections
import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import Mesh

from kdjax import data, detectors, files, methods, sharding, weights
from kdjax.distill import Distiller
from kdjax.errors import UserError
from kdjax.report import model_card
from kdjax.training import checkpoint, checks, outputs, updates
from kdjax.training import config as settings
from kdjax.training import run as training
from kdjax.training import step as steps
from kdjax.training.run import run
from kdjax.training.setup import prepare
from kdjax.weights.checkpoint import fingerprint
from tests.faults.config import DETECTOR
from tests.support.data import small_folder
from tests.support.models import TRANSFORMERS
from tests.support.runs import random_teacher, stopped_in_step, tiny_config
from tests.support.trackers import ENVIRONMENT, Mlflow, Wandb, logged, of_mlflow, of_wandb

TWO_STAGES = dict(base_channels=4, neck_channels=8, head_channels=16, proposals=20, region_samples=12, rpn_samples=16)


TOOLS = {"wandb": Wandb(), "mlflow": Mlflow()}  # stand-ins that the run `finished` tells
COMPILED = collections.Counter()  # how often XLA was asked for each program of the run `finished`


def count_compiled(event, *_, fun_name="", **__):
    COMPILED[fun_name] += event.endswith("backend_compile_duration")


@pytest.fixture(scope="module")
def finished(folder, teacher_folder):
    """(workdir, results, how often each program was traced) of an uninterrupted run with teacher and twin."""
    workdir = folder / "whole"
    finish, traced = outputs.finish, {}
    config = tiny_config(folder, teacher=teacher_folder)
    config.log.to = ("tensorboard", "wandb", "mlflow")
    with pytest.MonkeyPatch.context() as patched:
        for name, tool in TOOLS.items():
            patched.setitem(sys.modules, name, tool.module)
        patched.setitem(sys.modules, "mlflow.exceptions", TOOLS["mlflow"].exceptions)
        for name in ENVIRONMENT:  # what the code sets is undone afterwards
            patched.setenv(name, "")
            patched.delenv(name)
        patched.setattr(
            outputs, "finish", lambda setup, *rest: (finish(setup, *rest), traced.update(setup.programs))[0]
        )
        jax.monitoring.register_event_duration_secs_listener(count_compiled)
        results = run(config, workdir)
        jax.monitoring.unregister_event_duration_listener(count_compiled)
        return workdir, results, traced


def arrays(workdir: Path, role: str) -> dict:
    _, params, stats, _ = weights.load(workdir / role)
    return checkpoint.flat({"params": params, "stats": stats})


def assert_equal_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_outputs_of_a_run(finished):
    workdir, results, _ = finished
    assert (
        set(results)
        == {"teacher", "twin", "student", "gain"}
        == set(json.loads((workdir / "results.json").read_text())) - {"sha256"}
    )
    metrics = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}
    for role in ("teacher", "twin", "student"):
        assert set(results[role]) == metrics | {"params", "flops"}
        assert all(-1 <= results[role][name] <= 1 for name in metrics)
    assert set(results["gain"]) == metrics
    counted = sum(leaf.size for leaf in jax.tree.leaves(weights.load(workdir / "student")[1]))
    assert results["student"]["params"] == results["twin"]["params"] == counted > 50_000
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [5, 10, 15, 20]
    assert {f"student/mkd/{t}" for t in ("feature", "multiscale", "frequency", "alignment")} <= trained[0].keys()
    logged = {"twin/loss_cls", "twin/loss_box", "student/loss_cls", "lr", "images_per_s", "wait_share"}
    assert logged | {"decoded_per_image"} <= trained[0].keys()
    assert not any(name.startswith("twin/mkd") for name in trained[0])
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["methods"]["mkd"]["zeta"] == 0.5 and config["runs"][0]["jax"] == jax.__version__
    assert len(config["runs"][0]["data"]) == 64
    assert "<html" in (workdir / "report.html").read_text()[:200].lower()
    detector, *_, classes = weights.load(workdir / "student")
    assert detector.name == DETECTOR and len(classes) == detector.num_classes
    assert list((workdir / "tensorboard").iterdir())


def test_trackers_hold_lines_detections_and_the_student(finished):
    workdir, results, _ = finished
    [at_wandb], [at_mlflow] = (tool.runs.values() for tool in TOOLS.values())
    assert of_wandb(at_wandb) == of_mlflow(at_mlflow) == logged(workdir)
    [number] = [number for number, one in at_wandb.rows.items() if "detections" in one]
    assert at_wandb.rows[number]["eval/student/AP"] == results["student"]["AP"]
    [(name, sheet)] = at_mlflow.images.items()
    assert name == "detections/step_00000020.png" and sheet.shape[1] == 4 * 320 + 3 * 8 and sheet.std() > 5
    files = sorted(path.name for path in (workdir / "student").iterdir())
    assert at_mlflow.models == [("student", files)] and [one.files for one in at_wandb.models] == [files]
    assert (at_wandb.code, at_mlflow.status) == (0, "FINISHED")


def test_a_model_card_names_data_teacher_and_hashes(finished, teacher_folder):
    workdir, results, _ = finished
    texts = {role: (workdir / role / "README.md").read_text() for role in ("student", "twin")}
    for role, text in texts.items():
        _, header, body = text.split("---\n", 2)
        [entry] = yaml.safe_load(header)["model-index"]
        values = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
        assert values == {name: round(results[role][name], 4) for name in ("AP", "AP50", "AP75")}
        _, params, stats, classes = weights.load(workdir / role)
        assert f"hash of the weights: {fingerprint(steps.TeacherVariables(params, stats))}" in body
        assert f"classes: {', '.join(classes)}" in body and f"- jax: {jax.__version__}" in body
        assert "data, train: scenes, split `train`: 24 images" in body and "seed 0" in body
        assert "20 steps of 8 images" in body and "claims no rights" in body
        assert (re.search(r"without the teacher\. It reaches AP \d+\.\d\.", body) is not None) == (role == "twin")
    student = texts["student"]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", student, re.MULTILINE))
    assert rows["AP"].split(" | ") == [
        *(f"{100 * results[role]['AP']:.1f}" for role in ("teacher", "twin", "student")),
        f"{100 * results['gain']['AP']:+.1f}",
    ]
    assert rows["params"].split(" | ")[1] == f"{results['student']['params']:,}"
    of_teacher = fingerprint(steps.TeacherVariables(*weights.load(teacher_folder)[1:3]))
    assert f"weights `{teacher_folder}`, hash {of_teacher}" in student
    assert "method mkd: weight 1.0; other options at their defaults" in student and "the teacher's weights" in student
    assert "- teacher" not in texts["twin"] and "- method" not in texts["twin"] and "gain" not in texts["twin"]


@pytest.mark.user_input(
    "COCO json", "HTML and Markdown in names of classes and licences", "read as plain text in the model card"
)
def test_names_of_others_are_plain_text_in_a_model_card():
    """A class, a folder or a licence may contain HTML and Markdown."""
    text = model_card._plain("<script>a</script> [b](http://c) `d` *e* f|g & h\n# i")
    assert text == (r"&lt;script&gt;a&lt;/script&gt; \[b\](http://c) \`d\` \*e\* f\|g &amp; h # i")
    assert model_card._code("a`b\n<c>") == "`a b <c>`"
    config = settings.base()
    config.data.source = "coco_folder"
    assert "- &lt;img src=x&gt;\n" in model_card._licence(("<img src=x>",), config, distilled=False)


def test_a_model_card_names_the_licences_of_the_data():
    config = settings.base()
    config.data.source = "coco_folder"
    text = model_card._licence(("CC BY 4.0, https://example.org",), config, distilled=False)
    assert "- CC BY 4.0, https://example.org\n" in text and "teacher" not in text
    assert "names no licence" in model_card._licence((), config, distilled=False)


@pytest.mark.user_input(
    "The machine", "a full disk while results are written", "reported: the other results are written"
)
def test_outputs_that_cannot_be_written_do_not_lose_the_others(finished, folder, teacher_folder, tmp_path, monkeypatch):
    """Of a finished run, whose same command evaluates it again."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for name in ("results.json", "per_class.json", "report.html", "student", "twin", "detections"):
        shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
    (workdir / "metrics.jsonl").write_bytes(b"\n".join([lines[0].replace(b"{", b"\xff", 1), *lines[1:]]))
    replace = Path.replace

    def full(self, target):
        if Path(target).name in ("per_class.json", "README.md"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError) as caught:
        run(tiny_config(folder, teacher=teacher_folder), workdir)
    monkeypatch.undo()
    failed = [workdir / name for name in ("student/README.md", "twin/README.md", "per_class.json")]
    assert str(caught.value) == (
        "; ".join(f"{path}: the disk is full: make room" for path in failed)
        + "; the other results are written: run the same command again"
    )
    assert json.loads((workdir / "results.json").read_text()) == files.sealed(finished[1])
    for role in ("student", "twin"):
        assert_equal_bits(arrays(workdir, role), arrays(finished[0], role))
    assert "Lines of metrics.jsonl that are damaged and left out: 1." in (workdir / "report.html").read_text()
    assert not list(workdir.rglob("*.tmp"))


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a run that SIGTERM stopped", "survived: the same command resumes it, to the bit"
)
@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(finished, folder, teacher_folder, capsys):
    """A signal stops the run at an odd step; the same call resumes it."""
    workdir = folder / "resumed"
    config = tiny_config(folder, teacher=teacher_folder)
    with stopped_in_step(7):
        run(config, workdir)
    assert not (workdir / "results.json").exists()
    capsys.readouterr()
    results = run(config, workdir)
    assert results == finished[1]
    told = capsys.readouterr().out
    assert f"{workdir}: continuing at step 7\n" in told
    assert re.search(rf"\nThe distilled student reaches AP .*\n{workdir / 'report.html'}\n$", told)
    for role in ("student", "twin"):
        assert_equal_bits(arrays(workdir, role), arrays(finished[0], role))


def test_twin_is_a_supervised_run_to_the_bit(finished, folder, monkeypatch):
    """Also, no state is saved before the metrics of its steps have been checked."""
    check_finite, save, checked, saved = updates.check_finite, checkpoint.Checkpoints.save, [], []

    def check(step, *rest):
        checked.append(step)
        return check_finite(step, *rest)

    def save_and_note(self, step, *rest):
        saved.append((step, checked[-1]))
        return save(self, step, *rest)

    monkeypatch.setattr(updates, "check_finite", check)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_note)
    config = tiny_config(folder, teacher=None)
    config.checkpoint.every = 7
    results = run(config, folder / "alone")
    assert saved == [(7, 7), (14, 14), (20, 20)]
    assert results["teacher"] is results["twin"] is results["gain"] is None
    assert results["student"] == finished[1]["twin"]
    assert_equal_bits(arrays(folder / "alone", "student"), arrays(finished[0], "twin"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["faster_rcnn_r18", "cascade_rcnn_r18", "rtmdet_ins_pico", "yolox_pico", *TRANSFORMERS]
)
def test_other_families_resume_and_have_an_exact_twin(name, tmp_path, monkeypatch):
    """10 + 10 steps are 20, to the bit, a trace each.

    Anchors, regions or queries are drawn, masks learned or values rounded.
    """
    masks, int8 = name == "rtmdet_ins_pico", {"int8": True} if name == "yolox_pico" else {}
    options = TRANSFORMERS.get(name, int8 if masks or int8 else TWO_STAGES)
    method = "dkd" if name.endswith("rcnn_r18") else "mkd"
    changes = {"method": method, "student__detector": name}
    changes |= {f"student__options__{option}": value for option, value in options.items()}
    if masks:
        folder = small_folder(tmp_path / "data", masks=True)
        changes |= dict(data__source="coco_folder", data__root=str(folder), data__masks=True)
    supervised = tiny_config(tmp_path, teacher=None, **changes)
    teacher = random_teacher(tmp_path, name, supervised, **{} if int8 else options)
    finish, traced = outputs.finish, []
    monkeypatch.setattr(
        outputs, "finish", lambda setup, *rest: (traced.append(dict(setup.programs)), finish(setup, *rest))[1]
    )
    config = tiny_config(tmp_path, teacher=teacher, **changes)
    whole = run(config, tmp_path / "whole")
    with stopped_in_step(10):
        run(config, tmp_path / "resumed")
    assert run(config, tmp_path / "resumed") == whole
    alone = run(supervised, tmp_path / "alone")
    assert alone["student"] == whole["twin"]
    for role in ("student", "twin"):
        assert_equal_bits(arrays(tmp_path / "resumed", role), arrays(tmp_path / "whole", role))
    assert_equal_bits(arrays(tmp_path / "alone", "student"), arrays(tmp_path / "whole", "twin"))
    ahead = {} if method == "dkd" else {"teacher": 1}  # which asks the second stage, inside the step
    both = {f"{role}'s {part}": 1 for role in ("student", "twin") for part in ("gradients", "update")}
    alone = {"student's gradients": 1, "student's update": 1}
    assert traced == [both | ahead] * 2 + [alone]


def test_one_trace_a_program_in_twenty_steps(finished):
    programs = {f"{role}'s {part}" for role in ("student", "twin") for part in ("gradients", "update")}
    assert finished[2] == dict.fromkeys(programs | {"teacher"}, 1)


def test_what_was_compiled_ahead_is_not_compiled_again(finished):
    """Student and teacher are the same detector here, so that one prediction serves all roles."""
    for name in ("probe", "teacher", "supervised_gradients", "distilled_gradients", "predict_batch"):
        assert COMPILED[f"jit({name})"] == 1, name


@pytest.mark.parametrize("name", [DETECTOR, pytest.param("rtmdet_pico", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(name, folder, tmp_path):
    """SGD, 4 steps, relative 1e-5: batch statistics, counts and gradients are those of the global batch."""
    config = tiny_config(folder, teacher=None)
    dataset = data.open_dataset(config.data)
    detector, *variables, _ = weights.load(random_teacher(tmp_path, name, config))
    student = detectors.build(name, len(dataset.classes), **detector.options)
    distiller = Distiller(student, detector, {"mkd": methods.build("mkd", normalize="pkd")})
    key = jax.random.PRNGKey(0)
    # Small, so that rounding does not change assignments and does not grow: at 1e-4 it triples with every step.
    optimizer = optax.sgd(2e-5)
    step = steps.make_step(student, optimizer, lambda at: 0.1, distiller=distiller)
    batches = data.train_batches(dataset, config.data, batch_size=8, seed=0)
    batches = [next(batches) for _ in range(4)]

    def outcome(devices):
        mesh = Mesh(np.array(devices), ("data",))
        everywhere = sharding.replicated(mesh)
        state = steps.init_state(student, key, None, distiller.init(key, (64, 64)), optimizer)
        state, frozen = jax.device_put((state, steps.TeacherVariables(*variables)), everywhere)
        gradients = jax.jit(step.gradients, out_shardings=everywhere)
        update = jax.jit(step.update, donate_argnums=0, out_shardings=everywhere)
        rows, flag = sharding.shard_batch(mesh, batches[0]), sharding.spec_of_flag(mesh)
        program = steps.Step(
            gradients.lower(step.read(state), frozen, rows).compile(),
            update.lower(step.changed(state), state.params, state.stats, flag).compile(),
        )
        totals, first = [], None
        for batch in batches:
            state, metrics = program(state, frozen, sharding.shard_batch(mesh, batch))
            totals.append(float(metrics["total"]))
            first = checkpoint.flat(state) if first is None else first
        return totals, first, checkpoint.flat(state), program.gradients.as_text() + program.update.as_text()

    totals, first, one, alone = outcome(jax.devices()[:1])
    others, first_of_eight, eight, split = outcome(jax.devices())
    assert not messages(alone)
    # Each norm of the student reduces two sums forward and two backward; losses and one group of gradients remain.
    # PKD's normalisation of a level has the sums of a norm, and two of the teacher's: they count where norms are few.
    norms = sum(path.startswith("stats") and path.endswith("mean") for path in one)
    sent, few = messages(split), name == DETECTOR
    assert norms == 20 if few else norms > 50
    assert sent.pop("all-reduce") <= 4 * norms + (6 * len(student.strides) if few else 10)
    if not few:
        sent.pop("all-gather of reduce")  # of the CPU's depthwise form alone (kdjax/nn/conv_cpu.py)
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12):  # since then XLA transforms a spread batch in place
        sent.pop("all-gather of fft")
    assert not sent
    np.testing.assert_allclose(others, totals, rtol=1e-5)
    start = checkpoint.flat(steps.init_state(student, key, None, distiller.init(key, (64, 64)), optimizer))
    trained = [name for name in one if name.startswith("params")]
    change, apart = (
        np.sqrt(sum(np.sum(np.square(np.float64(first[name]) - other[name])) for name in trained))
        for other in (start, first_of_eight)
    )
    assert change > 0 and apart < 1e-3 * change  # the first gradient as a whole
    for name in one:
        # Biases and means of norms start at 0 and are still tiny: they are compared with 0.1, their usual size.
        size = max(np.linalg.norm(one[name]), 0.1 * np.sqrt(one[name].size))
        assert np.linalg.norm(eight[name] - one[name]) < 1e-5 * size, name
        change = np.linalg.norm(one[name] - start[name])
        if name.startswith("params") and change > 1e-5:
            assert np.linalg.norm(eight[name] - one[name]) < 0.02 * change, name


def messages(program: str) -> collections.Counter:
    """The collectives of a compiled program: all-reduces, and the other kinds with the operation they belong to."""
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
    batch |= {steps.SOUND: sharding.replicate(np.float32(1), setup.mesh)}  # as in a run, whose program this is
    after, metrics = setup.steps["twin"](state._replace(params=poisoned), None, batch)
    after = checkpoint.flat(after)
    assert after.pop("step") == 1 and before.pop("step") == 0
    assert_equal_bits(after, before)
    with pytest.raises(FloatingPointError, match=r"twin/loss_.*step 3"):
        updates.check_finite(3, {f"twin/{name}": value for name, value in metrics.items()})


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "the workdir of a run with other settings", "refused: seed was 0, is 1"
)
def test_workdir_of_another_run_is_refused(finished, folder, teacher_folder):
    with pytest.raises(UserError, match=r"other settings.*seed was 0, is 1"):
        run(tiny_config(folder, teacher=teacher_folder, seed=1), finished[0])


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "other images or another teacher under the same names",
    "refused: belongs to a different run: choose another folder",
)
@pytest.mark.parametrize("changed", ["data", "teacher", "options"])
def test_a_run_is_not_resumed_with_other_data_or_another_teacher(finished, folder, teacher_folder, tmp_path, changed):
    """With the same settings: the content of a folder has been replaced."""
    config = tiny_config(folder, teacher=teacher_folder)
    if changed == "data":
        config.data.scenes_train += 1  # config.json is not copied, so only the checkpoint knows
    elif changed == "options":  # that change no shape
        config.student.options.norm_eval = True
    else:
        detector, params, stats, classes = weights.load(teacher_folder)
        params = jax.tree.map(lambda leaf: leaf + 1e-3, params)
        weights.save(tmp_path / "teacher", detector, params, stats, classes=classes, image_size=(64, 64))
        config.teacher.weights = str(tmp_path / "teacher")
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(
        UserError, match=f"belongs to a different run: {changed} was .*: choose another folder"
    ) as refused:
        run(config, tmp_path / "run")
    assert ("(the hash of its images, boxes and classes)" in str(refused.value)) == (changed == "data")


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a run whose `config.json` was deleted",
    "refused with other settings: the checkpoint knows them",
)
def test_a_run_whose_config_was_deleted_keeps_its_settings(finished, folder, teacher_folder, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    config = tiny_config(folder, teacher=teacher_folder, optimizer__lr=0.003)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    assert str(caught.value) == (
        f"workdir: {tmp_path / 'checkpoints'} belongs to a run with other settings (optimizer.lr was 0.002, is 0.003): "
        "choose another folder"
    )


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "checkpoints of another detector",
    "refused: student was 'retinanet_r18', is 'rtmdet_micro'",
)
def test_checkpoint_of_another_detector_is_refused(finished, folder, teacher_folder, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    config = tiny_config(folder, teacher=teacher_folder, student__detector="rtmdet_micro")
    with pytest.raises(UserError, match="different run: student was 'retinanet_r18', is 'rtmdet_micro'"):
        run(config, tmp_path)


@pytest.mark.user_input(
    "Prepared data",
    "prepared data that is damaged while it trains",
    "refused in one sentence, which names the record",
)
def test_data_that_is_damaged_while_it_trains_gets_a_sentence(folder, tmp_path, monkeypatch):
    def train(*_):
        raise data.Damaged("DIR: record 3 cannot be read: prepare the data again")

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(UserError, match="DIR: record 3"):
        run(tiny_config(folder, teacher=None), tmp_path / "run")


def test_a_dry_run_needs_no_teacher_and_no_workdir(folder, capsys):
    config = tiny_config(folder, teacher="")
    config.data.check = True
    assert run(config, None) is None
    assert "disc" in capsys.readouterr().out
