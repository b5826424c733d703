"""The parts of the benchmarks that need no training: tables, summaries, commands, and what a failed run leaves."""

import json
import sys

import jax.numpy as jnp
import pytest

from tests.shared import ROOT, script
from tests.test_configs import load

FACTS = {"commit": "c", "python": "3", "jax": "1", "flax": "2", "devices": "cpu"}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """A script sees the files beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    sys.modules.pop("common", None)


@pytest.fixture
def of(beside):
    return lambda name: script(ROOT / "benchmarks" / f"{name}.py")


def test_means_and_tables(of):
    common = of("common")
    assert common.mean_and_error([1.0, 3.0]) == (2.0, 1.0) and common.mean_and_error([1.0]) == (1.0, None)
    assert common.with_error([1.0, 3.0]) == "2.00 ± 1.00" and common.with_error([1.0], "+") == "+1.00"
    assert common.table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |"


def test_what_is_published_is_logged(of, tmp_path, capsys):
    common, log = of("common"), tmp_path / "log.md"
    log.write_text("before\n")
    for _ in range(2):
        common.publish("python x.py", ["| table |", "facts"], {"a": 1}, log)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"a": 1} and lines[-2].endswith("; facts")
    text = log.read_text()
    assert text.startswith("before\n\n`python x.py`\n\n| table |\n\n20") and text.count('    {"a": 1}') == 2


def test_the_sentence_of_a_failed_run(of):
    common = of("common")
    refused = "I0000 some library\rtrain:  10%|# \ntrain.py: config.x is 1; it must be 2\n"
    assert common.last_sentence(refused) == "config.x is 1; it must be 2"
    assert common.last_sentence("Traceback\n  File\nRuntimeError: boom\n\n") == "RuntimeError: boom"
    assert common.last_sentence("") == "no message"


def test_a_run_that_fails_and_one_that_is_stopped(of, capsys):
    common = of("common")
    with pytest.raises(common.Failed, match="^no such thing$"):
        common.run([sys.executable, "-c", "import sys; print('train.py: no such thing', file=sys.stderr); sys.exit(2)"])
    with pytest.raises(SystemExit) as stop:
        common.run([sys.executable, "-c", "import sys; sys.exit(143)"])
    assert stop.value.code == 143
    common.run([sys.executable, "-c", ""])


def test_a_finished_run_is_kept_and_its_flags_must_be_the_same(of, tmp_path):
    common = of("common")
    (tmp_path / "results.json").write_text('{"student": {"AP": 0.5}}')
    run = FACTS | {"command": ["--config=a", f"--workdir={tmp_path}", "--config.seed=1"], "numpy": "2"}
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "runs": [run, {}]}))
    assert common.train(["--config=a", "--config.seed=1"], tmp_path) == {"student": {"AP": 0.5}}
    assert common.facts_of(tmp_path) == FACTS
    with pytest.raises(SystemExit, match="other flags .--config=a --config.seed=1"):
        common.train(["--config=b", "--config.seed=1"], tmp_path)
    rows = [
        {"step": 1, "kind": "train", "seconds": 60},
        {"step": 2, "kind": "eval"},
        {"step": 2, "kind": "train", "seconds": 30},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, rows[0])))
    assert common.minutes_of(tmp_path) == 1.5


def test_seeds(of):
    seeds = of("seeds")
    rows = [{"seed": 0, "gain AP": 0.01}, {"seed": 1, "gain AP": 0.03}]
    assert seeds.summary(rows) == {"gain AP": (2.0, 1.0)}
    assert seeds.table(rows).splitlines()[2:] == [
        "| 0 | 1.00 |",
        "| 1 | 3.00 |",
        "| mean ± standard error | 2.00 ± 1.00 |",
    ]


def test_compare_methods_ranks_by_gain_and_says_what_does_not_help(of):
    compare = of("compare_methods")
    twins = {0: {"AP": 0.1, "AP50": 0.2}, 1: {"AP": 0.2, "AP50": 0.3}}
    students = {
        "mkd": {0: {"AP": 0.09, "AP50": 0.2}, 1: {"AP": 0.2, "AP50": 0.3}},
        "cwd": {0: {"AP": 0.12, "AP50": 0.25}, 1: {"AP": 0.24, "AP50": 0.35}},
        "pkd": {1: {"AP": 0.21, "AP50": 0.3}},
        "ld": {},
    }
    found = compare.gains(students, twins)
    assert found["cwd"] == {"AP": [2.0, 4.0], "AP50": [5.0, 5.0]} and "ld" not in found
    failures = {"ld": {0: "no bins", 1: "no bins"}, "pkd": {0: "not finite"}}
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in compare.table(found, students, failures).splitlines()[2:]
    ]
    assert [row[0] for row in rows] == ["cwd", "pkd", "mkd", "ld"]
    assert rows[0] == ["cwd", "+3.00 ± 1.00", "+2.00 … +4.00", "+5.00 ± 0.00", "18.00 ± 6.00", "2", ""]
    assert rows[1][1] == "+1.00" and rows[1][-2:] == ["1", "seed 0 failed: not finite"]
    assert rows[2][-1] == "does not help here" and rows[3][-2:] == ["0", "no bins"]


def test_compare_methods_trains_the_twin_alone(of):
    compare = of("compare_methods")
    config, flags = "configs/quickstart.py", ["--config.teacher.weights=FILE", "--config.steps=9"]
    twin, method = compare.twin_flags(config, flags, 3), compare.method_flags(config, "mkd", flags, 3)
    same = ["--config.twin=False", "--config.eval.every=0", "--config.seed=3"]
    assert method == ["--config=configs/quickstart.py:mkd", *flags, *same]
    assert twin[0] == "--config=configs/quickstart.py:" and twin[-3:] == same
    last = {flag.partition("=")[0]: flag.partition("=")[2] for flag in twin}
    assert last["--config.teacher.weights"] == last["--config.teacher.detector"] == "" and last["--config.steps"] == "9"
    for name in ("quickstart.py", "distill/coco_folder.py"):
        assert not load(ROOT / "configs" / name, "").methods


def test_method_cost_summary_and_table(of):
    cost = of("method_cost")
    rows = [
        cost.summarize("mkd", [(0.33, 0.2, 0.1), (0.3, 0.2, 0.1), (0.36, 0.2, 0.1)], 123.4),
        cost.summarize("ssim", [(0.6, 0.2, 0.1)], 1.0),
    ]
    assert rows[0]["relative"] == 1.1 and (rows[0]["step_ms"], rows[0]["twin_ms"], rows[0]["teacher_ms"]) == (
        330,
        200,
        100,
    )
    assert rows[0]["low"] <= 1.1 <= rows[0]["high"] and rows[1]["low"] == rows[1]["high"] == 2.0
    assert cost.table(rows).splitlines()[2:] == [
        "| ssim | 2.000 | 2.000 … 2.000 | 600.0 | 200.0 | 100.0 | 1 |",
        "| mkd | 1.100 | 1.000 … 1.200 | 330.0 | 200.0 | 100.0 | 123 |",
    ]


def test_method_cost_finds_the_taps_that_are_read(of):
    cost = of("method_cost")
    maps = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}
    assert cost.reads(lambda seen, x: {"out": jnp.sum(seen["a"] * x) + jnp.max(seen["c"])}, maps, jnp.ones(3)) == [
        True,
        False,
        True,
    ]


def test_method_cost_memory_counts_a_donated_argument_once(of):
    cost = of("method_cost")
    x = jnp.ones((256, 256))
    kept, donated = (cost.megabytes(cost.compiled(lambda x: x + 1, x, donate=d)) for d in (False, True))
    assert kept == pytest.approx(2 * x.nbytes / 1e6, rel=0.01) and donated == pytest.approx(x.nbytes / 1e6, rel=0.01)


def test_method_cost_batch_has_objects_and_padding(of):
    batch = of("method_cost").made_up_batch(2, 64, 5)
    assert batch["image"].shape == (2, 64, 64, 3) and 0 < batch["valid"].mean() < 1
    boxes = batch["boxes"][batch["valid"]]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.max() <= 64 and not batch["boxes"][~batch["valid"]].any()
