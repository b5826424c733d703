"""Checks of losses and terms at the first step: values, and shares of the gradient at the student's neck."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import methods, sharding
from kdjax.distill.teachers import RECORDED
from kdjax.doctor.findings import ERROR, OK, Finding
from kdjax.structs import Array, PyTree, targets_of
from kdjax.training import auto_weight
from kdjax.training.checks import where_of
from kdjax.training.setup import Setup, with_host
from kdjax.training.step import Batch, TrainState

MAX_INITIAL_SCORE = 0.1  # mean probability of a class; a classifier with a focal prior starts at 0.01
DOMINANT, NEGLIGIBLE = 0.97, 1e-3  # largest and smallest share of the gradient for a method
# A weight that is FAR times the published one, or a FARth of it, is an error if the term has more than MOST, or less
# than FEW, of the gradient.
FAR, MOST, FEW = 100, 0.5, 0.03


class Measured(NamedTuple):
    """Losses and terms on one batch at step 0, unweighted."""

    values: dict[str, float]  # by name; terms are "method/term"
    grad_norms: dict[str, float]  # norm of the gradient of each with respect to the parameters of the neck
    score: float | None  # mean probability of a class; None without class logits


def measure_gradients(setup: Setup, batch: Mapping[str, np.ndarray], adapters: PyTree = None) -> Measured:
    """Measures the losses and terms on one batch at step 0, and their gradients at the student's neck.

    Args:
      setup: of the run.
      batch: with objects.
      adapters: parameters of the methods; None: those of the state.
    """
    student, distiller, state = setup.student, setup.distiller, setup.states["student"]
    adapters = adapters or state.params["adapters"]
    placed = sharding.shard_batch(setup.mesh, with_host(setup, batch))

    @jax.jit
    def measured(
        state: TrainState, adapters: PyTree, variables: PyTree, batch: Batch
    ) -> tuple[dict[str, Array], dict[str, Array], Array | None]:
        state, adapters, variables = setup.layout.whole((state, adapters, variables))
        neck, losses = auto_weight.losses_at_neck(student, distiller, state, batch)

        def stacked(neck: list[Array]) -> tuple[Array, tuple[dict[str, Array], Array | None]]:
            values, output = losses(neck, adapters, variables)
            logits = student.rows(output).logits
            score = None if logits is None else jnp.mean(jax.nn.sigmoid(logits))
            return jnp.stack([values[name] for name in sorted(values)]), (values, score)

        _, pull, (values, score) = jax.vjp(stacked, neck, has_aux=True)
        norms = jax.lax.map(lambda chosen: optax.tree.norm(pull(chosen)[0]), jnp.eye(len(values), dtype=jnp.float32))
        return values, dict(zip(sorted(values), norms, strict=True)), score

    values, norms, score = jax.device_get(measured(state, adapters, setup.variables, placed))
    values, norms = ({name: float(value) for name, value in found.items()} for found in (values, norms))
    return Measured(values, norms, None if score is None else float(score))


def train_adapters(setup: Setup, batch: Mapping[str, np.ndarray]) -> PyTree:
    """Parameters of the methods after 30 steps of Adam on one batch.

    Some adapters start near zero (FGFI, DeFeat), and their terms have almost no gradient before they are trained.

    Args:
      setup: of the run.
      batch: with objects.

    Returns:
      {method: params}.
    """
    student, distiller, state, optimizer = setup.student, setup.distiller, setup.states["student"], optax.adam(1e-3)
    assert distiller is not None, "the run has no methods"

    @jax.jit
    def trained(state: TrainState, variables: PyTree, batch: Batch) -> PyTree:
        state, variables = setup.layout.whole((state, variables))
        output, _ = student.apply(state.params["student"], state.stats, student.preprocess(batch["image"]), train=True)
        assignment = student.assign(output, targets_of(batch), state.key)
        observed: Any = batch.get(RECORDED)
        if observed is None:
            observed = distiller.observe(batch, variables)

        def total(adapters: PyTree) -> Array:
            terms = distiller.terms(
                adapters, output, batch, variables, observed=observed, assignment=assignment, key=state.key
            )
            return jnp.asarray(sum(terms.values()))

        def update(_: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            adapters, moments = carry
            updates, moments = optimizer.update(jax.grad(total)(adapters), moments)
            return optax.apply_updates(adapters, updates), moments

        adapters = state.params["adapters"]
        return jax.lax.fori_loop(0, 30, update, (adapters, optimizer.init(adapters)))[0]

    return trained(state, setup.variables, sharding.shard_batch(setup.mesh, with_host(setup, batch)))


def gradient_shares(setup: Setup, grad_norms: Mapping[str, float]) -> dict[str, float]:
    """The share of the gradient at the student's neck that each loss, term and method has at its full weight.

    Args:
      setup: of the run.
      grad_norms: those of `Measured`.
    """
    weights = _weights(setup)
    norms = {name: weights.get(name, 1.0) * norm for name, norm in grad_norms.items()}
    total = sum(norms.values())
    norms |= {name: sum(norms[f"{name}/{term}"] for term in m.weights) for name, m in setup.methods.items()}
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


def _weights(setup: Setup) -> dict[str, float]:
    """The full weight of each term."""
    return {f"{name}/{term}": float(w) for name, m in setup.methods.items() for term, w in m.weights.items()}


def check_initial_scores(measured: Measured) -> list[Finding]:
    """Checks that the student's classifier starts near zero everywhere, because most rows are background."""
    if measured.score is None:
        return []
    losses = ", ".join(f"{name} {value:.3g}" for name, value in measured.values.items() if "/" not in name)
    message = f"initial mean probability of a class {measured.score:.2g}, {losses}"
    if measured.score > MAX_INITIAL_SCORE:
        message += ": the loss of the background dominates the first steps: set the classifier's bias to -4.6"
        return [Finding(ERROR, "student's head", message)]
    return [Finding(OK, "student's head", message)]


