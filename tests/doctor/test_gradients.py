"""Terms that are too strong, too weak or not finite are named; sound ones are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors, methods
from kdjax.distill import Distiller
from kdjax.doctor import gradients
from kdjax.doctor.gradients import check_initial_scores, check_terms, measure_gradients
from kdjax.training import auto_weight
from tests.support.findings import errors

TERMS = ("feature", "multiscale", "frequency", "alignment")


def with_methods(setup, chosen):
    return setup._replace(distiller=dataclasses.replace(setup.distiller, methods=chosen))


@pytest.fixture(scope="module")
def measured(tiny):
    return measure_gradients(*tiny)


def test_sound_terms_are_ok(tiny, measured):
    findings = [*check_initial_scores(measured), *check_terms(tiny[0], measured)]
    assert not errors(findings)
    assert {finding.subject for finding in findings} == {
        "student's head",
        "loss_cls",
        "loss_box",
        *(f"mkd/{term}" for term in TERMS),
    }


@pytest.mark.parametrize("name", ["rtmdet_pico", "yolox_pico", "fcos_r18"])
def test_the_neck_is_found_by_what_its_maps_depend_on(name):
    """These three call its parameters "neck"; the function does not know that."""
    detector = detectors.build(name, 2)
    params, stats = detector.init(jax.random.PRNGKey(0))
    x = np.zeros((1, 64, 64, 3), np.float32)
    in_neck = auto_weight.neck_parameters(lambda params: detector.apply(params, stats, x, train=True)[0], params)
    paths = [path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    assert in_neck == [first == "neck" for first in paths] and any(in_neck)


@pytest.mark.user_input(
    "Config and flags", "a term a thousand times too strong or too weak", "reported by `kdjax doctor`"
)
@pytest.mark.parametrize(("factor", "words"), [(1000.0, "dominates"), (0.001, "almost no effect")])
@pytest.mark.parametrize("which", [["feature"], ["alignment"], None], ids=["feature", "alignment", "all"])
def test_a_term_a_thousand_times_too_strong_or_too_weak_is_named(tiny, measured, which, factor, words):
    setup, mkd = tiny[0], tiny[0].methods["mkd"]
    which = which or list(mkd.weights)
    weights = {name: (factor if name in which else 1.0) * weight for name, weight in mkd.weights.items()}
    found = errors(check_terms(with_methods(setup, {"mkd": mkd._replace(weights=weights)}), measured))
    assert any(words in message for message in found.values()), found
    assert set(found) <= {"mkd", *(f"mkd/{name}" for name in which)}


@pytest.mark.slow
def test_a_method_whose_adapter_starts_near_zero_is_judged_after_training_it(tiny):
    setup, batch = tiny
    fgfi = methods.build("fgfi", weight=0.3)  # the teacher is random, and its maps are small
    distiller = Distiller(setup.student, setup.teachers[0].detector, {"fgfi": fgfi})
    state = setup.states["student"]
    adapters = distiller.init(state.key, batch["image"].shape[1:3])
    state = state._replace(params=state.params | {"adapters": adapters})
    setup = setup._replace(distiller=distiller, states={"student": state})
    before, after = (
        gradients.gradient_shares(setup, measure_gradients(setup, batch, adapters).grad_norms)["fgfi"]
        for adapters in (adapters, gradients.train_adapters(setup, batch))
    )
    assert before < gradients.NEGLIGIBLE < after, (before, after)


@pytest.mark.user_input("Config and flags", "a term that is not finite", "reported by `kdjax doctor`")
def test_a_term_that_is_not_finite_is_named(tiny, measured):
    broken = measured._replace(values=measured.values | {"mkd/feature": np.nan})
    assert "cannot be trained" in errors(check_terms(tiny[0], broken))["mkd/feature"]


def test_a_missing_focal_prior_is_named(tiny):
    setup, batch = tiny
    state = setup.states["student"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "retina_cls" in str(path) and leaf.ndim == 1 else leaf, state.params
    )
    measured = measure_gradients(setup._replace(states={"student": state._replace(params=params)}), batch)
    assert "set the classifier's bias to -4.6" in errors(check_initial_scores(measured))["student's head"]
