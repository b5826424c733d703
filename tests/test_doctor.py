"""The doctor names every planted fault, and leaves sound set-ups alone."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kdjax import cli, data, detectors, weights
from kdjax.commands import settings as command_settings
from kdjax.data.dataset import Split
from kdjax.doctor import examine, gradients, memory, models, schedule
from kdjax.doctor.data import check_data
from kdjax.doctor.findings import FAULT, FINE, LOOK, Finding
from kdjax.methods import api
from kdjax.training import checks, sharding
from kdjax.training.setup import Setup, prepare
from kdjax.training.step import init_adapters
from kdjax.weights import folder
from tests.test_configs import load
from tests.test_train import tiny_config

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 16


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
        yield


def faults(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.said for finding in findings if finding.level == FAULT}


# ---------------------------------------------------------------------------------------------- a detector with weights


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The quickstart's teacher with its data: (Setup without a student, detector, variables)."""
    config = load(ROOT / "configs/quickstart.py")
    config.data.update(dict(cache=str(tmp_path_factory.mktemp("doctor")), scenes_train=4, scenes_val=IMAGES))
    dataset = data.open_dataset(config.data)
    detector, params, stats, _ = weights.load(ROOT / config.teacher.weights)
    empty = dict.fromkeys(Setup._fields)
    return Setup(**empty | dict(config=config, dataset=dataset)), detector, (params, stats)


def of_teacher(shipped, *, detector=None, variables=None):
    setup, sound, trained = shipped
    return models.check_weights("teacher", detector or sound, variables or trained, setup, IMAGES)


def test_a_sound_teacher_is_fine(shipped):
    [finding] = of_teacher(shipped)
    assert finding.level == FINE and "AP50 " in finding.said


@pytest.mark.parametrize(
    "wrong,named",
    [
        (lambda own, images: own[..., ::-1], "red and blue channels are swapped"),
        (lambda own, images: images[..., ::-1].astype(jnp.float32), "mean and deviation taken out, BGR"),
    ],
    ids=["swapped", "not normalised"],
)
def test_a_wrong_input_is_named(shipped, wrong, named):
    sound = shipped[1]
    detector = dataclasses.replace(sound, preprocess=lambda images: wrong(sound.preprocess(images), images))
    found = faults(of_teacher(shipped, detector=detector))
    assert named in found["teacher's input"]


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4, 5), (1, 2, 3, 4, 5, 0)], ids=["two", "all"])
def test_a_wrong_class_map_is_named(shipped, order):
    setup, _, (params, stats) = shipped
    names = setup.dataset.classes
    head = jax.tree.map(lambda leaf: leaf[..., jnp.array(order)], params["bbox_head"]["rtm_cls"])
    params = params | {"bbox_head": params["bbox_head"] | {"rtm_cls": head}}
    said = faults(of_teacher(shipped, variables=(params, stats)))["teacher's classes"]
    assert f"what it calls {names[0]!r} is {names[1]!r}" in said


def test_a_teacher_of_other_data_is_named(shipped):
    detector = detectors.build("rtmdet_nano", len(shipped[0].dataset.classes))
    found = faults(of_teacher(shipped, detector=detector, variables=detector.init(jax.random.PRNGKey(0))))
    assert "weights are of other data, or not trained" in found["teacher"]


# ------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    "recipe,size",
    [
        ("configs/quickstart.py", 200),
        ("configs/supervised/scenes.py", 2000),
        ("configs/distill/mkd_rtmdet.py", 118287),
        ("configs/supervised/rtmdet.py", 118287),
        ("configs/supervised/dense.py", 118287),
        ("configs/distill/dense.py", 118287),
    ],
)
def test_the_schedules_of_the_recipes_are_sound(recipe, size):
    assert not faults(schedule.check_schedule(load(ROOT / recipe), size))


def test_a_rate_that_is_not_scaled_to_the_batch_is_noticed():
    config = load(ROOT / "configs/distill/mkd_rtmdet.py")
    for batch, level in ((256, FINE), (16, LOOK), (4096, FAULT)):
        config.update_from_flattened_dict({"batch_size": batch, "optimizer.lr": 0.004})
        [finding] = [one for one in schedule.check_schedule(config, 118287) if one.what == "learning rate"]
        assert finding.level == level, finding
        if batch == 16:
            assert "16 times what RTMDet's 0.004 for 256 images is for 16" in finding.said


def test_a_low_rate_is_no_fault_of_a_student_that_is_tuned(tmp_path):
    config = load(ROOT / "configs/quickstart.py")
    config.update_from_flattened_dict({"optimizer.lr": 2e-5, "student.weights": str(tmp_path)})
    levels = {finding.what: finding.level for finding in schedule.check_schedule(config, 200)}
    assert levels["learning rate"] == LOOK and "length" not in levels


