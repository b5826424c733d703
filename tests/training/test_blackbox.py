"""A step that went wrong is kept, repeated to the bit, and what began it is named: a weight, an image, a loss."""

import contextlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import cli, data, files, sharding
from kdjax.errors import UserError
from kdjax.losses import distance
from kdjax.training import blackbox, checks, diagnosis
from kdjax.training import run as training
from kdjax.training.run import run
from kdjax.training.setup import given, prepare, train_batches
from kdjax.training.step import SOUND
from tests.support.runs import tiny_config

STEP = 3
PEARSON, PLACED = distance.pearson, diagnosis.placed


@pytest.fixture(scope="module")
def config(folder, teacher_folder):
    return tiny_config(folder, teacher=teacher_folder, method="pkd", twin=False, batch_size=4)


def careless(s, t, **options):
    empty = jnp.all(t == 0, axis=(1, 2, 3), keepdims=True)
    return PEARSON(s, t, **options) + jnp.where(empty, s / jnp.sum(jnp.abs(t), (1, 2, 3), keepdims=True), 0.0)


def as_float(setup, batch):
    arrays = PLACED(setup, batch)
    return arrays | {"image": arrays["image"].astype(jnp.float32)}


@pytest.fixture(scope="module")
def prepared(config):
    """The setup of a run, and the batch of its step on the host."""
    checks.check_settings(config)
    setup = prepare(config, data.open_dataset(config.data))
    with contextlib.closing(train_batches(setup, start_step=STEP - 1)) as batches:
        return setup, sharding.gather(as_float(setup, next(batches)))


@pytest.fixture
def planted(prepared, monkeypatch, tmp_path):
    """(setup, what writes a step with a fault in its batch or state) of images as float32, which can hold a NaN.

    The loss is infinite where a map of the teacher is zero everywhere, as a division without an epsilon would be.
    """
    setup, batch = prepared
    monkeypatch.setattr(distance, "pearson", careless)
    monkeypatch.setattr(diagnosis, "placed", as_float)

    def write(change_batch=None, change_state=None):
        chosen = jax.tree.map(np.array, batch)
        state = jax.tree.map(np.array, setup.states["student"])._replace(step=np.array(STEP - 1, np.int32))
        if change_batch:
            change_batch(chosen)
        if change_state:
            change_state(state)
        rows = jax.tree.map(lambda value: sharding.split(value, setup.mesh), chosen)
        variables, rows = given(setup, "student", rows)
        rows[SOUND] = sharding.replicate(np.float32(1), setup.mesh)
        there = setup.layout.put(jax.tree.map(np.array, state))
        _, metrics = setup.steps["student"](there, variables, rows)
        metrics = {f"student/{name}": float(value) for name, value in metrics.items()}
        return blackbox.write(tmp_path, setup, STEP, {"student": state}, rows | {}, metrics)

    return setup, write


def found(setup, folder):
    recorded = blackbox.read(folder)
    recorded.batch.pop(SOUND)
    [diagnosed] = diagnosis.diagnose(setup, recorded)
    assert not diagnosed.differs, "it repeats to the bit"
    return diagnosed, "\n".join(diagnosis.lines(diagnosed, recorded))


def test_a_nan_in_an_image_is_named(planted):
    setup, write = planted

    def plant(batch):
        batch["image"][2, 5, 7, 0] = np.nan

    one, told = found(setup, write(plant))
    assert one.batch == {2: ["image"]} and one.images == [2] and not one.state
    assert one.began == "in the batch: image 2 has image that is not finite"
    recorded = blackbox.read(write(plant)).images[""][2]
    assert f"image 2 of the batch: {recorded['files'][0]} (id {recorded['image_ids'][0]})" in told


def test_a_nan_in_a_weight_is_named(planted):
    setup, write = planted
    names = []

    def plant(state):
        path, leaf = next(
            (path, leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(state.params["student"])[0]
            if leaf.ndim == 4 and "neck" in jax.tree_util.keystr(path)
        )
        leaf[0, 0, 0, 0] = np.nan
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))

    one, told = found(setup, write(change_state=plant))
    assert one.state == [f"params/student/{names[0]}"] and not one.images and not one.batch
    assert one.output[0].startswith("neck") and not any(name.startswith("backbone") for name in one.output)
    assert f"it began in the state: params/student/{names[0]} is not finite before the step" in told


