"""Checkpoints that are damaged are skipped."""

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.training import checkpoint


def test_a_damaged_checkpoint_is_skipped(tmp_path):
    tree = {"a": np.random.default_rng(0).normal(size=100_000), "b": {"c": np.ones(3, np.int32)}}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    for at in (1, 2):
        store.save(at, {"a": tree["a"] * at, "b": tree["b"]}, {"next_batch": at})
    store.close()
    largest = max((tmp_path / "2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    largest.write_bytes(damaged)
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    restored, note = store.restore(tree)
    assert note["next_batch"] == 1 and store.latest() == 1
    np.testing.assert_array_equal(restored["a"], tree["a"])
    store.close()


@pytest.mark.parametrize("part", ["note", "state"])
def test_a_truncated_checkpoint_is_skipped(tmp_path, part):
    tree = {"a": np.arange(10_000.0)}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    for at in (1, 2):
        store.save(at, {"a": tree["a"] * at}, {"next_batch": at})
    store.close()
    for at, left in ((2, 1), (1, None)):
        for path in (tmp_path / str(at) / part).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        store = checkpoint.Checkpoints(tmp_path, keep=3)
        if left:
            assert store.note()["next_batch"] in (1, 2) and store.restore(tree)[1]["next_batch"] == left
        else:
            # Either finds the damage.
            with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):  # noqa: PT012
                store.note()
                store.restore(tree)
        store.close()
