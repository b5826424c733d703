"""The guide to an own training loop works as it is printed: its blocks are one file."""

import re

import jax
import numpy as np
import pytest

from tests.shared import ROOT

GUIDE = (ROOT / "docs" / "own_loop.md").read_text()


@pytest.fixture(scope="module")
def names():
    code: dict = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)), code)
    return code


def test_every_term_falls(names):
    first, last = names["history"][0], names["history"][-1]
    assert set(first) == {"task", "cwd/cwd"} | {
        f"mkd/{term}" for term in ("feature", "multiscale", "frequency", "alignment")
    }
    assert all(np.isfinite(last[name]) and last[name] < first[name] for name in first), (first, last)


def test_the_methods_teach(names):
    """Without them the student gets another gradient, and the adapters none."""
    arguments = names["trained"], names["variables"], names["batch"], 0
    distilled = jax.grad(lambda *a: names["loss"](*a)[0])(*arguments)
    task = jax.grad(lambda *a: names["loss"](*a)[1]["task"])(*arguments)
    pairs = [jax.tree.leaves(side["student"]) for side in (distilled, task)]
    assert any(not np.allclose(a, b, rtol=1e-3) for a, b in zip(*pairs, strict=True))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(distilled["adapters"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(task["adapters"]))


def test_eight_devices_agree_with_one(names):
    assert names["devices"] == 8
    _, terms = names["loss"](names["trained"], names["variables"], names["batch"], 20)
    found = names["parallel_metrics"]
    assert set(found) == set(terms)
    for name in ("task", "cwd/cwd", "mkd/feature"):
        np.testing.assert_allclose(found[name], [terms[name]] * 8, rtol=1e-5)
    leaves = jax.tree.leaves(names["everywhere"][0])
    assert all(np.array_equal(leaf[0], copy) for leaf in leaves for copy in leaf)


def test_a_teacher_elsewhere_gives_the_same_terms(names):
    assert names["at_once"] == names["by_host"] and list(names["at_once"]) == ["cwd/cwd"]
