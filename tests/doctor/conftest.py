"""What the tests of the doctor share."""

import jax
import pytest

from kdjax import data, detectors, weights
from kdjax.training import checks
from kdjax.training.setup import prepare
from tests.faults.config import DETECTOR, OPTIONS
from tests.support.runs import one_device, random_teacher, tiny_config


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with one_device():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(setup, batch) of a tiny run with a random teacher, before its first step."""
    folder = tmp_path_factory.mktemp("doctor")
    # The maps of these random detectors are small, so that MKD with its own weight would dominate the losses.
    config = tiny_config(folder, teacher=random_teacher(folder), methods__mkd__weight=0.02)
    with one_device():
        setup = prepare(config, data.open_dataset(config.data))
        return setup, checks.first_batch_with_objects(setup)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory):
    """Weights with the student's shapes, except for their two other classes."""
    folder = tmp_path_factory.mktemp("others")
    detector = detectors.build(DETECTOR, 2, **OPTIONS)
    params, stats = detector.init(jax.random.PRNGKey(5))
    weights.save(folder, detector, params, stats, classes=["cat", "dog"], image_size=(64, 64))
    return folder
