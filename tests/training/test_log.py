"""The log of a run that was killed."""

from kdjax.training.log import Log


def test_an_incomplete_line_is_removed(tmp_path):
    with Log(tmp_path, 0) as log:
        assert log.rows() == []
        log.write(1, "train", {"lr": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "ki')
    with Log(tmp_path, 1) as log:
        log.write(2, "train", {"lr": 0.25})
        assert [(row["step"], row["lr"]) for row in log.rows()] == [(1, 0.5), (2, 0.25)]
