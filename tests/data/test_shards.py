"""Arrays of numbered entries on disk: their bounds, what is written again, what is refused."""

import concurrent.futures
import json

import numpy as np
import pytest

from kdjax.data import shards
from kdjax.data.shards import Leaf, Missing, Shards
from kdjax.errors import UserError

LEAVES = (Leaf("neck/0", (3, 5, 4), "float32"), Leaf("rows/quality", (7,), "float32"), Leaf("labels", (2,), "int32"))


def entry(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "neck/0": (rng.normal(size=(3, 5, 4)) * [0, 1, 100, 1e-6]).astype(np.float32),
        "rows/quality": rng.normal(size=7).astype(np.float32),
        "labels": rng.integers(0, 9, 2).astype(np.int32),
    }


def made(folder, *, kind="float32", shard=4, span=0) -> Shards:
    shards.make_folder(folder)
    return shards.create(Shards(folder, LEAVES, kind, shard, span, {"seed": 1}, {"jax": "x"}))


def fill(found: Shards, needed: list[range]) -> list[Missing]:
    missing = found.missing(needed)
    for one in missing:
        with found.writer(one) as file:
            for number in range(one.first, one.first + one.count):
                file.add(entry(number))
    return missing


def test_float32_comes_back_to_the_bit(tmp_path):
    found = made(tmp_path)
    assert fill(found, [range(10)]) == [(0, 4), (4, 4), (8, 2)]
    again = shards.find(tmp_path)
    assert again == found and not again.missing([range(10)])
    numbers = np.array([9, 0, 3, 4, 0])
    read = again.read(numbers, ["labels", "neck/0"])
    assert set(read) == {"labels", "neck/0"}
    for name, values in read.items():
        np.testing.assert_array_equal(values, np.stack([entry(n)[name] for n in numbers]))
        assert values.dtype == entry(0)[name].dtype
    size = sum(path.stat().st_size for path in tmp_path.glob("*.array_record"))
    assert 10 * found.entry_bytes < size  # small files are mostly padding
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for values in pool.map(lambda _: again.read(numbers, ["neck/0"])["neck/0"], range(20)):
            np.testing.assert_array_equal(values, read["neck/0"])


def test_the_forecast_is_what_is_written(tmp_path):
    leaves = (Leaf("neck/0", (40, 40, 16), "float32"),)
    shards.make_folder(tmp_path)
    found = shards.create(Shards(tmp_path, leaves, "float32", 16, 0, {}, {}))
    missing = found.missing([range(32)])
    for one in missing:
        with found.writer(one) as file:
            for _ in range(one.count):
                file.add({"neck/0": np.ones((40, 40, 16), np.float32)})
    size = sum(path.stat().st_size for path in tmp_path.glob("*.array_record"))
    assert 0.9 * shards.forecast(found.entry_bytes, missing) < size <= shards.forecast(found.entry_bytes, missing)


def test_bfloat16_is_within_its_bound(tmp_path):
    found = made(tmp_path, kind="bfloat16")
    fill(found, [range(4)])
    read = found.read(np.arange(4), [leaf.name for leaf in LEAVES])
    for number in range(4):
        for name, value in entry(number).items():
            assert (np.abs(read[name][number] - value) <= 2.0**-8 * np.abs(value)).all()
    np.testing.assert_array_equal(read["labels"][2], entry(2)["labels"])
    odd = np.array([np.nan, np.inf, -np.inf, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 0.0], np.float32)
    leaf = Leaf("x", (7,), "float32")
    back = shards.decode(memoryview(shards.encode(odd, leaf, "bfloat16")), leaf, "bfloat16")
    np.testing.assert_array_equal(back, np.array([np.nan, np.inf, -np.inf, 1, 1, 1 + 2**-6, 0], np.float32))


def test_int8_is_within_half_a_step_of_each_channel(tmp_path):
    found = made(tmp_path, kind="int8")
    assert found.entry_bytes == 8 + (60 + 4 * 8) + (7 + 8) + 2 * 4
    fill(found, [range(4)])
    read = found.read(np.arange(4), [leaf.name for leaf in LEAVES])
    apart = 0.0
    for number in range(4):
        value = entry(number)["neck/0"].reshape(-1, 4)
        step = np.ptp(value, 0).astype(np.float64) / 255
        error = np.abs(read["neck/0"][number].reshape(-1, 4).astype(np.float64) - value)
        assert (error <= step / 2 + 2e-7 * np.abs(value)).all()
        apart = max(apart, error.max())
        np.testing.assert_array_equal(read["labels"][number], entry(number)["labels"])
    assert apart > 0.1  # the wide channel is rounded
    leaf = Leaf("x", (2,), "float32")
    with pytest.raises(UserError, match="x: it is not finite: it cannot be stored as int8"):
        shards.encode(np.array([1, np.inf], np.float32), leaf, "int8")


