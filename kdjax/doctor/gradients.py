"""The losses and terms of a run at its first step: values, and shares of the gradient at the student's neck."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from kdjax import methods
from kdjax.doctor.findings import FAULT, FINE, Finding
from kdjax.structs import targets_of
from kdjax.training import sharding
from kdjax.training.setup import Setup

PRIOR = 0.1  # mean probability of a class at the start; a head with its focal prior has 0.01
DROWNED, NOTHING = 0.97, 1e-3  # share of the gradient at the neck that a method may have
FAR, MOST, FEW = 100, 0.5, 0.03  # a weight this many times the published one or its inverse, and the share it may have


def measure_gradients(setup: Setup, batch: dict, adapters: dict | None = None) -> tuple[dict, dict, float]:
    """Every loss and term on one batch at step 0, unweighted, and how hard it pulls at the student's neck.

    Args:
      setup, batch: of the run, with objects.
      adapters: what the methods train beside the student, if not as it is at the start.

    Returns:
      (values, pulls, start): {name: value}, {name: norm of its gradient with respect to the neck's parameters}, and the
      mean probability that the student gives to a class.
    """
    student, distiller, state = setup.student, setup.distiller, setup.states["student"]
    adapters = adapters or state.params["adapters"]

    def total(neck, state, adapters, variables, batch, chosen):
        params = state.params["student"] | {"neck": neck}
        output, _ = student.apply(params, state.stats, student.preprocess(batch["image"]), train=True)
        targets = targets_of(batch)
        assignment = student.assign(output, targets, state.key)
        values = student.loss(output, targets, assignment)
        if distiller:
            values |= distiller.terms(adapters, output, batch, tuple(variables), assignment=assignment, key=state.key)
        start = jnp.mean(jax.nn.sigmoid(student.class_logits(output)))
        return jnp.dot(chosen, jnp.stack([values[name] for name in sorted(values)])), (values, start)

    batch = sharding.shard_batch(setup.mesh, batch)
    arguments = (state.params["student"]["neck"], state, adapters, setup.variables, batch)
    names = sorted(jax.eval_shape(total, *arguments, 0.0)[1][0])
    gradient, pulls = jax.jit(jax.grad(total, has_aux=True)), {}
    bar = tqdm(names, desc="losses and terms", unit="term", leave=False)
    for name, chosen in zip(bar, np.eye(len(names), dtype=np.float32), strict=True):
        grads, (values, start) = gradient(*arguments, chosen)
        pulls[name] = math.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
    return {name: float(value) for name, value in values.items()}, pulls, float(start)


def train_adapters(setup: Setup, batch: dict) -> dict:
    """What the methods train beside the student, after 30 steps of Adam on one batch: {method: params}.

    Some adapters start near zero (FGFI, DeFeat) and let no gradient through before they have grown.
    """
    student, distiller, state, optimizer = setup.student, setup.distiller, setup.states["student"], optax.adam(1e-3)

    @jax.jit
    def grow(state, variables, batch):
        output, _ = student.apply(state.params["student"], state.stats, student.preprocess(batch["image"]), train=True)
        assignment = student.assign(output, targets_of(batch), state.key)
        observed = distiller.observe(batch, tuple(variables))

        def total(adapters):
            terms = distiller.terms(
                adapters, output, batch, tuple(variables), observed=observed, assignment=assignment, key=state.key
            )
            return sum(terms.values())

        def update(_, carry):
            adapters, moments = carry
            updates, moments = optimizer.update(jax.grad(total)(adapters), moments)
            return optax.apply_updates(adapters, updates), moments

        adapters = state.params["adapters"]
        return jax.lax.fori_loop(0, 30, update, (adapters, optimizer.init(adapters)))[0]

    return grow(state, setup.variables, sharding.shard_batch(setup.mesh, batch))


def gradient_shares(setup: Setup, pulls: dict) -> dict[str, float]:
    """The share of every loss, term and method, with its full weight, of the gradient at the student's neck.

    Args:
      setup: of the run.
      pulls: of `measure_gradients`.
    """
    weights = {f"{name}/{term}": w for name, m in setup.methods.items() for term, w in m.weights.items()}
    pulls = {name: float(weights.get(name, 1.0)) * pull for name, pull in pulls.items()}
    pulls |= {method: sum(pulls[f"{method}/{term}"] for term in m.weights) for method, m in setup.methods.items()}
    everything = sum(pulls[name] for name in pulls if name not in setup.methods)
    return {name: pull / everything if everything else 0.0 for name, pull in pulls.items()}


def check_initial_scores(values: dict, start: float) -> list[Finding]:
    """The student's head at the start: nearly all places are background."""
    said = f"classes start at a mean probability of {start:.2g}, loss_cls at {values['loss_cls']:.3g}"
    if start > PRIOR:
        said += ": the head lacks its focal prior (a bias of -4.6), and the background drowns the first steps"
        return [Finding(FAULT, "student's head", said)]
    return [Finding(FINE, "student's head", said)]


def check_terms(setup: Setup, values: dict, pulls: dict) -> list[Finding]:
    """Every term with its value and its share of the gradient at the student's neck; methods are judged as a whole.

    Args:
      setup: of the run; its methods count with their full weight.
      values, pulls: of `measure_gradients`.
    """
    found, share = [], gradient_shares(setup, pulls)
    published = {f"{name}/{term}": w for name in setup.methods for term, w in methods.build(name).weights.items()}
    weights = {f"{name}/{term}": w for name, m in setup.methods.items() for term, w in m.weights.items()}
    times = {name: weights[name] / weight for name, weight in published.items() if weight}
    for name, value in values.items():
        said = f"value {value:.3g}, {share[name]:.1%} of the gradient at the neck"
        level, far = FINE, times.get(name, 1.0)
        if not (math.isfinite(value) and math.isfinite(pulls[name])):
            level, said = FAULT, f"its value is {value}, its gradient {pulls[name]}: it cannot be trained"
        elif (0 < far <= 1 / FAR and share[name] < FEW) or (far >= FAR and share[name] > MOST):
            level, effect = FAULT, "does next to nothing" if far < 1 else "drowns the others"
            said += f": with {far:.2g} times its published weight it {effect}, see config.methods.{name.split('/')[0]}"
        found.append(Finding(level, name, said))
    for method in setup.methods:
        key = f"config.methods.{method}.weight"
        if share[method] < NOTHING:
            said = f"{share[method]:.1e} of the gradient at the neck: it does next to nothing; raise {key}, or look"
            found.append(Finding(FAULT, method, f"{said} at its taps"))
        elif share[method] > DROWNED:
            said = (
                f"{share[method]:.1%} of the gradient at the neck: the detector's own losses are drowned; lower {key}"
            )
            found.append(Finding(FAULT, method, said))
    return found
