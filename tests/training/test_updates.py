"""What is done about a bad step, on a model of four weights: states are compared with a plain loop to the bit."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from kdjax import sharding
from kdjax.errors import UserError
from kdjax.training import blackbox
from kdjax.training import config as settings
from kdjax.training import updates as ahead
from kdjax.training.checkpoint import Checkpoints, flat
from kdjax.training.step import TrainState, init_state, make_step
from kdjax.training.updates import Updates

STEPS = 12


def toy_student():
    """Linear regression, with running statistics, as a `Detector` for `make_step`."""

    def loss(output, targets, assignment):
        return {"loss": jnp.mean((output - targets.boxes[:, 0, 0]) ** 2)}

    def apply(params, stats, image, *, train):
        return image[:, 0, 0] @ params["w"], {"mean": 0.9 * stats["mean"] + 0.1 * jnp.mean(image)}

    return SimpleNamespace(apply=apply, preprocess=lambda image: image, assign=lambda *_: None, loss=loss)


def toy_batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": rng.normal(size=(4, 1, 1, 4)).astype(np.float32),
            "boxes": rng.normal(size=(4, 1, 4)).astype(np.float32),
            "labels": np.zeros((4, 1), np.int32),
            "valid": np.ones((4, 1), bool),
            "image_size": np.ones((4, 2), np.int32),
        }


def toy_setup(**changes):
    config = settings.base()
    for name, value in changes.items():
        config[name] = value
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    layout, optimizer, student = sharding.Layout(mesh), optax.adam(0.1), toy_student()
    start = {"w": np.ones(4, np.float32)}, {"mean": np.zeros((), np.float32)}
    made = {role: init_state(student, jax.random.PRNGKey(0), start, {}, optimizer) for role in ("student", "twin")}
    states = layout.put(made)
    most = {"total": config.bad_step.loss} if config.bad_step.loss else {}
    update = make_step(student, optimizer, lambda _: 0.5, layout=layout, most=most)
    steps = {
        role: jax.jit(
            update, donate_argnums=0, out_shardings=(layout.shardings(states[role]), sharding.replicated(mesh))
        )
        for role in states
    }
    return SimpleNamespace(
        config=config, mesh=mesh, layout=layout, states=states, steps=steps, variables=None, measure=None
    )


def trained(setup, tmp_path, *, bad=(), saved=(), look=1):
    """The states after all steps, with a NaN in the student's image of some; and `Updates`."""
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=9)) as store:
        updates, rows = Updates(setup, store, tmp_path), []
        for step, batch in enumerate(toy_batches(), 1):
            batch["boxes"][0, 0, 0] = np.nan if step in bad else batch["boxes"][0, 0, 0]
            updates.start(step, sharding.shard_batch(setup.mesh, batch))
            ends = step in saved or step == STEPS
            rows += updates.checked(0 if ends else look)
            if step in saved:
                store.save(step, updates.states, {"next_batch": step})
        return {role: flat(state) for role, state in updates.states.items()}, updates, rows


def expected(*, without=(), back_to=None):
    """A plain loop that leaves some updates out, or goes back to the state of a step behind the last of them."""
    setup = toy_setup()
    states, kept = setup.states, {}
    for step, batch in enumerate(toy_batches(), 1):
        if step not in without:
            for role in states:
                states[role], _ = setup.steps[role](states[role], None, sharding.shard_batch(setup.mesh, batch))
        elif back_to and step == max(without):
            states = setup.layout.put(kept[back_to])
        if back_to == step:
            kept[step] = jax.tree.map(np.array, states)
        states = {role: state._replace(step=setup.layout.put(np.int32(step))) for role, state in states.items()}
    return {role: flat(state) for role, state in states.items()}


def assert_equal(a, b):
    for role in a:
        for name in a[role]:
            np.testing.assert_array_equal(a[role][name], b[role][name], err_msg=f"{role}/{name}")


@pytest.fixture
def kept(monkeypatch):
    """The states that the black box was given, by step."""
    found = {}

    def write(workdir, setup, step, states, batch, metrics):
        found[step] = {role: flat(state) for role, state in states.items()}, flat(batch)
        return workdir / "blackbox" / f"step-{step}"

    monkeypatch.setattr(blackbox, "write", write)
    return found


def test_nothing_changes_without_a_bad_step(tmp_path):
    states, updates, rows = trained(toy_setup(), tmp_path)
    assert_equal(states, expected())
    assert len(rows) == STEPS and not updates.dropped and "student/loss" in rows[0]