def test_a_nan_of_a_loss_is_named_with_image_and_level(planted):
    """All inputs are finite."""
    setup, write = planted

    def plant(batch):
        batch["teacher"].neck[1][3] = 0

    one, told = found(setup, write(plant))
    assert one.images == [3] and one.terms == ["pkd/correlation"]
    assert one.gradients == {"pkd/correlation": ["neck.1"]}
    assert one.by_image == {3: ["pkd/correlation"]}
    assert not (one.batch or one.state or one.teacher or one.output)
    assert "it began in the term pkd/correlation in image 3, at neck.1" in told


def test_a_sound_step_has_no_culprit(planted):
    setup, write = planted
    one, told = found(setup, write())
    assert one.began == "with no image, level or term alone" and "student repeats to the bit: total " in told


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """The workdir of a run whose teacher says NaN of image 2 in step 7, in which it goes on as long as this exists."""
    place = training.placed
    batches = train_batches(prepare(config, data.open_dataset(config.data)), start_step=6)
    seventh = float(next(batches)["boxes"].sum())
    batches.close()

    def poisoned(setup, batch):
        arrays = place(setup, batch)
        if float(np.asarray(arrays["boxes"]).sum()) == seventh:
            neck = list(arrays["teacher"].neck)
            neck[1] = neck[1].at[2].set(jnp.nan)
            object.__setattr__(arrays["teacher"], "neck", tuple(neck))
        return arrays

    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "placed", poisoned)
        with pytest.raises(
            FloatingPointError, match=r"student/pkd/correlation is not finite at step 7: .*kdjax replay"
        ):
            run(config, workdir)
        yield workdir


def test_the_command_repeats_a_step_and_names_what_began_it(stopped, capsys):
    assert cli.main(["replay", str(stopped / "blackbox" / "step-7")]) == 0
    told = capsys.readouterr().out
    assert "step 7 of the student repeats to the bit: total nan" in told
    assert "it began in the batch: image 2 has teacher.neck.1 that is not finite" in told


def test_a_run_that_stopped_goes_on_with_skip(stopped, config, capsys):
    again = config.copy_and_resolve_references()
    again.on_bad_step = "skip"
    run(again, stopped)
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    rows = {row["step"]: row for row in rows if row["kind"] == "train"}
    assert [(at, row.get("bad_steps", 0)) for at, row in rows.items()] == [(5, 0), (10, 1), (15, 1), (20, 1)]
    assert np.isfinite(rows[10]["student/total"])
    told = capsys.readouterr()
    assert "skip: training goes on with step 8" in told.err
    assert re.search(r"^time: .* min: start .*compile .*step .*evaluate .*\(2 starts\)$", told.out, re.MULTILINE)
    assert "shares of the time" in (stopped / "report.html").read_text()


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a damaged folder of `blackbox/`", "refused: it does not match its hash"
)
def test_a_damaged_black_box_is_refused(stopped, tmp_path, capsys):
    folder = stopped / "blackbox" / "step-7"
    for name in ("state.npz", "batch.npz", "note.json"):
        copy = tmp_path / name / "step-7"
        shutil.copytree(folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=r"it does not match its hash|it is damaged"):
            blackbox.read(copy)
    with pytest.raises(UserError, match=f"does not hold the inputs of a step: take {folder}"):
        blackbox.read(folder.parent)
    with pytest.raises(UserError, match=r"none: there is no such folder: take a folder step-N of the blackbox/"):
        blackbox.read(tmp_path / "none")
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"no step of this run was kept, because none went wrong"):
        blackbox.read(tmp_path / "sound")
    shutil.copytree(folder, tmp_path / "other")
    note = json.loads((folder / "note.json").read_text())
    note["run"]["seed"] = 1
    files.write_json(tmp_path / "other" / "note.json", files.sealed(note))
    assert cli.main(["replay", str(tmp_path / "other")]) == 2
    assert "the step was recorded with other inputs: seed was 1, is 0" in capsys.readouterr().err
