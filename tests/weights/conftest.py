"""A detector with its weights, and the same weights as a PyTorch state dict."""

import jax
import pytest

from kdjax import weights
from kdjax.detectors import build


@pytest.fixture(scope="module")
def detector():
    return build("rtmdet_pico", 3)


@pytest.fixture(scope="module")
def variables(detector):
    return detector.init(jax.random.key(0))


@pytest.fixture(scope="module")
def state(detector, variables):
    """A state dict of PyTorch."""
    return weights.to_torch(detector, *variables)
