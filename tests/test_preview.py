"""The contact sheet shows the batches that would be trained on."""

import contextlib

import cv2
import numpy as np

from kdjax import data
from kdjax.evals import pictures
from kdjax.train import config as settings
from kdjax.train import loop, preview


def test_a_sheet_of_every_stage(tmp_path, capsys):
    config = settings.base()
    config.update(dict(batch_size=24, steps=40, seed=5))
    config.data.update(dict(cache=str(tmp_path), scenes_train=20, scenes_val=2, image_size=(64, 96), check=True))
    config.data.augment.update(dict(mosaic=True, mixup=1.0, cache=6))
    config.data.stage2.start = 30
    dataset = data.open_dataset(config.data)
    files = preview.save(dataset, config, tmp_path / "run")
    assert {step: file.name for step, file in files.items()} == {6: "batch_000006.png", 30: "batch_000030.png"}
    batches = data.train_batches(dataset, config.data, batch_size=24, seed=5, start_step=6)
    with contextlib.closing(batches):
        batch = next(batches)
    boxes, labels = ([batch[name][row][batch["valid"][row]] for row in range(8)] for name in ("boxes", "labels"))
    expected = pictures.contact_sheet(list(batch["image"][:8]), boxes, labels, dataset.classes, 4)
    np.testing.assert_array_equal(cv2.imread(str(files[6]))[:, :, ::-1], expected)
    assert sum(map(len, boxes)) > 0

    config.optimizer.warmup = 4
    config.data.stage2.start = 0
    assert loop.run(config, None) is None
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pictures of batch 6")]
    assert cv2.imread(line.split(": ")[1]).shape == (2 * 213 + 8, 4 * 320 + 3 * 8, 3)