def check_terms(setup: Setup, measured: Measured) -> list[Finding]:
    """Checks each loss and term by its value and its share of the gradient, and each method as a whole.

    Args:
      setup: of the run; its methods count with their full weights.
      measured: of `measure_gradients`.
    """
    findings, shares = [], gradient_shares(setup, measured.grad_norms)
    auto = auto_weight.auto_methods(setup.config)
    published = {
        f"{name}/{term}": w
        for name in setup.methods
        for term, w in methods.build(name.rpartition("/")[2]).weights.items()
    }
    weights = _weights(setup)
    factors = {name: weights[name] / weight for name, weight in published.items() if weight and name in weights}
    for name, value in measured.values.items():
        norm, factor = measured.grad_norms[name], factors.get(name, 1.0)
        level, message = OK, f"value {value:.3g}, {shares[name]:.1%} of the gradient at the neck"
        if not (math.isfinite(value) and math.isfinite(norm)):
            level, message = ERROR, f"value {value}, norm of the gradient {norm}: it cannot be trained"
        elif (0 < factor <= 1 / FAR and shares[name] < FEW) or (factor >= FAR and shares[name] > MOST):
            level, effect = ERROR, "has almost no effect" if factor < 1 else "dominates the others"
            message += f": at {factor:.2g} times its published weight it {effect}: see {where_of(_owner(name))}"
        findings.append(Finding(level, name, message))
    for name in setup.methods:
        message, key = f"{shares[name]:.2g} of the gradient at the neck", f"{where_of(name)}.weight"
        if name in auto and shares[name] > 0:
            share = setup.config.auto_weight.share / len(auto)
            findings.append(Finding(OK, name, f"{message} with its published weight; auto makes it {share:.2g}"))
        elif shares[name] < NEGLIGIBLE:
            findings.append(Finding(ERROR, name, f"{message}: almost no effect: raise {key} or check its taps"))
        elif shares[name] > DOMINANT:
            findings.append(Finding(ERROR, name, f"{message}: it dominates the detector's losses: lower {key}"))
    return findings


def _owner(term: str) -> str:
    return term.rpartition("/")[0]
