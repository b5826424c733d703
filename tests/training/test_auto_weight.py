"""Weights that set themselves: a method's share of the gradient at the neck, whatever the weight at the start."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.commands import settings as flags
from kdjax.distill import Custom, Distiller, Method, Reads
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput
from kdjax.training import auto_weight, checks
from kdjax.training import config as settings
from kdjax.training.models import all_methods
from kdjax.training.run import run
from kdjax.training.step import init_state, make_step
from tests.support.arrays import quick_jit
from tests.support.runs import killed_after, tiny_config

BATCH = {
    "image": np.full((2, 2, 2, 3), 4, np.uint8),
    "image_size": np.full((2, 2), 2, np.int32),
    "boxes": np.ones((2, 1, 4), np.float32),
    "labels": np.ones((2, 1), np.int32),
    "valid": np.ones((2, 1), bool),
}


def student() -> Any:
    """Its neck has two weights: the detection loss has the gradient (4, 0)."""

    def output(params):
        return DetectorOutput(strides=(1,), neck=(jnp.ones((2, 1, 1, 2)) * params["neck"],))

    return SimpleNamespace(
        spec=lambda size: DetectorOutput(strides=(1,), neck=(jax.ShapeDtypeStruct((1, 1, 1, 2), jnp.float32),)),
        preprocess=lambda images: images.astype(jnp.float32),
        apply=lambda params, stats, x, train: (output(params), stats),
        assign=lambda output, targets, key: None,
        loss=lambda output, targets, assignment: {"detection": 4 * output.neck[0][..., 0].mean()},
    )


def method(name: str, along: int, strength: float) -> Method:
    """A term whose gradient at the neck has one direction."""
    return Method(
        init=lambda *_: {},
        apply=lambda params, context: {"x": strength * context.student.neck[0][..., along].mean()},
        weights={"x": 2.0},
        reads=Reads(("neck",), ("neck",)),
        name=name,
    )


def made(start: float, auto=("a",), **chosen):
    """The config of a run, its distiller with the methods a and b, its state, and the program that measures."""
    config = settings.base()
    with config.unlocked():
        config.methods = {name: {"weight": auto_weight.AUTO if name in auto else 2.0} for name in ("a", "b")}
    config.auto_weight.update(dict(start=start, **chosen))
    teacher = Custom(spec=student().spec, observe=lambda variables, batch: student().apply(variables, {}, 0, False)[0])
    distiller = Distiller(student(), teacher, [method("a", 0, -3.0), method("b", 1, 0.5)])
    variables = {"neck": jnp.ones(2)}
    weights = auto_weight.initial(config, ["a", "b"])
    state = init_state(student(), jax.random.PRNGKey(0), (variables, {}), {"a": {}, "b": {}}, optax.sgd(0.1), weights)
    measure = quick_jit(auto_weight.make_measure(student(), distiller, config))
    return distiller, state, lambda state: state._replace(weights=measure(state, variables, BATCH)), variables


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_a_method_comes_to_its_share_whatever_its_first_weight(start):
    _, state, measured, _ = made(start, share=0.25)
    for _ in range(4):
        state = measured(state)
    # |g| are 4 (detection), 2 * 3 (a, against it) and 2 * 0.5 (b, fixed, across it): f * 6 = 5 / 3.
    np.testing.assert_allclose(state.weights["factor"]["a"], 5 / 18, rtol=1e-5)
    assert set(state.weights["factor"]) == {"a"}
    np.testing.assert_allclose(state.weights["share"]["a"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(state.weights["share"]["b"], 1 / (5 + 5 / 3), rtol=1e-5)
    np.testing.assert_allclose(state.weights["conflict"]["a"], -1.0, rtol=1e-6)
    np.testing.assert_allclose(state.weights["conflict"]["b"], 0.0, atol=1e-6)


def test_several_methods_have_the_same_part_of_the_share_and_a_weight_its_bounds():
    _, state, measured, _ = made(1.0, auto=("a", "b"), share=0.6)
    for _ in range(2):
        state = measured(state)
    for name, norm in (("a", 6.0), ("b", 1.0)):  # 0.3 / 0.4 of the detection loss each
        np.testing.assert_allclose(state.weights["factor"][name], 3.0 / norm, rtol=1e-5)
        np.testing.assert_allclose(state.weights["share"][name], 0.3, rtol=1e-5)
    _, state, measured, _ = made(1.0, auto=("a", "b"), share=0.6, bounds=(0.8, 2.0))
    factors = measured(state).weights["factor"]
    np.testing.assert_allclose([factors["a"], factors["b"]], [0.8, 2.0])


def test_a_ratio_is_smoothed_after_the_first_measurement():
    """With logarithms: a term that is ten times stronger in one batch counts 10 ** 0.3 times."""
    _, state, measured, _ = made(1.0, share=0.25)
    state = measured(state)._replace(step=jnp.int32(50))
    before = float(state.weights["factor"]["a"])
    ratio = state.weights["ratio"] | {"a": state.weights["ratio"]["a"] - np.log(10)}
    state = measured(state._replace(weights=state.weights | {"ratio": ratio}))
    np.testing.assert_allclose(state.weights["factor"]["a"], before * 10**0.7, rtol=1e-5)


def test_the_step_uses_the_weight():
    distiller, state, _, variables = made(7.0)
    step = quick_jit(make_step(student(), optax.sgd(0.1), lambda _: 0.5, distiller=distiller))
    new, metrics = step(state, variables, BATCH)
    np.testing.assert_allclose(metrics["total"], 4 - 7 * 2 * 3 + 2 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(new.params["student"]["neck"], [1 - 0.1 * (4 - 42), 1 - 0.1], rtol=1e-5)
    assert auto_weight.scaled({"a/x": 2.0, "b/x": 2.0}, state.weights) == {"a/x": 14.0, "b/x": 2.0}


def test_when_it_is_measured():
    assert [step for step in range(25) if auto_weight.is_due(step, 10)] == [0, 1, 2, 4, 8, 10, 20]
    assert all(auto_weight.is_due(step, 1) for step in range(9))


def test_a_flag_sets_a_weight_to_auto_and_back():
    def read(*chosen):
        return flags.read("quickstart:mkd", chosen)

    auto = read("--config.methods.mkd.weight=auto")
    assert auto_weight.auto_methods(auto) == ("mkd",)
    assert all_methods(auto)["mkd"].weights == all_methods(flags.read("quickstart:mkd"))["mkd"].weights
    teacher = ("--config.teachers.t.methods=mkd+cwd", "--config.teachers.t.methods.cwd.weight=auto")
    assert auto_weight.auto_methods(read(*teacher)) == ("t/cwd",)
    assert read("--config.methods.mkd.weight=0.5").methods.mkd.weight == 0.5
    auto.methods.mkd.weight = "much"
    with pytest.raises(UserError, match=r"config\.methods\.mkd: weight must be a number or 'auto', not 'much'"):
        checks.check_settings(auto)
    auto.methods.mkd.weight = "auto"
    checks.check_settings(auto)


@pytest.mark.user_input("Config and flags", "an automatic weight that cannot be", "refused: the setting is named")
@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (
            ["methods.mkd.weight=automatic"],
            r"\.methods\.mkd\.weight: it must be a number or auto, not 'automatic'",
        ),
        (["methods.mkd.feature_weight=auto"], r"config\.methods\.mkd\.feature_weight: it must be a number, not 'auto'"),
        (["auto_weight.share=1"], r"config\.auto_weight\.share must be above 0 and below 1, not 1\.0"),
        (["auto_weight.every=0"], r"config\.auto_weight\.every must be >= 1"),
        (["auto_weight.bounds=(2,1)"], r"config\.auto_weight\.bounds must be two ascending numbers above 0"),
        (["auto_weight.bounds=(1,)"], r"config\.auto_weight\.bounds must be two ascending numbers above 0"),
        (["auto_weight.start=1e9"], r"config\.auto_weight\.start must be within its bounds"),
    ],
)
def test_what_cannot_be_is_refused(chosen, words):
    with pytest.raises(UserError, match=words):
        checks.check_settings(flags.read("quickstart:mkd", [f"--config.{flag}" for flag in chosen]))


@pytest.mark.slow
def test_a_run_holds_the_share_and_goes_on_exactly(folder, teacher_folder, tmp_path):
    def config(weight):
        made = tiny_config(folder, teacher=teacher_folder, method="cwd", log_every=1, checkpoint__every=8, steps=16)
        made.methods.cwd.weight = auto_weight.AUTO
        made.auto_weight.update(dict(every=4, start=weight))
        return made

    def rows(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "train"]

    run(config(1.0), tmp_path / "whole")
    with killed_after(8):
        run(config(1.0), tmp_path / "stopped")
    run(config(1.0), tmp_path / "stopped")
    for whole, stopped in zip(rows("whole"), rows("stopped"), strict=True):
        kept = [name for name in whole if name.startswith(("student", "twin", "weight", "share", "conflict"))]
        assert all(whole[name] == stopped[name] for name in kept) and "weight/cwd/cwd" in kept
    run(config(1000.0), tmp_path / "strong")
    last, strong = rows("whole")[-1], rows("strong")[-1]
    assert rows("strong")[0]["weight/cwd/cwd"] > 10 * rows("whole")[0]["weight/cwd/cwd"]
    assert 0.2 < last["share/cwd"] < 0.4 and 0.2 < strong["share/cwd"] < 0.4
    assert -1 <= last["conflict/cwd"] <= 1
