"""The updates of a run, dispatched ahead of their metrics, and what is done about a bad one.

The host checks the metrics of a step when the next one has been dispatched, so that the device never waits. A step
whose loss or gradient is not finite changes nothing, and neither do those after it (`step.SOUND`): when the host has
checked them, the state before the bad step is there, and the step after it is done again.
"""

import collections
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kdjax import sharding
from kdjax.errors import UserError, fault
from kdjax.structs import Array, PyTree
from kdjax.training import auto_weight, blackbox
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.setup import Setup, bounds, given
from kdjax.training.step import SOUND, TrainState
from kdjax.weights.checkpoint import flat

SKIPS = 10  # steps in a row that may be skipped
ROLLBACKS = 3  # of a run


class BadStep(FloatingPointError):
    """A loss or gradient is not finite, or above its bound."""

    def __init__(self, message: str, roles: list[str], values: dict[str, float]) -> None:
        super().__init__(message)
        self.roles = roles  # whose update is bad
        self.values = values  # the metrics of all roles


class Dispatched(NamedTuple):
    """A step whose metrics have not been checked."""

    step: int  # number of the update, from 1
    batch: dict[str, Any]
    metrics: dict[str, Array]  # f32[] by name, "student/total"
    weights: PyTree  # `TrainState.weights` of the student before they were measured for this step; None if not
    differ: dict[str, Array]  # of a step that was computed twice: bool[n] by role, for each array whether both differ


