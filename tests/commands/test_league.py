"""Studies in study.json, and what becomes of several of them: one table, or a sentence that says what contradicts."""

import json
import re
import shutil
from pathlib import Path

import pytest

from kdjax import cli, files
from kdjax.commands import study_record, study_runs
from tests.shared import ROOT
from tests.support.models import refused
from tests.support.studies import cells, run_study, stand_in

TEACHER = ROOT / "assets" / "quickstart_teacher"
GAINS = {"": 0.0, "mkd": 0.03, "cwd": 0.001, "pkd": -0.02, "mkd+rm": 0.04}


def ap(said):
    seed = int(said["seed"]) % 1_000_000
    if said["method"] == "ld":
        raise study_runs.Failed("no bins")
    noise = {"": 0.0, "cwd": 0.01 * (seed % 2) - 0.005}.get(said["method"], 0.001 * (seed % 3))
    return 0.2 + 0.01 * seed * (int(said["seed"]) < 1_000_000) + GAINS[said["method"]] + noise


@pytest.fixture
def make(monkeypatch, tmp_path, capsys):
    """Makes a study in a folder; `data` is the fingerprint of its data, `change` alters APs."""

    def made(
        name: str, *flags: str, data: str = "d1", change=lambda said, value: value, study: str = "methods"
    ) -> Path:
        with monkeypatch.context() as patched:
            stand_in(patched, lambda said: change(said, ap(said)), data=data, seconds={"mkd": 0.125})
            assert run_study(study, *flags, workdir=tmp_path / name) == 0
        capsys.readouterr()
        return tmp_path / name

    return made


def league(tmp_path, capsys, *paths) -> tuple[str, dict]:
    out = tmp_path / "league"
    assert cli.main(["league", *map(str, paths), f"--out={out}"]) == 0
    assert capsys.readouterr().out.startswith("# Methods over data sets")
    return (out / "league.md").read_text(), json.loads((out / "league.json").read_text())


def studies_of(folder: Path) -> dict:
    """The studies of a folder, each by its name, as in "kdjax study NAME ..."."""
    return {command.split()[2]: content for command, content in study_record.read(folder / "study.json").items()}


def test_further_seeds_in_the_same_folder_are_beside_the_first(make, tmp_path, capsys):
    folder = make("one", "--methods=mkd", "--seeds=2")
    assert make("one", "--methods=mkd", "--seeds=1", "--first=2") == folder
    _, content = league(tmp_path, capsys, folder)
    [row] = content["columns"][0]["rows"]
    assert row["seeds"] == [0, 1, 2] and row["gains AP"] == [3.0, 3.1, 3.2]


def test_seeds_and_methods_of_several_folders_are_united(make, tmp_path, capsys):
    one = make("one", "--methods=mkd,cwd", "--seeds=2")
    two = make("two", "--methods=mkd,pkd,ld", "--seeds=2", "--first=1")  # seed 1 twice, the same
    other = make("other", "--methods=mkd,mkd+rm", "--seeds=3", "--config.data.scenes_train=99", data="d2")
    text, content = league(tmp_path, capsys, one, two, other / "study.json")
    first, second = content["columns"]
    rows = {row["name"]: row for row in first["rows"]}
    assert first["title"].startswith("scenes: rtmdet_") and first["title"].endswith("(data=d1)")
    assert second["title"].endswith("(data=d2)") and second["settings"] == first["settings"]
    assert rows["mkd"]["seeds"] == [0, 1, 2] and rows["mkd"]["gains AP"] == [3.0, 3.1, 3.2]
    assert (rows["mkd"]["verdict AP"], rows["cwd"]["verdict AP"], rows["pkd"]["seeds"]) == (
        "helps",
        "not shown",
        [1, 2],
    )
    assert [row["name"] for row in first["rows"]] == ["mkd", "cwd", "pkd", "ld"] and rows["ld"]["failed"] == {
        "1": "no bins",
        "2": "no bins",
    }
    table = {row["name"]: row for row in cells(text.split("\n## ")[0])}
    assert [*table] == ["mkd+rm", "mkd", "cwd", "pkd", "ld"]
    assert re.fullmatch(r"\+3.10 \[\+2.85, \+3.35\] helps, 3", table["mkd"][first["title"]])
    assert table["mkd+rm"][first["title"]] == "–" and table["ld"][first["title"]] == "failed"
    assert "0.15 of the 3 rows here" in text
    page = (tmp_path / "league" / "league.html").read_text()
    assert page.count("<svg ") == 2 and "mkd +3.10, helps" in page and "no bins" in page
    assert not re.search(r'(src|href)="(?!#)|<script', page) and str(tmp_path) not in page + text + json.dumps(content)
    before = {path.name: path.read_bytes() for path in (tmp_path / "league").iterdir()}
    league(tmp_path, capsys, other, two, one, one)
    assert {path.name: path.read_bytes() for path in (tmp_path / "league").iterdir()} == before