@pytest.mark.parametrize("bad", [(1,), (5, 6), (STEPS,)])
@pytest.mark.parametrize("look", [0, 1])
def test_skip_leaves_out_one_update_and_nothing_else(bad, look, tmp_path, kept, capsys):
    """Also where the step after it was dispatched before the host looked; the state before it is what is kept."""
    setup = toy_setup(on_bad_step="skip")
    states, updates, rows = trained(setup, tmp_path, bad=bad, look=look)
    assert_equal(states, expected(without=bad))
    assert len(rows) == STEPS - len(bad)
    assert updates.dropped == [{"step": step, "policy": "skip"} for step in bad]
    before, batch = kept[bad[-1]]
    assert before["student"]["step"] == bad[-1] - 1 and np.isnan(batch["boxes"][0, 0, 0])
    told = capsys.readouterr().err
    assert f"student/loss is not finite at step {bad[0]}" in told and f"blackbox/step-{bad[0]}" in told


def test_only_the_role_that_went_wrong_skips(tmp_path, kept, monkeypatch):
    given = ahead.given

    def only_student(setup, role, batch):
        variables, rows = given(setup, role, batch)
        return variables, rows | ({"boxes": jnp.nan_to_num(rows["boxes"])} if role == "twin" else {})

    monkeypatch.setattr(ahead, "given", only_student)
    states, *_ = trained(toy_setup(on_bad_step="skip"), tmp_path, bad=(5,))
    assert_equal({"student": states["student"]}, expected(without=(5,)))
    assert states["twin"]["step"] == STEPS and list(kept[5][0]) == ["student"]
    assert not np.array_equal(states["twin"]["params/student/w"], states["student"]["params/student/w"])


def test_rollback_goes_on_from_the_last_checkpoint_without_the_batches_since(tmp_path, kept):
    setup = toy_setup(on_bad_step="rollback")
    setup.config.checkpoint.every = 4
    states, updates, _ = trained(setup, tmp_path, bad=(7,), saved=(4, 5))  # 5: as a SIGTERM makes one
    assert_equal(states, expected(without=(7,), back_to=4))
    assert updates.dropped == [{"step": 7, "policy": "rollback"}]


@pytest.mark.parametrize(
    ("policy", "bad", "told"),
    [
        ("stop", (5,), r"^student/loss is not finite at step 5: lower .* intact; `kdjax replay .*step-5` says what"),
        ("skip", tuple(range(1, STEPS + 1)), r"at step 11: .*; the 10 steps before it were skipped too$"),
        ("rollback", (3,), r"at step 3: .*; there is no checkpoint yet to which the run could go back$"),
        ("rollback", (6, 7, 8, 9), r"at step 9: .*; there were 3 rollbacks before$"),
    ],
)
def test_a_run_stops_where_its_policy_ends(policy, bad, told, tmp_path, kept):
    with pytest.raises(FloatingPointError, match=told):
        trained(toy_setup(on_bad_step=policy), tmp_path, bad=bad, saved=(5,))


def test_a_bound_makes_a_step_bad(tmp_path, kept):
    losses = [row["student/loss"] for row in trained(toy_setup(), tmp_path / "a")[2]]
    bound, first = sorted(losses)[-1], int(np.argmax(losses)) + 1
    setup = toy_setup(bad_step=settings.ConfigDict(dict(loss=0.999 * bound, grad_norm=0.0)))
    with pytest.raises(FloatingPointError, match=rf"student/total is .* at step {first}, above config.bad_step.loss="):
        trained(setup, tmp_path / "b")


def test_inputs_that_cannot_be_kept_do_not_hide_the_cause(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "runs/a/blackbox")

    monkeypatch.setattr(blackbox, "write", full)
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 5: .*could not be kept \(runs/a/blackbox: the disk"
    ):
        trained(toy_setup(), tmp_path, bad=(5,))


def test_computing_steps_twice_changes_nothing_and_finds_a_difference(tmp_path):
    setup = toy_setup(recheck_every=3)
    assert_equal(trained(setup, tmp_path / "a")[0], expected())
    setup, calls = toy_setup(recheck_every=3), iter(range(1, 99))
    update = setup.steps["twin"]

    def sometimes_wrong(state: TrainState, *rest):
        wrong = next(calls) == 7  # steps 1, 2, 3, 3, 4, 5, 6
        new, metrics = update(state, *rest)
        params = jax.tree.map(lambda w: jnp.nextafter(w, jnp.float32(9)), new.params) if wrong else new.params
        return new._replace(params=params), metrics

    setup.steps["twin"] = sometimes_wrong
    with pytest.raises(UserError, match=r"step 6 of the twin was computed twice, and 1 of .* params/student/w: this"):
        trained(setup, tmp_path / "b")
