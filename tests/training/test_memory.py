"""What a step needs, what the machine has, and the batch size that follows from both."""

import json
import math
import types

import jax
import pytest

from kdjax import data, sharding
from kdjax.commands import settings as command_line
from kdjax.errors import UserError
from kdjax.training import checks, memory, provenance
from kdjax.training import run as training
from kdjax.training.run import run
from tests.support.runs import tiny_config

GIB = 2**30


def sized(monkeypatch, need, have, images=1000):
    """What `fill` chooses for a step that needs `need(batch)` GiB, with `have` GiB; and the sizes that it compiled."""
    asked = []
    monkeypatch.setattr(memory, "available", lambda: have * GIB)
    monkeypatch.setattr(
        memory, "need", lambda config, _: asked.append(config.batch_size) or need(config.batch_size) * GIB
    )
    dataset = types.SimpleNamespace(splits={"train": types.SimpleNamespace(size=images)})
    config = command_line.read("quickstart", ["--config.batch_size=auto", "--config.optimizer.lr=0"])
    assert config.batch_size == "auto"
    least = memory.with_size(config, memory.sizes(config)[0])
    return memory.fill(least, dataset).batch_size, asked


def test_the_largest_batch_that_fits_is_chosen(monkeypatch, capsys):
    """1 GiB and 0.1 for each image, of 10: 8 may be used, 70 images fit, and the power of two below is 64."""
    assert sized(monkeypatch, lambda size: 1 + 0.1 * size, 10) == (64, [1, 2, 64])
    step, rate = capsys.readouterr().out.splitlines()[-1].split("; ")
    assert step == "batch size 64: a step needs about 7.40 GiB of the 10.00 GiB of a device"
    assert rate == "learning rate: the linear rule gives 0.001"
    assert sized(monkeypatch, lambda size: 1 + 0.1 * size, 10, images=50)[0] == 32
    assert sized(monkeypatch, lambda size: 1e-3 * size, 10)[0] == memory.MOST
    # A step that needs more than the line through the first two says is halved until it fits.
    assert sized(monkeypatch, lambda size: 1 + 0.1 * size + 0.001 * size**2, 10) == (32, [1, 2, 64, 32])
    assert sized(monkeypatch, lambda size: 4.0 * size, 10) == (2, [1, 2])
    assert sized(monkeypatch, lambda size: 5.0 * size, 10) == (1, [1, 2])
    assert sized(monkeypatch, lambda size: 1.0 if size < 4 else math.inf, 10) == (2, [1, 2, 256, 128, 64, 32, 16, 8, 4])


def test_a_machine_without_memory_for_one_image_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"a step of 1 images needs about 9.00 GiB, more than 80% of the 10.00 GiB"):
        sized(monkeypatch, lambda size: 9.0 * size, 10)


@pytest.mark.slow
def test_a_step_needs_more_for_more_images(folder, teacher_folder):
    """By about the same for each image, so that a line forecasts it."""
    dataset = data.open_dataset(tiny_config(folder, teacher=teacher_folder).data)
    needs = [memory.need(tiny_config(folder, teacher=teacher_folder, batch_size=size), dataset) for size in (2, 4, 8)]
    slope = (needs[1] - needs[0]) / 2
    assert slope > 64 * 64 * 3 * 4  # at least the image itself
    assert needs[2] == pytest.approx(needs[0] + 6 * slope, rel=0.2)


class Started(Exception):
    """A run has found its batch size."""


def test_a_run_starts_with_what_fits_and_goes_on_with_it(folder, tmp_path, monkeypatch, capsys):
    config = tiny_config(folder, teacher=None, batch_size="auto")

    def started(config, _):
        raise Started(config.batch_size)

    monkeypatch.setattr(training, "prepare", started)
    monkeypatch.setattr(memory, "need", lambda config, _: config.batch_size * GIB)
    monkeypatch.setattr(memory, "available", lambda: 10 * GIB)
    with pytest.raises(Started, match="8"):
        run(config, tmp_path)
    told = capsys.readouterr().out
    assert "batch size 8: a step needs about 8.00 GiB of the 10.00 GiB of a device" in told
    assert "config.optimizer.lr stays 0.002 (the linear rule gives 0.000125)" in told
    provenance.write_config(memory.with_size(config, 4), tmp_path, "data")
    monkeypatch.setattr(memory, "available", lambda: 0)  # another machine: the run goes on as it was begun
    with pytest.raises(Started, match="4"):
        run(config, tmp_path)


@pytest.mark.slow
def test_a_run_finds_its_batch_size_and_keeps_it(folder, tmp_path, monkeypatch, capsys):
    config = tiny_config(folder, teacher=None, batch_size="auto")
    monkeypatch.setattr(memory, "need", lambda config, _: config.batch_size * GIB)
    monkeypatch.setattr(memory, "available", lambda: 10 * GIB)
    results = run(config, tmp_path)
    told = capsys.readouterr().out
    assert "batch size 8: a step needs about 8.00 GiB of the 10.00 GiB of a device" in told
    assert "config.optimizer.lr stays 0.002 (the linear rule gives 0.000125)" in told
    assert json.loads((tmp_path / "config.json").read_text())["config"]["batch_size"] == 8
    monkeypatch.setattr(memory, "available", lambda: 0)  # another machine: the run goes on as it was begun
    again = run(config, tmp_path)
    assert "batch size" not in (told := capsys.readouterr().out)
    assert "all steps are done" in told
    assert again["student"]["AP"] == results["student"]["AP"]


def test_batches_share_out_the_images_without_labels():
    """Of each size that is tried the devices can share both kinds of images."""
    flags = ["--config.batch_size=auto", "--config.data.unlabelled_ratio=0.3"]
    config = command_line.read("quickstart", flags)
    assert memory.sizes(config) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    config.data.unlabelled = "images"
    assert memory.sizes(config) == [2, 4, 8, 16, 32, 64, 128, 256]  # 0.3 of one image is none
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda: sharding.mesh_of(jax.devices()[:2]))
        assert memory.sizes(config) == [8, 32, 128]  # 2, 10 and 38 images; of 4 it is 1, of 16 it is 5
        config.data.unlabelled_ratio = 0.001
        assert memory.sizes(config) == [2]
    with pytest.raises(UserError, match=r"config\.data\.unlabelled_ratio"):
        checks.check_settings(memory.with_size(config, 2))


@pytest.mark.user_input(
    "Config and flags", "config.batch_size='auto' where nothing is trained", "refused: give a number"
)
def test_only_runs_find_their_batch_size(tmp_path):
    config = command_line.read("quickstart", ["--config.batch_size=auto"])
    sentence = r"config\.batch_size='auto': only a training run finds it: give a number here"
    with pytest.raises(UserError, match=sentence):
        checks.checked(config)
    config.data.check = True
    with pytest.raises(UserError, match=sentence):
        run(config, tmp_path)


@pytest.mark.parametrize("value", ["many", "4.5", "Auto", "0", "-8"])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match=r"config\.batch_size"):
        checks.check_settings(command_line.read("quickstart", [f"--config.batch_size={value}"]))
