"""The teacher's cache: steps with it equal live ones to the bit; what it does not fit is refused by name."""

import concurrent.futures
import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from kdjax import cli, data, methods, sharding, weights
from kdjax.data import shards
from kdjax.distill import Distiller
from kdjax.errors import UserError
from kdjax.training import checks, replay
from kdjax.training import run as training
from kdjax.training.run import run
from kdjax.training.setup import placed, prepare
from kdjax.weights.checkpoint import fingerprint
from tests.support.models import refused
from tests.support.runs import STEPS, killed_after, random_teacher, tiny_config

METHODS = "mkd+cwd+crosskd+rm"


def config_of(folder, *, method=METHODS, **changes):
    changes = {"twin": False, "data__scenes_train": 12, "student__detector": "rtmdet_pico"} | changes
    return tiny_config(folder, teacher="quickstart_teacher", method=method, **changes)


@pytest.fixture(scope="module")
def setup(folder):
    config = config_of(folder)
    return prepare(config, data.open_dataset(config.data))


@pytest.fixture
def with_settings(setup, folder):
    return lambda **changes: setup._replace(config=config_of(folder, **changes))


def batches(setup, stored, start=0):
    config = setup.config
    return data.train_batches(
        setup.dataset,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        fit=setup.student.fit,
        attach=replay.attach(setup, stored or {}),
    )


def train(setup, stored=None, *, start=0, stop=STEPS, states=None):
    """The metrics of the student's updates, and its states after each."""
    state = jax.device_put(states or jax.device_get(setup.states["student"]), sharding.replicated(setup.mesh))
    metrics, after = [], {}
    with contextlib.closing(batches(setup, stored, start)) as loader:
        for step in range(start, stop):
            given = training.given(setup, "student", placed(setup, next(loader)))
            state, values = setup.steps["student"](state, *given)
            metrics.append(jax.device_get(values))
            if step + 1 in (STEPS // 2, stop):
                after[step + 1] = jax.device_get(state)
    return metrics, after


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def check_replay(live, cached):
    """Twenty steps, and ten more after ten, with a cache and without."""
    stored = replay.ready(cached)
    metrics, after = train(live)
    again, after_again = train(cached, stored)
    assert_same(again, metrics)
    assert_same(after_again, after)
    rest, last = train(cached, replay.ready(cached), start=STEPS // 2, states=after_again[STEPS // 2])
    assert_same(rest, metrics[STEPS // 2 :])
    assert_same(last[STEPS], after[STEPS])
    names = {name for name, value in metrics[-1].items() if "/" in name and value != 0}
    assert {"mkd/feature", "cwd/cwd", "crosskd/classes", "crosskd/boxes", "rm/rank"} <= names
    assert all(values["finite"] for values in metrics)


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 2])
def test_twenty_steps_with_a_cache_are_those_without(with_settings, tmp_path, views):
    """To the bit: MKD, CWD, CrossKD and RM at once, with Mosaic, MixUp and a second stage."""
    common = dict(data__views=views)
    check_replay(with_settings(**common), with_settings(**common, teacher__cache=str(tmp_path / "cache")))


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 2])
def test_eight_devices_with_a_cache_are_those_without(folder, tmp_path, monkeypatch, views):
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: Mesh(np.array(jax.devices()[:8]), ("data",)))
    config = config_of(folder, data__views=views)
    live = prepare(config, data.open_dataset(config.data))
    assert live.mesh.size == 8
    cached = live._replace(config=config_of(folder, data__views=views, teacher__cache=str(tmp_path / "cache")))
    check_replay(live, cached)


@pytest.mark.slow
def test_a_killed_run_with_a_cache_ends_as_one_without(folder, tmp_path):
    live = run(config_of(folder, method="mkd"), tmp_path / "live")
    cached = config_of(folder, method="mkd", teacher__cache=str(tmp_path / "cache"))
    with killed_after(STEPS // 2):
        run(cached, tmp_path / "cached")
    assert run(cached, tmp_path / "cached") == live
    for name, value in weights.load(tmp_path / "live" / "student")[1].items():
        assert_same(weights.load(tmp_path / "cached" / "student")[1][name], value)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_shorter_numbers_are_within_their_bound(with_settings, tmp_path, kind):
    cached = with_settings(data__views=1, teacher__cache=str(tmp_path / "c"), teacher__cache_dtype=kind)
    live = with_settings(data__views=1)
    stored = replay.ready(cached)
    with contextlib.closing(batches(live, None)) as plain, contextlib.closing(batches(cached, stored)) as read:
        exact, short = placed(live, next(plain))["teacher"], next(read)["teacher"]
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(exact))
    assert len(leaves) == 13
    for (path, value), found in zip(leaves, jax.tree.leaves(short), strict=True):
        error = np.abs(found.astype(np.float64) - value)
        if kind == "bfloat16":
            bound = 2.0**-8 * np.abs(value)
        else:
            spatial = tuple(range(1, value.ndim - 1))
            bound = np.ptp(value, spatial, keepdims=True).astype(np.float64) / 510 + 2e-7 * np.abs(value)
        assert (error <= bound).all(), path
        assert error.any(), path
    size = {"bfloat16": 0.5, "int8": 0.3}[kind]
    assert stored[""].entry_bytes < size * sum(value[0].nbytes for _, value in leaves) + 600 * 8


