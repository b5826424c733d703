"""Weights that set themselves: with `config.methods.NAME.weight="auto"` a method holds its share of the gradient.

A program of its own measures the gradients of the detection losses and of each method with respect to the parameters
of the student's neck, where both meet, on the batch of the next step: before the steps 0, 1, 2, 4, 8, ... and every
`config.auto_weight.every` steps. With their norms at the published weights,

    r_m = |g_m| / (|g_detection| + sum of |g_j| over the methods j of fixed weight)
    log r_m <- KEPT log r_m + (1 - KEPT) log(r_m measured)
    f_m <- f_m clip(t / (1 - T) / (f_m r_m), 1/10, 10), within `config.auto_weight.bounds`

f_m is the factor by which all published weights of the method are multiplied, T = `config.auto_weight.share` the share
of all methods with a weight of their own, t = T divided by their number. With one method this is the rule of RT-DETRv4,
w <- w clip(t (1 - p) / (p (1 - t)), 1/10, 10) with the share p = f r / (1 + f r). A schedule of the method is not
looked at: it multiplies the weight. Factors and smoothed ratios are a part of the state, so that resumption is exact.

Reference: Liao et al., "RT-DETRv4", 2025 (`kdjax.distill.method.guided_weight` is its form, once an epoch).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from kdjax.detectors.api import Detector
from kdjax.distill import Distiller, Distillers
from kdjax.distill.teachers import RECORDED
from kdjax.errors import UserError
from kdjax.structs import Array, DetectorOutput, PyTree, targets_of
from kdjax.training.config import AUTO, Config

KEPT = 0.7  # of the logarithm of a ratio, when a new one is measured


def auto_methods(config: Config) -> tuple[str, ...]:
    """The methods whose weight is "auto", by name, with several teachers by "teacher/method"."""
    groups = {"": config.methods} | {f"{name}/": one.methods for name, one in config.teachers.items()}
    chosen = {start + name: options for start, methods in groups.items() for name, options in methods.items()}
    return tuple(name for name, options in chosen.items() if options.get("weight") == AUTO)


def is_measured(config: Config) -> bool:
    """Whether a run measures the shares of its methods."""
    return bool(auto_methods(config)) or (config.auto_weight.log and bool(config.methods or config.teachers))


def check(config: Config) -> None:
    """Checks `config.auto_weight`, beside the ranges of its numbers.

    Raises:
      UserError: names the setting and what it must be.
    """
    chosen = config.auto_weight
    if not 0 < chosen.share < 1:
        raise UserError(f"config.auto_weight.share must be above 0 and below 1, not {chosen.share!r}")
    low, high = (*chosen.bounds, 0, 0)[:2]
    if len(chosen.bounds) != 2 or not 0 < low < high:
        raise UserError(f"config.auto_weight.bounds must be two ascending numbers above 0, not {tuple(chosen.bounds)}")
    if not low <= chosen.start <= high:
        raise UserError(f"config.auto_weight.start must be within its bounds {low} .. {high}, not {chosen.start!r}")
    if chosen.log and not (config.methods or config.teachers):
        raise UserError("config.auto_weight.log has no effect without a teacher and methods")


def initial(config: Config, methods: Sequence[str]) -> PyTree:
    """`TrainState.weights` before the first measurement; None if nothing is measured.

    Args:
      config: the settings of the run.
      methods: all names.
    """
    if not is_measured(config):
        return None
    auto = auto_methods(config)
    empty = {name: jnp.float32(0) for name in methods}
    return {
        "factor": {name: jnp.float32(config.auto_weight.start) for name in auto},
        "ratio": {name: jnp.float32(0) for name in auto},  # logarithms
        "share": empty,
        "conflict": empty,
    }


def scaled(weights: Mapping[str, Array | float], state: PyTree) -> dict[str, Any]:
    """The weights of all terms in a step.

    Args:
      weights: {"method/term": weight} as published, of `Distiller.weights`.
      state: `TrainState.weights`.
    """
    factors = {} if state is None else state["factor"]
    return {name: w * factors.get(name.rpartition("/")[0], 1.0) for name, w in weights.items()}


def is_due(step: int, every: int) -> bool:
    """Whether shares are measured before a step (from 0)."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def make_measure(
    student: Detector, distiller: Distiller | Distillers, config: Config
) -> Callable[[Any, PyTree, Mapping[str, Any]], PyTree]:
    """The program that measures the shares and sets the weights.

    Args:
      student, distiller: as the step has them.
      config: the settings of the run.

    Returns:
      (`TrainState`, variables of the teachers, batch) -> the next `TrainState.weights`: "factor" of the methods with a
      weight of their own, "ratio" their smoothed log r; of all methods "share", of the sum of all norms with the
      weights in use, and "conflict", the cosine with the gradient of the detection losses, -1 .. 1.
    """
    auto = auto_methods(config)
    names = list(distiller.methods)
    low, high = config.auto_weight.bounds
    wanted = config.auto_weight.share / (1 - config.auto_weight.share) / max(len(auto), 1)  # t / (1 - T)

    def measure(state: Any, variables: PyTree, batch: Mapping[str, Any]) -> PyTree:  # noqa: ANN401 - a TrainState
        neck, losses = losses_at_neck(student, distiller, state, batch)

        def parts(neck: list[Array]) -> Array:
            values = losses(neck, state.params["adapters"], variables)[0]
            weights = {f"{name}/{term}": w for name, m in distiller.methods.items() for term, w in m.weights.items()}
            own = sum(value for name, value in values.items() if name not in weights)
            of_methods = [
                sum(w * values[term] for term, w in weights.items() if term.rpartition("/")[0] == name)
                for name in names
            ]
            return jnp.stack([jnp.asarray(own), *map(jnp.asarray, of_methods)])

        _, pull = jax.vjp(parts, neck)
        # Not in a loop of the program: on CPUs XLA runs convolutions there several times slower.
        gradients = [pull(chosen)[0] for chosen in np.eye(1 + len(names), dtype=np.float32)]
        norms = [jnp.sqrt(sum(jnp.sum(g * g) for g in one)) for one in gradients]
        products = [sum(jnp.sum(g * own) for g, own in zip(one, gradients[0], strict=True)) for one in gradients]
        of_method = dict(zip(names, norms[1:], strict=True))
        before = state.weights
        rest = norms[0] + sum(norm for name, norm in of_method.items() if name not in auto)
        factor, ratio = dict(before["factor"]), dict(before["ratio"])
        for name in auto:
            found = jnp.log(of_method[name] / rest)
            usable = jnp.isfinite(found)
            smooth = jnp.where(state.step == 0, found, KEPT * ratio[name] + (1 - KEPT) * found)
            ratio[name] = jnp.where(usable, smooth, ratio[name])
            change = jnp.clip(wanted / (factor[name] * jnp.exp(ratio[name])), 0.1, 10.0)
            factor[name] = jnp.where(usable, jnp.clip(factor[name] * change, low, high), factor[name])
        used = {name: norm * factor.get(name, 1.0) for name, norm in of_method.items()}
        total = norms[0] + sum(used.values())
        tiny = jnp.finfo(jnp.float32).tiny
        pairs = zip(products[1:], norms[1:], strict=True)
        cosines = [product / jnp.maximum(norms[0] * norm, tiny) for product, norm in pairs]
        return {
            "factor": factor,
            "ratio": ratio,
            "share": {name: norm / jnp.maximum(total, tiny) for name, norm in used.items()},
            "conflict": dict(zip(names, cosines, strict=True)),
        }

    return measure


