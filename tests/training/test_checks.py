"""Mistakes in settings, models, data and workdirs are refused before training."""

import dataclasses
import json
import math

import pytest
from ml_collections import ConfigDict

from kdjax import data
from kdjax.data.dataset import Split
from kdjax.errors import UserError
from kdjax.training import checks, models, provenance
from kdjax.training import run as training
from kdjax.training.run import run
from kdjax.training.setup import prepare
from tests.support.data import small_folder
from tests.support.runs import tiny_config


@pytest.mark.user_input(
    "Config and flags",
    "an unknown setting, option, method, tap or detector",
    "refused: did you mean config.optimizer?; with those that exist",
)
@pytest.mark.user_input(
    "Config and flags",
    "a setting out of range, NaN, 0 steps, a side of 60 px",
    "refused: what it must be, not what it is",
)
@pytest.mark.user_input("Config and flags", "a teacher without a method, a method without a teacher", "refused")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(optimzer=1), "unknown setting config.optimzer .did you mean config.optimizer"),
        (
            dict(data__augment__flipp=1.0),
            "unknown setting config.data.augment.flipp .did you mean config.data.augment.flip",
        ),
        (dict(methods__mkdd=ConfigDict()), "config.methods: unknown method 'mkdd'.*mkd.*rtmdet_cwd"),
        (dict(methods__mkd__wieght=1.0), "config.methods.mkd: unknown option 'wieght'.*weight"),
        (dict(methods__mkd__student="neckk"), "config.methods.mkd: .*'neckk'.*neck.*cls_tower"),
        (dict(methods__mkd__zeta=2.0), "config.methods.mkd: zeta.*0 .. 1"),
        (dict(methods__mkd__weight=0.0), "config.methods.mkd: it has no effect"),
        (dict(int8_start=0.2), "config.int8_start has no effect without config.student.options.int8=True"),
        (dict(student__options__int8=True, int8_start=1.5), "config.int8_start must be in .0, 1., not 1.5"),
        (
            dict(methods__mkd__weight=-1.0),
            "config.methods.mkd: the weight of its term .* -1.0: it must be",
        ),
        (dict(methods__mkd__weight=math.nan), "config.methods.mkd: the weight .* nan: it must be finite and >= 0"),
        (dict(methods__mkd__weight=None), "config.methods.mkd: weight must be a number or 'auto', not None"),
        (dict(methods__mkd__stop=None), "config.methods.mkd: stop must be an integer, not None"),
        (dict(auto_weight=None), "config.auto_weight=None: it must be a group of settings"),
        (dict(data__longest=1), "config.data: longest must be at least 32 px, or 0 for images as they are, not 1"),
        (dict(student__detector=""), "config.student.detector: there is no student.*rtmdet_tiny"),
        (dict(student__detector="rtmdet_huge"), "rtmdet_huge.*rtmdet_tiny"),
        (
            dict(student__detector="rtmdet_ins_pico", data__source="coco_folder", data__root="/no/such/folder"),
            "config.data.masks: the student rtmdet_ins_pico learns masks, but the batches have none",
        ),
        (
            dict(teacher__weights="/no/such/folder"),
            "config.teacher.weights: there is no file or folder /no/such/folder",
        ),
        (dict(teacher__detector="rtmdet_s"), "are for retinanet_r18 with .*, not for rtmdet_s"),
        (dict(teacher__weights=""), "config.methods: mkd without a teacher"),
        # Before the data is prepared.
        (
            dict(data__image_size=(60, 64), data__source="coco_folder", data__root="/no/such/folder"),
            "image_size must be multiples of 32 .*, not 60x64",
        ),
        (dict(data__source="coco"), "coco"),
        (dict(sharding="zero"), "config.sharding must be 'replicated' or 'fsdp', not 'zero'$"),
        (dict(batch_size=0), "batch_size must be >= 1, not 0"),
        (dict(steps=0), "steps must be >= 1, not 0"),
        (dict(seed=-1), "seed must be in .0, 4294967295., not -1"),
        (dict(log_every=0), "log_every"),
        (dict(checkpoint__every=0), "checkpoint.every"),
        (dict(eval__batch_size=0), "eval.batch_size"),
        (dict(data__scenes_train=0), "data.scenes_train"),
        (dict(data__max_boxes=-5), "data.max_boxes"),
        (dict(optimizer__lr=float("nan")), "optimizer.lr must be >= 0, not nan"),
        (dict(optimizer__end=1.5), "optimizer.end must be in .0, 1., not 1.5"),
        (dict(data__image_size=(64,)), "config.data: image_size must be .height, width. .*, not .64,."),
        (dict(data__augment__flip=2.0), "augment.flip"),
        (dict(optimizer__warmup=11), "optimizer.warmup is 11, but the cosine decay starts at step 10"),
        (dict(optimizer__name="adam"), "optimizer.name must be 'adamw' or 'sgd'"),
        (dict(methods=ConfigDict()), "config.methods: there is a teacher but no method"),
    ],
    ids=str,
)
def test_mistakes_are_refused_in_one_sentence(folder, teacher_folder, tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        run(tiny_config(folder, teacher=teacher_folder, **changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_dry_run_refuses_options_that_training_refuses(folder):
    for options, words in (
        ({"head_channels": 0}, "config.student: head_channels of RetinaNet must be >= 1, not 0"),
        ({"hedd": 1}, "config.student: .* has no option hedd"),
    ):
        config = tiny_config(folder, teacher="", data__check=True)
        with config.unlocked():
            config.student.options.update(options)
        with pytest.raises(UserError, match=words):
            run(config, None)


def test_the_dry_run_refuses_an_unknown_pairing(folder):
    config = tiny_config(folder, teacher="", data__check=True, pairing="by_name")
    with pytest.raises(UserError, match=r"config\.pairing must be one of auto, by_place, .*, not 'by_name'"):
        run(config, None)


def test_the_list_of_methods_leaves_out_what_does_not_help(monkeypatch):
    """A wrong option of a method that can compare the two is no reason to take another method."""
    monkeypatch.setattr(models.methods, "refusal", lambda name, *_: "" if name == "dkd" else "no")
    for told, wanted in (("dkd: head is wrong", ""), ("rm: no", "; methods that run on this student and teacher: dkd")):

        class Failing:
            student = teacher = pairing = None

            def init(self, *_, told=told):
                raise UserError(told)

        with pytest.raises(UserError) as caught:
            models.init_adapters(Failing(), None, (64, 64))
        assert str(caught.value) == f"config.methods.{told}{wanted}"


@pytest.mark.user_input("COCO json", "a split without objects", "refused, also in the dry run")
@pytest.mark.parametrize("empty", ["train", "val"])
def test_a_split_without_objects_is_refused(folder, tmp_path, empty):
    """Also without distillation: a detector would learn to predict nothing."""
    root = small_folder(tmp_path / "set")
    path = root / "annotations" / f"instances_{empty}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    config = tiny_config(folder, teacher=None)
    config.data.update(dict(source="coco_folder", root=str(root)))
    words = {
        "train": "config.data.train_split: the 11 images of the split 'train' of set have no objects",
        "val": "config.data.val_split: the 3 images of the split 'val' of set have no objects",
    }
    for check in (False, True):  # the dry run finds it too
        config.data.check = check
        with pytest.raises(UserError, match=words[empty]):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.user_input(
    "Config and flags", "a config that lacks a setting", "refused: config.optimizer.clip_norm is missing"
)
def test_a_config_that_lacks_a_setting_is_refused(folder, tmp_path):
    config = tiny_config(folder, teacher=None)
    del config.optimizer.clip_norm
    with pytest.raises(UserError, match=r"config.optimizer.clip_norm is missing"):
        run(config, tmp_path)


@pytest.mark.user_input("Config and flags", "a term that gives the student no gradient", "refused with its name")
def test_a_term_without_effect_is_named(folder, teacher_folder):
    """A mask that drops all frequencies leaves the student no gradient."""
    config = tiny_config(folder, teacher=teacher_folder, methods__mkd__zeta=1.0)
    setup = prepare(config, data.open_dataset(config.data))
    with pytest.raises(UserError, match=r"term mkd/frequency .*zero gradient"):
        checks.check_terms(setup, checks.first_batch_with_objects(setup))


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a run of an older version, which lacks a setting", "read: at its default"
)
def test_a_setting_newer_than_the_run_is_at_its_default(folder, tmp_path):
    config = tiny_config(folder, teacher=None)
    written = json.loads(config.to_json())
    del written["data"]["stage2"]["augment"], written["eval"]["limit"], written["optimizer"]["clip_norm"]
    (tmp_path / "config.json").write_text(json.dumps({"config": written}))
    checks.check_workdir(config, tmp_path)
    config.optimizer.clip_norm = 1.0
    with pytest.raises(ValueError, match=r"optimizer.clip_norm was 0.0, is 1.0"):
        checks.check_workdir(config, tmp_path)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a workdir that cannot be created", "refused: cannot be created (Not a directory)"
)
def test_workdir_that_cannot_be_used_is_refused(folder, teacher_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir: .*file/run cannot be created .Not a directory"):
        run(tiny_config(folder, teacher=teacher_folder), tmp_path / "file" / "run")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json is not the config of a run"):
        run(tiny_config(folder, teacher=teacher_folder), tmp_path)


@pytest.mark.user_input("COCO json", "a validation split whose objects were all dropped", "refused with the reasons")
def test_a_validation_split_that_lost_its_objects_is_refused(folder):
    config = tiny_config(folder, teacher=None).data
    dataset = data.open_dataset(config)
    split = dataset.splits["val"]

    class Empty(Split):
        truth, log = {**split.truth, "annotations": []}, None

    empty = Empty(split.name, split.size, split.records, split.folder, split.categories)
    object.__setattr__(empty, "log", [dict(file="a", annotation=i, action="dropped", reason="far off") for i in (1, 2)])
    dataset = dataclasses.replace(dataset, splits=dataset.splits | {"val": empty})
    with pytest.raises(UserError, match=r"have no objects \(2 dropped: far off\): metrics need some"):
        checks.check_truth(dataset, config)


def test_only_mistakes_of_the_user_become_user_errors(folder, teacher_folder, tmp_path, monkeypatch):
    """A bug keeps its exception, and so its traceback on the command line."""

    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(checks, "check_truth", broken)
    with pytest.raises(ValueError, match=r"^a bug$") as caught:
        run(tiny_config(folder, teacher=teacher_folder), tmp_path)
    assert not isinstance(caught.value, UserError)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a workdir with *, ? or a bracket in its path",
    "refused: choose a path without them",
)
@pytest.mark.parametrize("name", ["run[1]", "run*", "what?/run"])
def test_a_workdir_that_is_a_pattern_is_refused(folder, tmp_path, name):
    with pytest.raises(UserError) as caught:
        checks.check_workdir(tiny_config(folder, teacher=None), tmp_path / name)
    assert str(caught.value) == (
        f"workdir: {tmp_path / name} contains *, ? or [, which the library that writes checkpoints takes as a pattern: "
        "choose a path without them"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a folder in the place of a file to write", "refused: move it away"
)
@pytest.mark.parametrize("name", ["report.html", "student/model.safetensors", "metrics.jsonl", "config.json"])
def test_a_folder_in_the_place_of_an_output_is_refused(folder, tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"^workdir: .*/{name} is a folder, where a file is to be written: move it"):
        checks.check_workdir(tiny_config(folder, teacher=None), tmp_path)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a file in the place of a folder to make", "refused: move it away"
)
@pytest.mark.parametrize("name", ["checkpoints", "student", "detections", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_refused(folder, tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"^workdir: .*/{name} is not a folder, where one is to be made: move it away"):
        checks.check_workdir(tiny_config(folder, teacher=None), tmp_path)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a damaged `config.json` of a run",
    "refused: is not the config of a run: choose another folder",
)
def test_a_config_file_that_is_damaged_is_refused(folder, tmp_path):
    for text in ("{}", "[]", "{", '{"config": 3}', '{"config": [1]}', "[" * 100_000, '{"config":' * 900 + "}" * 900):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            UserError, match=r"^workdir: .*config.json is not the config of a run: choose another folder$"
        ):
            checks.check_workdir(tiny_config(folder, teacher=None), tmp_path)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a `config.json` that was changed by hand",
    "refused: was changed after it was written: delete it: the checkpoints have the settings too",
)
def test_a_config_file_that_was_changed_is_refused(folder, tmp_path):
    """Also where that does not change the settings: a study reads the command and the data of the run there."""
    config, path = tiny_config(folder, teacher=None), tmp_path / "config.json"
    for _ in range(2):  # the second adds a process to the first one's file
        provenance.write_config(config, tmp_path, "data")
        checks.check_workdir(config, tmp_path)
    assert len(json.loads(path.read_text())["runs"]) == 2
    path.write_text(path.read_text().replace('"data": "data"', '"data": "date"', 1))
    with pytest.raises(UserError) as caught:
        checks.check_workdir(config, tmp_path)
    why = "was changed after it was written (its SHA-256 differs): delete it: the checkpoints have the settings too"
    assert str(caught.value) == f"workdir: {path} {why}"


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "the same command started twice",
    "refused: another process trains in WORKDIR: wait until it ends",
)
def test_a_second_process_in_a_workdir_is_refused(folder, tmp_path):
    with training.only_writer(tmp_path), pytest.raises(UserError) as caught:
        run(tiny_config(folder, teacher=None), tmp_path)
    busy = f"workdir: another process trains in {tmp_path}: wait until it ends, or choose another folder"
    assert str(caught.value) == busy and [path.name for path in tmp_path.iterdir()] == [".lock"]