@pytest.mark.parametrize(
    "changes,what,named",
    [
        ({"optimizer.lr": 0.08}, "learning rate", "too high"),
        ({"optimizer.lr": 0.004, "batch_size": 4096}, "learning rate", "too low"),
        ({"optimizer.name": "sgd", "optimizer.lr": 0.04}, "learning rate", "8 times what mmdetection's 0.01 for 16"),
        ({"optimizer.lr": 0.0, "steps": 400}, "length", "too little to learn from random numbers"),
        ({"ema.ramp": 10}, "moving average", "lengthen config.ema.ramp"),
        ({"methods.mkd.stop": 10}, "mkd", "1% of its weight"),
        ({"methods.mkd.start": 1599}, "mkd", "0% of its weight"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_named(changes, what, named):
    config = load(ROOT / "configs/quickstart.py")
    config.update_from_flattened_dict(changes)
    assert named in faults(schedule.check_schedule(config, 200))[what]


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_configs_that_import_each_other_are_found_without_the_checkout_on_the_path(monkeypatch):
    """A console script, unlike `python train.py`, does not have the folder where it runs on the path."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    assert "mkd" in command_settings.read("configs/distill/coco_folder.py:mkd").methods


# ----------------------------------------------------------------------------------------------- terms, data, program


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny run with teacher, before its first step."""
    folder = tmp_path_factory.mktemp("doctor_run")
    plain = tiny_config(folder, teacher=None)
    dataset = data.open_dataset(plain.data)
    detector = detectors.build("rtmdet_pico", len(dataset.classes))
    params, stats = detector.init(jax.random.PRNGKey(99))
    weights.save(folder / "teacher", detector, params, stats, classes=list(dataset.classes), image_size=(64, 64))
    made = prepare(tiny_config(folder, teacher=folder / "teacher"), dataset)
    return made, checks.first_batch_with_objects(made)


@pytest.fixture(scope="module")
def strengths(setup):
    return gradients.measure_gradients(*setup)


def test_sound_terms_are_fine(setup, strengths):
    values, pulls, start = strengths
    assert not faults([*gradients.check_initial_scores(values, start), *gradients.check_terms(setup[0], values, pulls)])
    found = {finding.what for finding in gradients.check_terms(setup[0], values, pulls)}
    assert found == {"loss_cls", "loss_box", *(f"mkd/{t}" for t in ("feature", "multiscale", "frequency", "alignment"))}


@pytest.mark.parametrize("factor,named", [(1000.0, "drown"), (0.001, "next to nothing")])
@pytest.mark.parametrize("which", [["feature"], ["alignment"], None], ids=["feature", "alignment", "all"])
def test_a_term_a_thousand_times_too_strong_or_too_weak_is_named(setup, strengths, which, factor, named):
    mkd = setup[0].methods["mkd"]
    which = which or list(mkd.weights)
    weights = {name: (factor if name in which else 1.0) * weight for name, weight in mkd.weights.items()}
    found = faults(
        gradients.check_terms(setup[0]._replace(methods={"mkd": mkd._replace(weights=weights)}), *strengths[:2])
    )
    assert any(named in said for said in found.values()), found
    assert set(found) <= {"mkd", *(f"mkd/{name}" for name in which)}


def test_a_method_whose_adapter_starts_near_zero_is_judged_by_what_it_grows_to(setup, strengths):
    made, batch = setup
    fgfi = api.build("fgfi", weight=0.3)  # the teacher is of random numbers, and its maps are small
    specs = (detector.spec(batch["image"].shape[1:3]) for detector in (made.student, made.teacher))
    state = made.states["student"]
    adapters = init_adapters({"fgfi": fgfi}, state.key, *specs)
    state = state._replace(params=state.params | {"adapters": adapters})
    made = made._replace(methods={"fgfi": fgfi}, states={"student": state})
    share = [
        gradients.gradient_shares(made, gradients.measure_gradients(made, batch, adapters)[1])["fgfi"]
        for adapters in (adapters, gradients.train_adapters(made, batch))
    ]
    assert share[0] < gradients.NOTHING < share[1], share


def test_a_term_that_is_not_finite_is_named(setup, strengths):
    values, pulls, _ = strengths
    found = faults(gradients.check_terms(setup[0], values | {"mkd/feature": np.nan}, pulls))
    assert "cannot be trained" in found["mkd/feature"]


def test_a_missing_focal_prior_is_named(setup):
    made, batch = setup
    state = made.states["student"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "rtm_cls" in str(path) and leaf.ndim == 1 else leaf, state.params
    )
    values, _, start = gradients.measure_gradients(
        made._replace(states={"student": state._replace(params=params)}), batch
    )
    assert "lacks its focal prior" in faults(gradients.check_initial_scores(values, start))["student's head"]


def test_a_random_student_with_frozen_layers_is_named():
    assert "11 kernels" in faults(models.check_frozen(detectors.build("retinanet_r50", 2)))["frozen layers"]
    free = dict(frozen_stages=-1, frozen_norm=False, norm_eval=False)
    assert not models.check_frozen(detectors.build("fcos_r18", 2, **free))
    assert not models.check_frozen(detectors.build("yolox_pico", 2))


def test_a_student_larger_than_its_teacher_is_noticed(setup):
    made, _ = setup
    larger = made._replace(student=detectors.build("rtmdet_tiny", made.student.num_classes))
    [finding] = models.check_sizes(larger)
    assert finding.level == LOOK and "changed places" in finding.said


def test_lost_and_tiny_objects_and_absent_classes_are_noticed(setup):
    made, _ = setup
    split = made.dataset.splits["train"]
    truth = split.truth
    gone = {**truth, "annotations": [dict(a, bbox=[1, 1, 3, 3]) for a in truth["annotations"] if a["category_id"] > 1]}
    log = [dict(file="a", annotation=i, action="dropped", reason="r") for i in range(2 * len(truth["annotations"]))]

    class Damaged(Split):
        truth, log = gone, None

    spoiled = Damaged(split.name, split.size, split.records, split.folder, split.categories)
    object.__setattr__(spoiled, "log", log)
    dataset = dataclasses.replace(made.dataset, splits=made.dataset.splits | {"train": spoiled})
    found = check_data(made._replace(dataset=dataset))
    assert "--config.data.check=True lists them" in faults(found)["train data"]
    said = {finding.what: finding.said for finding in found if finding.level == LOOK}
    assert "100% of the objects are under 4 px" in said["small objects"]
    assert f"no training image holds {made.dataset.classes[0]}" in said["classes"]
    assert not faults(check_data(made))
    for share, level in ((0.02, FINE), (0.3, LOOK), (0.7, FAULT)):
        times = int(share * len(truth["annotations"])) + 1
        object.__setattr__(spoiled, "log", times * [dict(log[0], action="repaired", reason="box clipped to the image")])
        seen = {finding.what: finding for finding in check_data(made._replace(dataset=dataset))}["train data"]
        assert seen.level == level and f"{times} clipped to the image" in seen.said
        assert ("x, y, width, height in pixels" in seen.said) == (level != FINE)


def test_what_was_dropped_is_told_where_no_object_is_left(setup):
    made, _ = setup
    split = made.dataset.splits["val"]

    class Empty(Split):
        truth, log = {**split.truth, "annotations": []}, None

    empty = Empty(split.name, split.size, split.records, split.folder, split.categories)
    object.__setattr__(empty, "log", [dict(file="a", annotation=i, action="dropped", reason="far off") for i in (1, 2)])
    dataset = dataclasses.replace(made.dataset, splits=made.dataset.splits | {"val": empty})
    with pytest.raises(ValueError, match=r"holds no object in its \d+ images \(2 were dropped: far off\), so nothing"):
        checks.check_truth(dataset)


def test_too_little_memory_is_named(setup, monkeypatch):
    made, batch = setup
    step = jax.jit(lambda state, variables, batch: (state, jnp.sum(jnp.outer(batch["boxes"], batch["boxes"]))))
    made = made._replace(steps=made.steps | {"student": step})
    assert not faults(memory.check_memory(made, batch))
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    assert "lower config.batch_size" in faults(memory.check_memory(made, batch))["memory"]


def test_what_a_run_would_refuse_is_a_fault(setup):
    made, _ = setup
    config = made.config.copy_and_resolve_references()
    config.batch_size = -1
    [finding] = examine.examine(config)
    assert finding.level == FAULT and "config.batch_size is -1" in finding.said


@pytest.fixture(scope="module")
def others(setup, tmp_path_factory):
    """Weights of the student's shapes but for their classes, which are other ones."""
    folder = tmp_path_factory.mktemp("others")
    detector = detectors.build("rtmdet_pico", 2)
    params, stats = detector.init(jax.random.PRNGKey(5))
    weights.save(folder, detector, params, stats, classes=["cat", "dog"], image_size=(64, 64))
    return folder


@pytest.mark.filterwarnings("ignore:the classifiers of")
def test_a_whole_examination(setup, others, strengths, monkeypatch):
    """Of a student that starts from weights of other classes, which is no fault; its teacher is of random numbers."""
    monkeypatch.setattr(
        gradients, "measure_gradients", lambda *_: strengths
    )  # which takes longest, and is tested above
    config = setup[0].config.copy_and_resolve_references()
    config.student.weights = str(others)
    config.optimizer.lr = 0.0
    found = list(examine.examine(config, image_count=8))
    kinds = [finding.what for finding in found]
    assert kinds == [
        "train data", "val data", "small objects", "learning rate", "moving average", "teacher's class map", "teacher",
        "sizes", "mkd's taps", "student's class map", "memory", "programs", "student's head", "loss_box", "loss_cls",
        "mkd/alignment", "mkd/feature", "mkd/frequency", "mkd/multiscale",
    ]  # fmt: skip
    assert set(faults(found)) <= {"teacher", "moving average"}
    said = {finding.what: finding.said for finding in found}
    names = ", ".join(setup[0].dataset.classes)
    assert said["teacher's class map"] == f"the weights' are, in the same order, the data's 6: {names}"
    assert said["student's class map"].startswith(f"its classifiers start anew for the data's 6: {names}; ")
    assert "the weights' 2, cat, dog, are not used" in said["student's class map"]


def test_nothing_is_computed_that_would_not_fit(setup, monkeypatch):
    monkeypatch.setattr(examine, "check_weights", lambda *_: [])
    monkeypatch.setattr(examine, "check_memory", lambda *_: [Finding(FAULT, "memory", "none")])
    monkeypatch.setattr(gradients, "measure_gradients", lambda *_: pytest.fail("computed"))
    assert list(examine.examine(setup[0].config))[-1].what == "memory"


def test_the_class_map_of_weights(setup, others, tmp_path):
    made, _ = setup
    [finding, kept] = models.check_class_map("teacher", made.config.teacher, made.dataset)
    assert kept and finding.level == FINE
    config = made.config.copy_and_resolve_references()
    for count, named in ((6, None), (6, "meta"), (2, None)):
        detector = detectors.build("rtmdet_pico", count)
        state = weights.to_torch(detector, *detector.init(jax.random.PRNGKey(5)))
        np.savez(tmp_path / "w.npz", **state)
        config.student.weights = str(tmp_path / "w.npz")
        with pytest.MonkeyPatch.context() as patched:
            if named:  # as of a .pth of mmengine
                patched.setattr(folder, "read_checkpoint", lambda path, state=state: (state, list("abcdef")))
            finding, kept = models.check_class_map("student", config.student, made.dataset)
        assert kept == (count == 6 and not named)
        if named:
            assert "the weights' 6, a, b, c, d, e, f, are not used" in finding.said
        elif kept:
            assert "do not name their classes" in finding.said
        else:
            assert "start anew" in finding.said and "those of the weights, are not used" in finding.said


def test_taps_and_their_shapes(setup):
    made, _ = setup
    [finding] = models.check_taps(made)
    assert finding.what == "mkd's taps"
    assert finding.said == (
        "student neck (8: 8x8x32, 16: 4x4x32, 32: 2x2x32), teacher neck (8: 8x8x32, 16: 4x4x32, 32: 2x2x32)"
    )
    [finding] = models.check_taps(made._replace(student=detectors.build("fcos_r18", 6)))
    assert finding.said.endswith("; 64, 128 have no partner and are left out")


def test_memory_is_that_of_the_machine_and_its_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path / "max")
    count = jax.local_device_count()
    everything = memory.available()
    assert everything * count > 2**30 * 0.5
    memory.MEMORY.write_text("MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  8000 kB\n")
    assert memory.available() == 8000 * 1024 // count
    for limit, wanted in (("max", 8000 * 1024), ("4096000", 4096000), ("99999999999", 8000 * 1024)):
        memory.GROUP.write_text(f"{limit}\n")
        assert memory.available() == wanted // count


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_verb_examines_the_run_of_its_flags(monkeypatch, capsys):
    seen = []
    command = ["doctor", f"--config={ROOT / 'configs/quickstart.py'}:ssim", "--config.optimizer.lr=0.25"]
    for level, code in ((LOOK, 0), (FAULT, 1)):
        found = [Finding(FINE, "sizes", "well"), Finding(level, "mkd", "see start")]
        monkeypatch.setattr(examine, "examine", lambda config, found=found: seen.append(config) or found)
        assert cli.main(command) == code
        assert f"mkd{' ' * 19}see start\n{code} faults, {1 - code} to look at, 1 fine" in capsys.readouterr().out
    assert list(seen[0].methods) == ["ssim"] and seen[0].optimizer.lr == 0.25
    for wrong, told in (
        ("--config=configs/nix.py", "No such file or directory: 'configs/nix.py'"),
        ("--config.optimizer.lrr=1", "no such setting: config.optimizer.lrr"),
        ("nonsense", "'nonsense' is no flag"),
    ):
        assert cli.main([*command, wrong]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("kdjax: ") and told in line