def test_a_study_leaves_its_results_with_all_that_decided_them(make, tmp_path, capsys):
    """Several studies of a folder lie beside each other; a teacher counts by its weights, not by its place."""
    folder = make("a", f"--teachers={TEACHER}", "--methods=mkd", "--seeds=1", "--config.methods.mkd.zeta=0.3")
    [row] = studies_of(folder)["methods"]["rows"]
    assert row["what"] == "mkd, mkd.zeta=0.3" and row["name"].endswith(f"({TEACHER})")
    assert row["teacher"]["name"] == "rtmdet_micro" and len(row["teacher"]["sha256"]) == 64
    assert row["methods"]["mkd.zeta"] == 0.3 and row["data"] == {"name": "scenes", "fingerprint": "d1"}
    assert not [name for name in row["settings"] if "root" in name or "weights" in name or "methods" in name]
    assert row["runs"]["0"]["student"] == {"AP": 0.23, "AP50": 0.33, "params": 10, "flops": 2e6}
    assert row["runs"]["0"]["seconds"] == pytest.approx(2.5 * (9 + 4))
    assert run_twins(make)["runs"]["0"]["student"]["AP"] == 0.2
    assert [*studies_of(folder)] == ["methods", "twins"]
    moved = shutil.copytree(TEACHER, tmp_path / "moved")
    other = make("b", f"--teachers={moved}", "--methods=mkd", "--seeds=2", "--first=1", "--config.methods.mkd.zeta=0.3")
    _, content = league(tmp_path, capsys, folder, other)
    seeds = {row["name"]: row["seeds"] for column in content["columns"] for row in column["rows"]}
    assert seeds == {"mkd, mkd.zeta=0.3": [0, 1, 2], "twin under another seed": [0, 1, 2]}


def run_twins(make):
    folder = make("a", "--seeds=3", study="twins")
    [row] = studies_of(folder)["twins"]["rows"]
    return row


def test_twins_under_other_seeds_are_compared_as_methods_are(make, tmp_path, capsys, monkeypatch):
    asked = stand_in(monkeypatch, lambda said: 0.2 + (0.001 if int(said["seed"]) % 2 else -0.001))
    assert run_study("twins", "--seeds=10", workdir=tmp_path) == 0
    [row] = cells(capsys.readouterr().out)
    assert (row["gain in AP"], row["verdict"], row["teacher"], row["seeds"]) == ("+0.00", "not shown", "–", "10")
    assert {path.parent.name for path, _ in asked} == {f"seed{base + i}" for base in (0, 1_000_000) for i in range(10)}
    assert not any(said["method"] or said["teacher.weights"] for _, said in asked)