def losses_at_neck(
    student: Detector,
    distiller: Distiller | Distillers | None,
    state: Any,  # noqa: ANN401 - a TrainState; its module imports this one
    batch: Mapping[str, Any],
) -> tuple[list[Array], Callable[[list[Array], PyTree, PyTree], tuple[dict[str, Array], DetectorOutput]]]:
    """All losses and terms as a function of the parameters of the student's neck.

    Args:
      student: of the run.
      distiller: of the run; None: the detection losses alone.
      state: a `TrainState`.
      batch: on the devices, with objects.

    Returns:
      The parameters of the neck, and (these, parameters of the methods, variables of the teachers) ->
      ({name: f32[]}, output of the student); terms are "method/term", unweighted.
    """
    leaves, structure = jax.tree.flatten(state.params["student"])
    in_neck = neck_parameters(
        lambda params: student.apply(params, state.stats, student.preprocess(batch["image"]), train=True)[0],
        state.params["student"],
    )

    def losses(neck: list[Array], adapters: PyTree, variables: PyTree) -> tuple[dict[str, Array], DetectorOutput]:
        new = iter(neck)
        params = structure.unflatten(
            [next(new) if inside else leaf for leaf, inside in zip(leaves, in_neck, strict=True)]
        )
        output, _ = student.apply(params, state.stats, student.preprocess(batch["image"]), train=True)
        key = jax.random.fold_in(state.key, state.step)
        assignment = student.assign(output, targets_of(batch), key)
        values = dict(student.loss(output, targets_of(batch), assignment))
        if distiller:
            assert variables is not None, "a distiller needs the variables of its teacher"
            observed = batch.get(RECORDED)
            values |= distiller.terms(
                adapters, output, batch, variables, observed=observed, assignment=assignment, key=key
            )
        return values, output

    return [leaf for leaf, inside in zip(leaves, in_neck, strict=True) if inside], losses


def neck_parameters(output_of: Callable[[PyTree], DetectorOutput], params: PyTree) -> list[bool]:
    """Which leaves of the parameters belong to the neck: its maps depend on them, those of the backbone do not.

    Args:
      output_of: params -> output of the detector; traced, not run.
      params: of the detector.

    Returns:
      One bool per leaf, in the order of `jax.tree.leaves`. Without backbone taps, all parameters before the neck count.
    """

    def maps(params: PyTree) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        output = output_of(params)
        return output.neck, output.backbone

    closed, shapes = jax.make_jaxpr(maps, return_shape=True)(params)
    traced, count = closed.jaxpr, len(shapes[0])
    neck = _dependencies(traced, traced.outvars[:count])
    backbone = _dependencies(traced, traced.outvars[count:])
    return [v in neck and v not in backbone for v in traced.invars]


def _dependencies(traced: Jaxpr, outputs: Sequence[Any]) -> set[Any]:
    """The variables of a jaxpr on which its outputs depend."""
    needed = {v for v in outputs if not isinstance(v, Literal)}
    for equation in reversed(traced.eqns):
        if needed.intersection(equation.outvars):
            needed |= {v for v in equation.invars if not isinstance(v, Literal)}
    return needed