def write(setup):
    return replay.write(setup, setup.teachers[0])


@pytest.fixture(scope="module")
def written(setup, folder, tmp_path_factory):
    """The folder of a complete cache with two views, in files of 8 entries."""
    cache = tmp_path_factory.mktemp("written") / "cache"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "ENTRIES", 8)
        write(setup._replace(config=config_of(folder, data__views=2, teacher__cache=str(cache))))
    return cache


def of_written(folder, written, **changes):
    return config_of(folder, **{"data__views": 2, "teacher__cache": str(written)} | changes)


def refusal(setup, config, **changes) -> str:
    with pytest.raises(UserError) as told:
        write(setup._replace(config=config, **changes))
    return str(told.value)


def test_seeds_and_batch_sizes_share_views(setup, folder, written, capsys):
    before = sorted(path.stat().st_mtime_ns for path in written.iterdir())
    write(setup._replace(config=of_written(folder, written, seed=5)))
    assert "writing" not in capsys.readouterr().out
    write(setup._replace(config=of_written(folder, written, batch_size=4)))
    assert "was written with rows of a device 8, now 4: equal to the bit only where" in capsys.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in written.iterdir()) == before


@pytest.mark.user_input("A teacher's cache", "of another teacher", "refused: the hash of its weights differs")
def test_another_teacher_is_refused(setup, folder, written):
    [teacher] = setup.teachers
    variables = jax.tree.map(lambda leaf: leaf + 1e-3, teacher.variables)
    other = teacher._replace(variables=variables, sha256=fingerprint(variables))
    told = refusal(setup, of_written(folder, written), teachers=(other,))
    assert f"config.teacher.cache: {written} was written for other runs (the hash of the teacher's weights was " in told
    assert told.endswith("choose another folder, or delete it to have it written again") and told.count("was '") == 0


@pytest.mark.user_input("A teacher's cache", "of other images", "refused: the hash of the images differs")
def test_other_data_is_refused(setup, folder, written):
    config = of_written(folder, written, data__scenes_train=13)
    told = refusal(setup, config, dataset=data.open_dataset(config.data))
    assert "(the hash of the training images, boxes and classes was " in told


@pytest.mark.user_input(
    "A teacher's cache", "of another augmentation, size, seed or view", "refused: the settings that differ are named"
)
def test_another_augmentation_is_refused(setup, folder, written):
    told = refusal(setup, of_written(folder, written, data__augment__flip=0.25))
    assert "(config.data.augment.flip was 0.5, is 0.25): choose another folder" in told
    told = refusal(setup, of_written(folder, written, data__views=3, data__image_size=(64, 96)))
    assert "(config.data.image_size was [64, 64], is [64, 96]; config.data.views was 2, is 3)" in told
    told = refusal(setup, of_written(folder, written, teacher__cache_dtype="int8"))
    assert "(config.teacher.cache_dtype was 'float32', is 'int8')" in told


@pytest.mark.user_input("A teacher's cache", "that lacks taps of a method", "refused: the taps are named")
def test_other_taps_are_refused(setup, folder, written, tmp_path):
    config = config_of(folder, method="rm", data__views=2, teacher__cache=str(tmp_path / "rm"))
    ranks = prepare(config, setup.dataset)
    assert (
        not replay.needs(ranks, ranks.teachers[0]).entries == []
        and len(replay.needs(ranks, ranks.teachers[0]).leaves) == 1
    )
    write(ranks._replace(config=of_written(folder, written, method="rm")))  # a part of what is there
    shards.make_folder(tmp_path / "rm")
    shards.create(replay.new(ranks, ranks.teachers[0], replay.needs(ranks, ranks.teachers[0])))
    told = refusal(setup, of_written(folder, tmp_path / "rm"))
    assert "lacks taps of the teacher that the methods read (neck/0, neck/1, neck/2, cls_tower/0/0, " in told
    assert "; it has rows/logits: choose another folder, or write it for all methods" in told


@pytest.mark.user_input("A teacher's cache", "on a disk that is too small", "refused before anything is written")
def test_a_small_disk_is_refused(setup, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "room", lambda _: 10**6)
    told = refusal(setup, config_of(folder, teacher__cache=str(tmp_path / "cache")))
    assert "160 entries of 67,880 bytes take " in told and "has 1.0 MB free: choose another disk, " in told
    assert not (tmp_path / "cache").exists()


def test_sparse_needs_logits(setup, folder, tmp_path):
    told = refusal(
        setup._replace(teachers=prepare(config_of(folder, method="cwd"), setup.dataset).teachers),
        config_of(folder, method="cwd", teacher__cache=str(tmp_path / "cache"), teacher__cache_dtype="sparse"),
    )
    assert told == (
        "config.teacher.cache_dtype: sparse stores the best logits of rows, and cwd reads none: take float32, bfloat16 "
        "or int8"
    )


