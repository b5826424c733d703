"""The contact sheet shows the batches of the run, the schedule the values of the trainer."""

import contextlib

import cv2
import numpy as np

from kdjax import data
from kdjax import methods as zoo
from kdjax.report import drawing, preview
from kdjax.training import config as settings
from kdjax.training import optim, run, schedule


def test_a_sheet_of_every_stage(tmp_path, capsys):
    config = settings.base()
    config.update(dict(batch_size=24, steps=40, seed=5))
    config.data.update(dict(cache=str(tmp_path), scenes_train=20, scenes_val=2, image_size=(64, 96), check=True))
    config.data.augment.update(dict(mosaic=True, mixup=1.0, cache=6))
    config.data.stage2.start = 30
    dataset = data.open_dataset(config.data)
    config.optimizer.warmup = 4
    files = preview.save(dataset, config, schedule.schedule(config), tmp_path / "run", "round")
    assert [file.name for file in files.values()] == ["batch_000006.png", "batch_000030.png", "schedule.png"]
    assert [cv2.imread(str(file)).ndim for file in files.values()] == [3, 3, 3]
    batches = data.train_batches(dataset, config.data, batch_size=24, seed=5, start_step=6)
    with contextlib.closing(batches):
        batch = next(batches)
    boxes, labels = ([batch[name][row][batch["valid"][row]] for row in range(8)] for name in ("boxes", "labels"))
    expected = drawing.contact_sheet(list(batch["image"][:8]), boxes, labels, dataset.classes, 4)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "run" / "batch_000006.png"))[:, :, ::-1], expected)
    assert sum(map(len, boxes)) > 0

    config.data.stage2.start = 0
    assert run.run(config, None) is None
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training images of batch 6")]
    assert cv2.imread(line.split(": ")[1]).shape == (2 * 213 + 8, 4 * 320 + 3 * 8, 3)


def test_the_schedule_equals_the_trainers():
    config = settings.base()
    config.update(dict(steps=40, methods=settings.methods("rtmdet_cwd+mkd")))
    config.methods.mkd.update(dict(start=3, warmup=4, stop=30, decay=5, feature_weight=0.0))
    config.data.stage2.start = 30
    config.optimizer.update(dict(lr=0.1, warmup=4))
    curves = schedule.schedule(config)
    names = {f"weight/mkd/{term}" for term in ("multiscale", "frequency", "alignment")}
    assert set(curves) == {"step", "stage", "lr", "ema", "weight/rtmdet_cwd/cwd"} | names
    np.testing.assert_array_equal(curves["step"], np.arange(40))
    np.testing.assert_array_equal(curves["stage"], [1] * 30 + [2] * 10)
    methods = {name: zoo.build(name, **options) for name, options in config.methods.items()}
    for step in (0, 2, 3, 5, 10, 20, 27, 30, 39):
        assert curves["lr"][step] == np.float32(optim.learning_rate(config)(step))
        np.testing.assert_allclose(curves["ema"][step], optim.ema_rate(config, step), rtol=1e-6)
        for name, weight in {
            f"{name}/{term}": w * m.scale(step) for name, m in methods.items() for term, w in m.weights.items()
        }.items():
            assert curves[f"weight/{name}"][step] == np.float32(weight)
    lines = preview.draw_schedule(config, curves).axes[2].lines
    assert {f"weight/{line.get_label()}" for line in lines} == names | {"weight/rtmdet_cwd/cwd"}

    config.steps, config.methods = 100_000, settings.methods("")
    curves = schedule.schedule(config)
    assert len(curves["step"]) == schedule.POINTS
    assert len(preview.draw_schedule(config, curves).axes) == 2
