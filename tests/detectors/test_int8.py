"""Detectors that learn to compute with 8 bits: where they round, what they observe, and which weights they take."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import detectors, nn, weights
from kdjax.detectors import layers
from kdjax.detectors.api import flatten, is_rounded, ranges, switched
from kdjax.errors import UserError
from kdjax.training.step import init_state, make_step
from tests.support.int8 import observed, tiny
from tests.support.models import OTHERS

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
FAMILIES = {
    "rtmdet_pico": {},
    "rtmdet_nano": {"widen": 0.0625, "activation": "hard_swish"},
    "yolox_pico": {"widen": 0.0625, "activation": "relu"},
} | {name: OTHERS[name] for name in ("fcos_r18", "gfl_r18", "atss_r18", "retinanet_r18")}


def inputs_of_convolutions(detector, variables, monkeypatch):
    """The maps and kernels that every convolution of a detector gets."""

    def run(params, stats, x):
        found = []

        def conv2d(x, kernel, bias=None, **form):
            found.append((x, kernel))
            return plain(x, kernel, bias, **form)

        with monkeypatch.context() as patch:
            patch.setattr(layers.nn, "conv2d", conv2d)
            detector.apply(params, stats, x, train=False)
        return found

    plain = nn.conv2d
    return jax.jit(run)(*variables, detector.preprocess(IMAGES))


def check_bytes(detector, monkeypatch):
    variables = observed(detector, IMAGES)
    for x, kernel in inputs_of_convolutions(detector, variables, monkeypatch):
        assert len(np.unique(x)) <= 256, x.shape
        assert all(len(np.unique(one)) <= 255 for one in np.moveaxis(kernel, -1, 0)), kernel.shape
    return variables


def test_convolutions_get_bytes(monkeypatch):
    params, stats = check_bytes(tiny(), monkeypatch)
    found = flatten(stats)
    own = [path.removeprefix("stats/") for path in ranges(tiny()) if not path.endswith("/on")]
    assert all(found[f"{path[:-4]}high"] > found[f"{path[:-4]}low"] for path in own if path.endswith("high"))
    off = inputs_of_convolutions(tiny(), (params, switched(stats, jnp.float32(0))), monkeypatch)
    assert any(len(np.unique(x)) > 256 for x, _ in off), "not rounded before"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_convolutions_of_detectors_get_bytes(name, monkeypatch):
    detector = detectors.build(name, 3, int8=True, **FAMILIES[name])
    params, stats = check_bytes(detector, monkeypatch)
    # Not rounded, it is the detector without the option.
    plain = detectors.build(name, 3, **FAMILIES[name])
    assert flatten(plain.shapes[0]) == flatten(detector.shapes[0])
    own = {path: value for path, value in flatten(stats).items() if path in flatten(plain.shapes[1])}
    x = detector.preprocess(IMAGES)
    off = jax.jit(lambda *given: detector.apply(*given, train=False)[0].cls_logits)(params, switched(stats, 0.0), x)
    without = jax.jit(lambda *given: plain.apply(*given, train=False)[0].cls_logits)(
        params, detectors.api.unflatten(own), x
    )
    for one, other in zip(off, without, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_ranges_are_moving_averages():
    layer = layers.for_int8(layers.Quantiser)()
    batches = [jnp.array([-1.0, 3.0]), jnp.array([-2.0, 1.0]), jnp.array([0.5, 9.0])]
    low = high = 0.0
    for number, batch in enumerate(batches):
        np.testing.assert_array_equal(layer(batch, True), batch)  # observed, but not rounded
        rate = 1.0 if number == 0 else 0.01
        low, high = low + rate * (min(0, float(batch.min())) - low), high + rate * (float(batch.max()) - high)
        np.testing.assert_allclose([layer.low.get_value(), layer.high.get_value()], [low, high], rtol=1e-6)
    layer(jnp.array([-99.0, 99.0]), False)
    np.testing.assert_allclose(layer.high.get_value(), high, rtol=1e-6)
    layer.on.set_value(jnp.float32(1e-6))  # as a moving average has it after the first step that rounds
    x = jnp.linspace(-5, 5, 100)
    np.testing.assert_allclose(layer(x, False), nn.fake_quantise(x, *nn.affine(low, high)), rtol=1e-5, atol=1e-6)


def batches():
    rng = np.random.default_rng(1)
    while True:
        yield {
            "image": rng.integers(0, 255, (2, 64, 64, 3), np.uint8),
            "boxes": np.array([[[4, 4, 40, 40]], [[20, 8, 60, 30]]], np.float32),
            "labels": np.array([[1], [2]], np.int32),
            "valid": np.ones((2, 1), bool),
            "image_size": np.full((2, 2), 64, np.int32),
        }


def test_a_run_rounds_from_its_step_on_and_resumes_to_the_bit():
    detector, optimizer = tiny(), optax.sgd(1e-3)
    traces, update = [], make_step(detector, optimizer, lambda at: 0.01, int8_from=2)
    step = jax.jit(lambda *given: (traces.append(given), update(*given))[1])
    params, stats = observed(detector, IMAGES)
    state = init_state(detector, jax.random.PRNGKey(0), (params, switched(stats, np.float32(0))), {}, optimizer)
    kept, source, before = [], batches(), flatten(params)
    for number in range(4):
        batch = next(source)
        kept.append((jax.tree.map(np.array, state), batch))
        state, metrics = step(state, None, batch)
        assert metrics["finite"] == 1
        assert is_rounded(state.stats) == is_rounded(state.ema["stats"]) == (number >= 2)
    assert len(traces) == 1, "one program"
    still = [path for path, value in flatten(state.params["student"]).items() if np.array_equal(value, before[path])]
    assert not still, "every parameter has a gradient"
    assert all(flatten(state.stats)[path] != flatten(stats)[path] for path in ("sum/high", "cls/outputs/0/low"))
    again = kept[2][0]
    for _, batch in kept[2:]:
        again, _ = step(again, None, batch)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_float_weights_can_begin_a_run_in_int8(tmp_path):
    plain, rounding = (detectors.build("yolox_pico", 2, widen=0.0625, **more) for more in ({}, {"int8": True}))
    params, stats = plain.init(jax.random.key(0))
    weights.save(tmp_path / "float", plain, params, stats, classes=["a", "b"], image_size=(64, 64))
    loaded, found, of_ranges, _ = weights.load(tmp_path / "float", rounding)
    assert loaded is rounding and not is_rounded(of_ranges)
    assert flatten(found).keys() == flatten(params).keys()
    assert flatten(of_ranges).keys() == flatten(rounding.shapes[1]).keys()
    # PyTorch's names hold the weights alone.
    state = weights.to_torch(rounding, found, of_ranges)
    assert state.keys() == weights.to_torch(plain, params, stats).keys()
    again = weights.from_torch(rounding, state)
    assert all(np.array_equal(value, flatten(again[0])[path]) for path, value in flatten(params).items())
    assert flatten(again[1]).keys() == flatten(of_ranges).keys()
    weights.save(tmp_path / "int8", rounding, *again, classes=["a", "b"], image_size=(64, 64))
    assert weights.load(tmp_path / "int8")[0] is rounding
    with pytest.raises(UserError, match=r"with options .*'int8': True.*, not for yolox_pico"):
        weights.load(tmp_path / "int8", plain)


@pytest.mark.user_input("Config and flags", "an activation that there is not", "refused: with the names")
@pytest.mark.parametrize("name", ["rtmdet_pico", "yolox_pico"])
def test_activations(name):
    with pytest.raises(UserError, match=r"activation of .* must be one of silu, relu, hard_swish, not 'gelu'"):
        detectors.build(name, 2, activation="gelu")
    chosen = detectors.build(name, 2, activation="relu")
    assert chosen.options == {"activation": "relu"} and detectors.build(name, 2, activation="silu").options == {}
    assert flatten(chosen.shapes[0]).keys() == flatten(detectors.build(name, 2).shapes[0]).keys()
    x = jnp.linspace(-4, 4, 9)
    for kind, wanted in (("silu", jax.nn.silu), ("relu", jax.nn.relu), ("hard_swish", jax.nn.hard_swish)):
        np.testing.assert_allclose(layers.Activation(layers.ACTIVATIONS[kind])(x, False), wanted(x), rtol=1e-6)