def test_sparse_keeps_the_best_logits_and_the_mean_score_of_the_others(tmp_path):
    leaves = (Leaf("rows/logits", (500, 7), "float32"), Leaf("rows/boxes", (500, 4), "float32"))
    shards.make_folder(tmp_path)
    found = shards.create(Shards(tmp_path, leaves, "sparse", 4, 0, {}, {}))
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(500, 7)) * 3 - 4).astype(np.float32)
    logits[0] = 200, -200, -100, 50, 3, 3, 3  # scores of 0 and 1
    boxes = rng.normal(size=(500, 4)).astype(np.float32)
    with found.writer(Missing(0, 1)) as file:
        file.add({"rows/logits": logits, "rows/boxes": boxes})
    read = shards.find(tmp_path).read(np.array([0]), ["rows/logits", "rows/boxes"])
    np.testing.assert_array_equal(read["rows/boxes"][0], boxes)
    kept = logits >= np.sort(logits.ravel())[-shards.PAIRS]
    assert kept.sum() == shards.PAIRS
    np.testing.assert_array_equal(read["rows/logits"][0][kept], logits[kept])
    others, scores = read["rows/logits"][0][~kept], 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert len(np.unique(others)) == 1
    mean = 1 / (1 + np.exp(-np.float64(others[0])))
    np.testing.assert_allclose(mean, scores[~kept].mean(), rtol=1e-6)
    assert np.abs(mean - scores[~kept]).max() < scores[kept].min()
    assert found.entry_bytes == 8 + 4 + 8 * shards.PAIRS + boxes.nbytes < logits.nbytes + boxes.nbytes
    logits[3, 3] = np.nan
    with pytest.raises(UserError, match="rows/logits: it is not finite"):
        shards.encode(logits, leaves[0], "sparse")
    small = Leaf("rows/logits", (50, 7), "float32")  # would not be shorter
    assert shards.stored_bytes(small, "sparse") == 4 * 350


def test_files_end_where_a_view_ends(tmp_path):
    found = made(tmp_path, span=10)
    assert fill(found, [range(10, 20)]) == [(10, 4), (14, 4), (18, 2)]
    assert fill(found, [range(0, 10), range(10, 20)]) == [(0, 4), (4, 4), (8, 2)]
    read = found.read(np.array([19, 9, 10]), ["labels"])["labels"]
    np.testing.assert_array_equal(read, [entry(n)["labels"] for n in (19, 9, 10)])


def test_writing_continues_with_the_first_file_that_is_missing(tmp_path):
    found = made(tmp_path)

    class Killed(Exception):
        pass

    def killed():
        for one in found.missing([range(12)]):
            with found.writer(one) as file:
                for number in range(one.first, one.first + one.count):
                    if number == 6:
                        raise Killed
                    file.add(entry(number))

    with pytest.raises(Killed):
        killed()
    assert fill(found, [range(12)]) == [(4, 4), (8, 4)]
    found.path(4).unlink()
    assert fill(found, [range(14)]) == [(4, 4), (12, 2)]
    assert fill(found, [range(16)]) == [(12, 4)]  # a longer run needs more of the last file
    np.testing.assert_array_equal(found.read(np.array([15]), ["labels"])["labels"][0], entry(15)["labels"])


@pytest.mark.user_input("A teacher's cache", "a file that is cut short", "refused: delete this file")
def test_a_file_that_is_cut_short_is_refused(tmp_path):
    found = made(tmp_path)
    fill(found, [range(8)])
    path = found.path(4)
    path.write_bytes(path.read_bytes()[:-7])
    told = f"{path}: it is damaged: delete this file, and the same command writes it again"
    for look in (lambda: found.missing([range(8)]), found.verified):
        with pytest.raises(UserError) as refused:
            look()
        assert str(refused.value) == told
    assert not found.missing([range(4)])


@pytest.mark.user_input("A teacher's cache", "a file in which a byte has changed", "refused when it is read")
def test_a_changed_byte_is_noticed(tmp_path):
    found = made(tmp_path)
    fill(found, [range(4)])
    content = bytearray(found.path(0).read_bytes())
    at = content.index(entry(2)["neck/0"].tobytes()[:40])
    content[at + 9] ^= 1
    found.path(0).write_bytes(content)
    for look in (lambda: found.read(np.array([2]), ["neck/0"]), found.verified):
        with pytest.raises(UserError, match=r"entries-0+\.array_record: it is damaged: delete this file"):
            look()


@pytest.mark.user_input("A teacher's cache", "a changed `cache.json`, or one of another version", "refused")
def test_a_changed_description_is_refused(tmp_path):
    made(tmp_path / "a")
    path = tmp_path / "a" / "cache.json"
    path.write_text(path.read_text().replace('"shard": 4', '"shard": 5'))
    with pytest.raises(UserError, match=r"cache.json: it is damaged or was changed: delete .*a, and it is written"):
        shards.find(tmp_path / "a")
    made(tmp_path / "b")
    path = tmp_path / "b" / "cache.json"
    path.write_text(json.dumps(shards.files.sealed(json.loads(path.read_text()) | {"format": 99})))
    with pytest.raises(UserError, match="another version of kdjax wrote it: choose another folder, or delete"):
        shards.find(tmp_path / "b")


@pytest.mark.user_input("A teacher's cache", "a folder with other files", "refused: choose a new folder")
def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\): choose a new folder"):
        shards.make_folder(tmp_path)


def test_files_hold_whole_batches():
    assert shards.file_entries(1000, 48) == 1008 and shards.file_entries(2**24, 6) == 12
    assert shards.file_entries(2**30, 8) == 8 and shards.file_entries(10, 2000) == 2000
