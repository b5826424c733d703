"""The guide to an own detector works as it is printed: a file in a folder of the user's is trained."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from kdjax import detectors, plugins, sharding, weights
from kdjax.errors import UserError
from kdjax.training import config as settings
from kdjax.training import run
from tests.shared import ROOT

GUIDE = (ROOT / "docs" / "add_a_detector.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the guide, named by KDJAX_PLUGINS; kdjax forgets it afterwards."""
    (tmp_path / "plugins" / "detectors").mkdir(parents=True)
    (tmp_path / "plugins" / "detectors" / "dots.py").write_text(BLOCKS["detectors/dots.py"])
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "plugins"))
    monkeypatch.setattr(detectors, "__path__", list(detectors.__path__))
    yield tmp_path
    sys.modules.pop("kdjax.detectors.dots", None)
    vars(detectors).pop("dots", None)


def test_the_detector_is_found_and_passes_its_test(folder):
    assert "dots" in detectors.families() and "dots_m" in detectors.names()
    assert detectors.options("dots_s") == {"channels": None}
    assert detectors.build("dots_s", 3, channels=8).options == {"channels": 8}
    with pytest.raises(UserError, match="dots_s has no option width: its options are channels"):
        detectors.build("dots_s", 3, width=8)
    code: dict = {}
    exec(BLOCKS["tests/test_dots.py"], code)
    code["test_a_point_in_the_box_learns_it"]()


def test_the_detector_trains_two_steps(folder, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
    config = settings.base()
    config.update(dict(batch_size=2, steps=2, log_every=1, compile_cache=str(ROOT / ".cache" / "jax")))
    config.student.detector = "dots_s"
    config.student.options.channels = 8
    config.data.update(dict(cache=str(folder / "cache"), scenes_train=4, scenes_val=2, image_size=(64, 64)))
    config.optimizer.warmup = 1
    config.eval.batch_size = 2
    run.run(config, folder / "run")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained[-1]["step"] == 2 and any(key.endswith("loss_box") for key in trained[-1])
    detector, *_ = weights.load(folder / "run" / "student")
    assert detector is detectors.build("dots_s", detector.num_classes, channels=8)


def test_a_missing_folder_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="KDJAX_PLUGINS: there is no folder .*nowhere"):
        detectors.families()