def test_interrupted_writing_continues_and_a_damaged_file_is_refused(setup, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "ENTRIES", 8)
    config = config_of(folder, data__views=1, teacher__cache=str(tmp_path))
    added, add = iter(range(10**6)), shards.Writer.add

    def interrupted(*args):
        if next(added) == 13:
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patched:
        patched.setattr(shards.Writer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(setup._replace(config=config))
    assert "writing what the teacher says: 24 entries of 67,880 bytes" in capsys.readouterr().out
    both = [setup._replace(config=config)] * 2
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(write, both)
    assert capsys.readouterr().out.count("writing what the teacher says: 12 entries") == 1
    assert first == second
    assert not first.missing(replay.needs(both[0], both[0].teachers[0]).entries)
    path = first.path(8)
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(setup, config) == (
        f"config.teacher.cache: {path}: it is damaged: delete this file, and the same command writes it again"
    )
    path.unlink()
    write(setup._replace(config=config))
    assert "writing what the teacher says: 4 entries" in capsys.readouterr().out


@pytest.mark.user_input(
    "A teacher's cache", "for methods that ask the teacher about boxes", "refused: the method is named"
)
def test_a_teacher_that_is_asked_cannot_be_cached(folder, tmp_path):
    small = dict(base_channels=4, neck_channels=8, head_channels=16, proposals=20, region_samples=12, rpn_samples=16)
    options = {f"student__options__{name}": value for name, value in small.items()}
    teacher = random_teacher(tmp_path, "faster_rcnn_r18", tiny_config(folder, teacher=None), **small)
    changes = dict(student__detector="faster_rcnn_r18", twin=False, teacher__cache=str(tmp_path / "cache"), **options)
    config = tiny_config(folder, teacher=teacher, method="dkd", **changes)
    dataset = data.open_dataset(config.data)
    with pytest.raises(
        UserError, match="cache: dkd asks the second stage or the decoder of the teacher faster_rcnn_r18"
    ):
        replay.ready(prepare(config, dataset))
    assert (
        prepare(tiny_config(folder, teacher=teacher, method="cwd", **changes), dataset).teachers[0].observer is not None
    )


@pytest.mark.user_input(
    "Config and flags", "a teacher's cache without a teacher, or of an unknown kind", "refused: the setting is named"
)
def test_settings_of_the_cache_are_checked(folder, capsys):
    for changes, told in (
        (
            dict(teacher__cache_dtype="int4"),
            "config.teacher.cache_dtype must be one of float32, bfloat16, int8, sparse, not 'int4'",
        ),
        (dict(teacher__cache_dtype="int8"), "config.teacher.cache_dtype has no effect without config.teacher.cache"),
        (dict(teacher__cache="gs://a/b"), "config.teacher.cache: gs://a/b is a URL"),
    ):
        with pytest.raises(UserError, match=told):
            checks.check_settings(config_of(folder, **changes))
    with pytest.raises(UserError, match=r"config\.teacher\.cache has no effect without a teacher"):
        checks.check_settings(tiny_config(folder, teacher=None, teacher__cache="a"))
    with pytest.raises(UserError, match=r"config\.data\.views must be"):
        checks.check_settings(tiny_config(folder, teacher=None, data__views=-1))
    told = refused(capsys, "cache", "--config=quickstart")
    assert told.startswith("kdjax: config.teacher.cache is missing: set the folder to write")


def test_a_step_reads_the_location_of_rows_of_a_cache(setup):
    """It has no batch axis and is not stored."""
    [teacher] = setup.teachers
    distiller = Distiller(setup.student, teacher.detector, {"rm": methods.build("rm")})
    rows = teacher.observer.output.rows
    assert rows.location is None and rows.level_sizes == (64, 16, 4)
    found = distiller._with_places(teacher.observer.output, {"image": np.zeros((8, 64, 64, 3), np.uint8)})
    np.testing.assert_array_equal(found.rows.location, teacher.detector.priors((64, 64)))


def test_the_command_writes_and_checks_a_cache(folder, tmp_path, capsys):
    config = config_of(folder)
    flags = [f"--config.data.cache={config.data.cache}", f"--config.compile_cache={config.compile_cache}"]
    flags += ["--config.data.image_size=64,64", "--config.data.scenes_train=12", "--config.data.scenes_val=10"]
    flags += ["--config.steps=40", "--config.optimizer.warmup=4", f"--config.teacher.cache={tmp_path / 'c'}"]
    command = ["cache", "--config=quickstart:rm", "--config.data.views=1", *flags]
    assert cli.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert "writing what the teacher says: 12 entries of 2,024 bytes" in out[0]
    assert out[-1].startswith(f"{tmp_path / 'c'}: 12 entries, ") and out[-1].endswith("float32: complete for this run")
    assert cli.main(command) == 0
    assert "writing" not in capsys.readouterr().out
    [path] = (tmp_path / "c").glob("*.array_record")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = refused(capsys, *command)
    assert told == (
        f"kdjax: config.teacher.cache: {path}: it is damaged: delete this file, and the same command writes it again"
    )