class Updates:
    """The states of a run, and its updates."""

    def __init__(
        self, setup: Setup, checkpoints: Checkpoints, workdir: Path, dropped: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Starts from the states of the setup.

        Args:
          setup: of the run.
          checkpoints: of the run, for a rollback.
          workdir: the folder of the run, for the inputs of bad steps.
          dropped: the bad steps so far: {"step": number, "policy": what was done}.
        """
        self.setup, self.checkpoints, self.workdir = setup, checkpoints, workdir
        self.states = dict(setup.states)
        self.dropped = list(dropped)
        self.pending: collections.deque[Dispatched] = collections.deque()
        self.good = sharding.replicate(np.float32(1), setup.mesh)
        self.sound = dict.fromkeys(self.states, self.good)
        self.every = setup.config.recheck_every
        self.twice = {role: Twice(setup, role) for role in self.states} if self.every else {}

    def start(self, step: int, batch: dict[str, Any]) -> None:
        """Dispatches a step for all roles.

        Args:
          step: number of the update, from 1.
          batch: on the devices.
        """
        self.pending.append(self._update(step, batch, [*self.states]))

    def _update(self, step: int, batch: dict[str, Any], roles: list[str]) -> Dispatched:
        setup, states, weights = self.setup, self.states, None
        if setup.measure is not None and "student" in roles:
            if auto_weight.is_due(step - 1, setup.config.auto_weight.every):
                weights = states["student"].weights
                new = setup.measure(states["student"], *given(setup, "student", batch))
                states["student"] = states["student"]._replace(weights=new)
        metrics, differ = {}, {}
        for role in roles:
            variables, rows = given(setup, role, batch)
            rows[SOUND] = self.sound[role]
            twice = self.twice[role] if self.every and step % self.every == 0 else None
            copy = twice.copy(states[role]) if twice else None
            states[role], of_role = setup.steps[role](states[role], variables, rows)
            if twice and copy:
                differ[role] = twice.differ((states[role], of_role), setup.steps[role](copy, variables, rows))
            self.sound[role] = of_role["finite"]
            metrics |= {f"{role}/{name}": value for name, value in of_role.items()}
        return Dispatched(step, batch, metrics, weights, differ)

    def checked(self, ahead: int) -> list[dict[str, float]]:
        """Waits for steps and checks their metrics; on bad ones it does what `config.on_bad_step` says.

        Args:
          ahead: number of newest steps that are left for later.

        Returns:
          The metrics of the good ones on the host.

        Raises:
          FloatingPointError: a loss or gradient is not finite or above its bound, and the policy is "stop", or its
            bound is reached.
          UserError: a step that was computed twice gave different results.
        """
        rows = []
        while len(self.pending) > ahead:
            done = self.pending.popleft()
            self._check_equal(done)
            try:
                rows.append(check_finite(done.step, done.metrics, bounds(self.setup.config)))
            except BadStep as bad:
                self._drop(done, bad)
        return rows

    def _drop(self, done: Dispatched, bad: BadStep) -> None:
        """Brings the states to where the run goes on, and dispatches the steps after the bad one again."""
        config, roles, step = self.setup.config, bad.roles, done.step
        measured = next((later.weights for later in self.pending if later.weights is not None), None)
        if measured is not None and "student" in roles:
            self.states["student"] = self.states["student"]._replace(weights=measured)
        for role in roles:
            self._set_step(role, step - 1)
        told = f"{bad}; {self._keep(done, bad)}"
        policy = config.on_bad_step
        if policy == "stop":
            raise FloatingPointError(told)
        earlier = [one["step"] for one in self.dropped]
        if policy == "skip":
            if set(range(step - SKIPS, step)) <= set(earlier):
                raise FloatingPointError(f"{told}; the {SKIPS} steps before it were skipped too")
        else:
            if sum(one["policy"] == policy for one in self.dropped) >= ROLLBACKS:
                raise FloatingPointError(f"{told}; there were {ROLLBACKS} rollbacks before")
            if self.checkpoints.latest() is None:
                raise FloatingPointError(f"{told}; there is no checkpoint yet to which the run could go back")
            # Not one that a SIGTERM made, if possible: a run that was stopped goes on as if it had not been.
            restored, note = self.checkpoints.restore(self.states, every=config.checkpoint.every)
            self.states |= self.setup.layout.put(restored)
            roles = [*self.states]
            policy = f"rollback to step {note['next_batch']}"
        for role in roles:
            self._set_step(role, step)
            self.sound[role] = self.good
        self.dropped.append({"step": step, "policy": config.on_bad_step})
        if not jax.process_index():
            tqdm.write(f"kdjax: {told}; {policy}: training goes on with step {step + 1}", file=sys.stderr)
        again, self.pending = self.pending, collections.deque()
        for later in again:
            new = self._update(later.step, later.batch, roles)
            self.pending.append(new._replace(metrics=later.metrics | new.metrics, differ=later.differ | new.differ))

    def _set_step(self, role: str, step: int) -> None:
        state: TrainState = self.states[role]
        self.states[role] = state._replace(step=jax.device_put(np.int32(step), state.step.sharding))

    def _keep(self, done: Dispatched, bad: BadStep) -> str:
        """Writes the inputs of a bad step; where they are, or why not."""
        states = {role: self.states[role] for role in bad.roles}
        try:
            folder = blackbox.write(self.workdir, self.setup, done.step, states, done.batch, bad.values)
        except OSError as error:
            return f"its inputs could not be kept ({fault(error) or error})"
        if folder is None:
            return f"its inputs are not kept, because those of {blackbox.MOST} steps are"
        return f"`kdjax replay {folder}` says what began it"

    def _check_equal(self, done: Dispatched) -> None:
        for role, differ in done.differ.items():
            found = np.flatnonzero(np.asarray(sharding.gather(differ)))
            if len(found):
                names = self.twice[role].names
                raise UserError(
                    f"config.recheck_every: step {done.step} of the {role} was computed twice, and {len(found)} of "
                    f"{len(names)} arrays differ, first {names[found[0]]}: this device, its memory or its driver "
                    "cannot be trusted (on a GPU, first set XLA_FLAGS=--xla_gpu_deterministic_ops=true); checkpoints "
                    "of earlier steps may be wrong too"
                )


class Twice:
    """The programs that compute a step of a role twice and compare."""

    def __init__(self, setup: Setup, role: str) -> None:
        """Makes them; they are compiled at their first call."""
        where = setup.layout.shardings(setup.states[role])
        self.copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=where)  # a step donates
        self.differ = jax.jit(_differ, out_shardings=sharding.replicated(setup.mesh))
        self.names: list[str] = [*flat(setup.states[role], copy=False), "the metrics"]


def _differ(one: tuple[PyTree, Mapping[str, Array]], other: tuple[PyTree, Mapping[str, Array]]) -> Array:
    """Whether the bits differ, bool[n] for the leaves of the states and, last, the metrics."""

    def unequal(a: Array, b: Array) -> Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            kind = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[a.dtype.itemsize]
            a, b = jax.lax.bitcast_convert_type(a, kind), jax.lax.bitcast_convert_type(b, kind)
        return jnp.any(a != b)

    states = jax.tree.map(unequal, one[0], other[0])
    metrics = jax.tree.map(unequal, one[1], other[1])
    return jnp.stack([*jax.tree.leaves(states), jnp.any(jnp.stack(jax.tree.leaves(metrics)))])


def check_finite(step: int, metrics: Mapping[str, Array], most: Mapping[str, float] | None = None) -> dict[str, float]:
    """Fetches the metrics of a step.

    Args:
      step: number of the update, from 1.
      metrics: f32[] by name.
      most: of "total" and "grad_norm", above which a step is bad; None: no bounds.

    Returns:
      The metrics on the host.

    Raises:
      BadStep: names the first metric that is not finite, or above its bound.
    """
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    roles = [name.partition("/")[0] for name, value in values.items() if name.endswith("/finite") and value == 0]
    if roles:
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        losses = [name for name in bad if not name.endswith(("/total", "/grad_norm"))]
        if bad:
            told = f"{(losses or bad)[0]} is not finite at step {step}"
        else:
            name, bound = next((n, b) for n, b in (most or {}).items() if not values[f"{roles[0]}/{n}"] <= b)
            setting = {"total": "loss"}.get(name, name)
            told = f"{roles[0]}/{name} is {values[f'{roles[0]}/{name}']:.4g} at step {step}, above "
            told += f"config.bad_step.{setting}={bound:g}"
        term = next((name for name in losses if name.count("/") > 1), "")
        lower = "lower the learning rate or the weight of that term" if term else "lower the learning rate"
        raise BadStep(
            f"{told}: {lower}, or leave such steps out (config.on_bad_step); checkpoints of earlier steps are intact",
            roles,
            values,
        )
    return values