def test_gains_at_equal_time_are_merged(make, tmp_path, capsys):
    flags = ["--methods=mkd", "--equal=time", "--config.steps=800"]
    one, two = make("one", *flags, "--seeds=2"), make("two", *flags, "--seeds=1", "--first=2")
    text, content = league(tmp_path, capsys, one, two)
    [row] = content["columns"][0]["rows"]
    assert row["time"] == {"ratio": 1.25, "times": [1.3]} and row["verdict AP at equal time"] == "helps"
    assert cells(text)[-1]["longer twin"] == "× 1.3"


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "studies to merge that contradict each other",
    "refused with both: the same seed with other results, other twins, other options under one name",
)
def test_contradictions_name_both_studies(make, tmp_path, capsys):
    one = make("one", "--methods=mkd", "--seeds=2")
    worse = make("two", "--methods=mkd", "--seeds=2", change=lambda said, value: value - 0.01 * bool(said["method"]))
    told = refused(capsys, "league", str(one), str(worse), f"--out={tmp_path / 'out'}")
    both = f"kdjax: ({one}/study.json and {worse}|{worse}/study.json and {one})/study.json: "
    assert re.fullmatch(
        rf"{both}seed 0 of mkd on scenes has other results in each \(AP 0.2[23]00 and 0.2[23]00\): merge one of them",
        told,
    )
    twins = make("three", "--methods=cwd", "--seeds=1", change=lambda said, value: value + 0.01)
    told = refused(capsys, "league", str(one), str(twins), f"--out={tmp_path / 'out'}")
    assert "the twins of seed 0 on scenes differ (AP 0.2" in told and "seeds of their own (--first)" in told
    config = tmp_path / "mine.py"
    text = (ROOT / "configs" / "quickstart.py").read_text()
    config.write_text(text.replace("    return config", "    config.methods.mkd.zeta = 0.2\n    return config"))
    assert config.read_text() != text
    options = make("four", "--methods=mkd", "--seeds=1", f"--config={config}")
    told = refused(capsys, "league", str(one), str(options), f"--out={tmp_path / 'out'}")
    assert re.search(
        r"mkd on scenes has other options in each \(mkd.zeta is 0.\d+ and 0.\d+\): merge one of them$", told
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a `study.json` that is none, or was damaged or changed",
    "refused: there is no study.json; it is damaged; run its study again",
)
def test_what_is_not_a_study_is_refused(make, tmp_path, capsys):
    folder, out = make("one", "--methods=mkd", "--seeds=1"), f"--out={tmp_path / 'out'}"
    path, whole = folder / "study.json", (folder / "study.json").read_text()
    told = f"kdjax: {tmp_path}: there is no study.json: name the workdir of a finished study"
    assert refused(capsys, "league", str(tmp_path), out) == told
    parts = json.loads(whole)
    [methods] = parts["studies"].values()
    rows = methods["rows"]
    for text, words in (
        ("{", "it is damaged or incomplete (JSONDecodeError"),
        ("[]", "it is not the study.json of a study"),
        ('{"student": 1}', "it is not the study.json of a study"),
        (
            whole.replace("0.23", "0.33"),
            "it was changed after it was written (its SHA-256 differs): run its study again",
        ),
        (json.dumps(files.sealed(parts | {"format": 9})), "another version of kdjax wrote it: run its study again"),
        (json.dumps(files.sealed(parts | {"studies": [1]})), "it is damaged or incomplete ("),
        (
            json.dumps(
                files.sealed(parts | {"studies": {"methods": {"versions": {}, "rows": [{"runs": 3} | rows[0]]}}})
            ).replace('"AP"', '"BP"'),
            "changed after it was written",
        ),
        (
            json.dumps(
                files.sealed(parts | {"studies": {"a": {"versions": {}, "rows": [rows[0] | {"runs": {"0": {}}}]}}})
            ),
            "it is damaged or incomplete (KeyError",
        ),
    ):
        path.write_text(text)
        told = refused(capsys, "league", str(folder), out)
        assert told.startswith(f"kdjax: {path}: ") and words in told, (text[:80], told)
    path.write_text("{")
    told = refused(capsys, "study", "methods", "--methods=mkd", f"--workdir={folder}")
    assert told.startswith(f"kdjax: {path}: it is damaged"), "before any run"
