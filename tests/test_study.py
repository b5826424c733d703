"""Studies: their runs and twins, what failed or finished runs leave, tables and images; trained are stand-ins."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import cv2
import pytest

from kdjax import cli, files, methods
from kdjax.commands import settings, study, study_layout, study_runs, study_variants
from kdjax.commands.study_variants import Options, Variant
from kdjax.errors import UserError
from kdjax.report import study as report
from tests.shared import ROOT
from tests.support.data import opened, small_folder
from tests.support.models import refused

FACTS = {"commit": "c", "python": "3", "jax": "1", "flax": "2", "devices": "cpu"}
TEACHER = ROOT / "assets" / "quickstart_teacher"


def test_means_and_tables():
    assert report.mean_and_error([1.0, 3.0]) == (2.0, 1.0) and report.mean_and_error([1.0]) == (1.0, None)
    assert report.shown((2.0, 1.0)) == "2.00 ± 1.00" and report.shown((1.0, None), "+") == "+1.00"
    assert report.table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |"


def test_the_table_of_detectors_with_masks_has_their_ap():
    def run(of_twin, of_student, **masks):
        sides = {
            name: {"AP": ap, "AP50": ap, "params": 1, "flops": 1.0}
            for name, ap in (("twin", of_twin), ("student", of_student))
        }
        for name, ap in masks.items():
            sides[name]["mask_AP"] = ap
        return {"teacher": {"AP": 0.5}} | sides

    with_masks = {0: run(0.2, 0.3, twin=0.1, student=0.15), 1: run(0.2, 0.3, twin=0.1, student=0.13)}
    rows = [report.summarize("a", with_masks, {}), report.summarize("b", {0: run(0.2, 0.3)}, {})]
    lines = [
        line.split(" | ") for line in report.study_table([*rows, report.summarize("c", {}, {0: "no"})]).splitlines()
    ]
    assert lines[0][-5:] == ["gain in mask AP", "mask AP", "twin's mask AP", "seeds", "note |"]
    assert lines[2][-5:-1] == ["+4.00 ± 1.00", "14.00 ± 1.00", "10.00 ± 0.00", "2"]
    assert lines[3][-5:-2] == lines[4][-5:-2] == ["–"] * 3 and len({len(line) for line in lines[2:]}) == 1
    assert "mask" not in report.study_table(rows[1:])


def test_what_is_published_is_logged(tmp_path, capsys):
    log = tmp_path / "log.md"
    log.write_text("before\n")
    for _ in range(2):
        report.publish("python x.py", ["| table |", "facts"], {"a": 1}, log)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"a": 1} and lines[-2].endswith("; facts")
    text = log.read_text()
    assert text.startswith("before\n\n`python x.py`\n\n| table |\n\n20") and text.count('    {"a": 1}') == 2


def test_the_sentence_of_a_failed_run():
    refused = "I0000 some library\rtrain:  10%|# \nkdjax: config.x is 1; it must be 2\n"
    assert study_runs.last_sentence(refused) == "config.x is 1; it must be 2"
    assert study_runs.last_sentence("Traceback\n  File\nRuntimeError: boom\n\n") == "RuntimeError: boom"
    assert study_runs.last_sentence("") == "no message"


def test_a_run_that_fails_and_one_that_is_stopped():
    with pytest.raises(study_runs.Failed, match=r"^no such thing$"):
        study_runs.call(
            [sys.executable, "-c", "import sys; print('kdjax: no such thing', file=sys.stderr); sys.exit(2)"]
        )
    with pytest.raises(SystemExit) as stop:
        study_runs.call([sys.executable, "-c", "import sys; sys.exit(143)"])
    assert stop.value.code == 143
    study_runs.call([sys.executable, "-c", ""])


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a study in the folder of runs with other flags", "refused with the flags"
)
def test_a_finished_run_is_kept_and_its_flags_must_be_the_same(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(files.sealed({"student": {"AP": 0.5}})))
    run = FACTS | {"command": ["train", "--config=a", f"--workdir={tmp_path}", "--config.seed=1"], "numpy": "2"}
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "runs": [run, {}]}))
    assert study_runs.train(["--config=a", "--config.seed=1"], tmp_path) == files.sealed({"student": {"AP": 0.5}})
    assert study_runs.facts_of([tmp_path, tmp_path]) == FACTS
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "config.json").write_text(json.dumps({"config": {}, "runs": [run | {"commit": "fed"}]}))
    both = {"commit": f"{FACTS['commit']} and fed"}
    assert study_runs.facts_of([tmp_path, tmp_path / "later"]) == FACTS | both
    with pytest.raises(UserError, match=r"other flags .--config=a --config.seed=1"):
        study_runs.train(["--config=b", "--config.seed=1"], tmp_path)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a study in the folder of runs on other images", "refused: choose another folder"
)
def test_a_finished_run_on_other_images_is_refused(tmp_path):
    """Under the same names, with the same json."""
    root = small_folder(tmp_path / "set", count=3)
    flags = ["--config=supervised/coco_folder:rtmdet_pico", f"--config.data.root={root}"]
    flags += [f"--config.data.cache={tmp_path / 'cache'}"]
    (tmp_path / "results.json").write_text(json.dumps(files.sealed({"student": {"AP": 0.5}})))
    run = {"command": ["train", *flags, f"--workdir={tmp_path}"], "data": opened(root, tmp_path).fingerprint}
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "runs": [run]}))
    assert study_runs.train(flags, tmp_path) == files.sealed({"student": {"AP": 0.5}})
    path = root / "images" / "val" / "p1.png"
    assert cv2.imwrite(str(path), cv2.imread(str(path)) + 1)
    study_runs.data_of.cache_clear()
    with pytest.raises(UserError, match=f"^{tmp_path} has a run on other images, boxes or classes than now: choose"):
        study_runs.train(flags, tmp_path)


def options(**changes) -> Options:
    values = dict(name="methods", config="quickstart", workdir=Path("runs"), seeds=1, first=0, methods=["mkd"])
    values |= dict(weights=[], teachers=[], students=[], log=None, flags=[])
    return Options(**values | changes)


def test_the_twin_is_trained_alone():
    flags = ["--config.teacher.weights=FILE", "--config.methods.mkd.weight=2", "--config.data.unlabelled=DIR"]
    flags.append("--config.steps=9")
    chosen, mkd = options(flags=flags), Variant("mkd", "mkd")
    twin, method = study_layout.twin_flags(chosen, mkd, 3), study_layout.run_flags(chosen, mkd, 3)
    same = ["--config.twin=False", "--config.eval.every=0", "--config.seed=3"]
    assert method == ["--config=quickstart:mkd", *flags, *same]
    none = ["--config.teacher.detector=", "--config.teacher.weights="]
    assert twin == ["--config=quickstart:", "--config.steps=9", *none, *same]
    recipe = "distill/mkd_rtmdet"
    assert study_layout.run_flags(options(config=f"{recipe}:tiny,s"), mkd, 3)[0] == f"--config={recipe}:tiny,s,mkd"
    assert not settings.read(f"{recipe}:tiny,s,").methods
    for flags in (twin, method):
        made = settings.read(flags[0].removeprefix("--config="), flags[1:])
        assert bool(made.methods) == bool(made.teacher.weights) == (flags is method) and made.steps == 9
    for name in ("quickstart", "distill/coco_folder"):
        assert not settings.read(f"{name}:").methods


def test_a_flag_of_a_variant_replaces_that_of_the_command():
    variant = Variant("a", "mkd", ("--config.teacher.weights=A",))
    flags = study_layout.run_flags(options(flags=["--config.teacher.weights=B"]), variant, 0)
    assert [flag for flag in flags if "teacher" in flag] == ["--config.teacher.weights=A"]


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: AP by what the flags say; remembers the folders."""
    folders = []

    def train(flags, workdir):
        said = {flag.partition("=")[0].removeprefix("--config"): flag.partition("=")[2] for flag in flags}
        folders.append(str(workdir))
        if said[""].endswith(":ld"):
            raise study_runs.Failed("no bins")
        if said[""].endswith(":pkd") and said[".seed"] == "0":
            raise study_runs.Failed("not finite")
        method = said[""].partition(":")[2]
        ap = 0.1 + 0.1 * int(said[".seed"])
        ap += {"": 0.0, "mkd": -0.01 if said[".seed"] == "0" else 0.0, "cwd": 0.02 * ap / 0.1, "pkd": 0.01}[method]
        ap += 0.1 * (said.get(".student.detector") == "rtmdet_micro") + 0.01 * ("mkd.weight" in " ".join(flags))
        metrics = {"AP": ap, "AP50": ap + 0.1, "params": 10, "flops": 2e6}
        if not workdir.exists():
            run = FACTS | {"command": [*flags, f"--workdir={workdir}"]}
            workdir.mkdir(parents=True)
            (workdir / "config.json").write_text(json.dumps({"config": {}, "runs": [run]}))
            shutil.copytree(TEACHER, workdir / "student")
        return {"student": metrics, "teacher": metrics | {"AP": 0.9} if method else None}

    monkeypatch.setattr(study_runs, "train", train)
    return folders


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a run of a study that fails", "reported in the table: seed 0 failed: not finite"
)
def test_methods_are_ranked_by_gain_and_what_does_not_help_is_said(trained, tmp_path, capsys):
    command = ["methods", f"--workdir={tmp_path}", "--seeds=2", "--methods=mkd,ld,pkd,cwd", "--", "--config.steps=9"]
    assert cli.main(["study", *command]) == 0
    out = capsys.readouterr().out
    _, *rows = cells(out)
    assert [row[0] for row in rows] == ["cwd", "pkd", "mkd", "ld"]
    assert rows[0][1:] == [
        "+3.00",
        "-9.71 to +15.71",
        "+2.00, +4.00",
        "not shown",
        "+3.00 ± 1.00",
        "18.00 ± 6.00",
        "15.00 ± 5.00",
        "90.00",
        "2",
        "",
    ]
    assert rows[1][1] == "+1.00" and rows[1][-2:] == ["1", "seed 0 failed: not finite"]
    assert rows[2][4] == "not shown" and rows[3][-2:] == ["0", "seed 0, 1 failed: no bins"]
    assert sum(folder.endswith("twin") for folder in trained) == 2, "one twin a seed"
    summary = json.loads(out.splitlines()[-1])
    assert [row["seeds"] for row in summary["rows"]] == [[0, 1], [1], [0, 1], []]
    assert cv2.imread(str(tmp_path / "methods.png")).ndim == 3


def test_methods_with_published_and_with_automatic_weights(trained, tmp_path, capsys):
    log, flags = tmp_path / "log.md", ["--methods=cwd,mkd", "--weights=published,auto", "--seeds=1"]
    assert cli.main(["study", "methods", f"--workdir={tmp_path / 'runs'}", f"--log={log}", *flags]) == 0
    assert {row[0] for row in cells(log.read_text())[1:]} == {"cwd", "cwd, auto", "mkd", "mkd, auto"}
    assert " ".join(flags[:2]) in log.read_text()
    automatic = [folder for folder in trained if "auto" in folder]
    assert [Path(folder).name for folder in automatic] == [f"{m}_methods.{m}.weight=auto" for m in ("cwd", "mkd")]
    assert len(study_variants.weights_auto("mkd+rm")) == 2


def test_mkds_tables(trained, tmp_path, capsys):
    log = tmp_path / "log.md"
    for name, *flags in (
        ("components",),
        ("weight", "--weights=0.1,1"),
        ("teacher", f"--teachers={TEACHER}"),
        ("sizes", "--students=rtmdet_pico,rtmdet_micro"),
    ):
        assert cli.main(["study", name, f"--workdir={tmp_path / 'runs'}", "--seeds=1", f"--log={log}", *flags]) == 0
    rows = cells(log.read_text())
    names = [row[0] for row in rows if row[0]]
    parts = [f"mkd without {part}" for part in ("feature", "multiscale", "frequency", "alignment")]
    assert names[:7] == ["mkd", *parts, "mkd, weight 0.1", "mkd, weight 1"]
    assert names[7].startswith("rtmdet_micro (") and names[8:] == ["rtmdet_pico", "rtmdet_micro"]
    assert rows[-3][-5:-2] == ["parameters", "MFLOPs", "latency in ms"]
    assert rows[-1][9:11] == ["10", "2.0"] and float(rows[-1][11]) > 0
    assert (rows[-2][7], rows[-1][7]) == ("10.00", "20.00"), "each size has its twin"
    folders = sorted({folder.rpartition("/")[2] for folder in trained})
    assert {"twin", "twin_student.detector=rtmdet_micro", "mkd", "mkd_methods.mkd.weight=0.1"} <= set(folders)
    assert not [folder for folder in folders if "weight=1.0" in folder], "the default's runs are those of plain MKD"
    assert "mkd_methods.mkd.feature_weight=0.0" in folders and "mkd_student.detector=rtmdet_pico" in folders
    for row in rows:
        assert len(row) in (11, 14)


def test_what_mkds_mask_leaves_open(trained, tmp_path, capsys):
    assert cli.main(["study", "mask", f"--workdir={tmp_path}", "--seeds=1", "--config.methods.mkd.weight=auto"]) == 0
    names = {row[0] for row in cells(capsys.readouterr().out)[1:]}
    changes = ("zeta=0.25", "zeta=0.75", "hermitian=False", "keep_dc=True", "generator=True")
    assert names == {"mkd", *(f"mkd, {change}" for change in changes)}
    options = methods.options("mkd")
    assert all(str(options[name]) != value for name, value in (change.split("=") for change in changes))


def test_methods_with_several_teachers_share_the_twins(trained, tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", "--seeds=1", f"--teachers={TEACHER}"]
    assert cli.main(["study", "methods", "--methods=mkd,cwd", *arguments]) == 0
    out = capsys.readouterr().out
    assert [row[0] for row in cells(out)[1:]] == [f"{name}, rtmdet_micro ({TEACHER})" for name in ("cwd", "mkd")]
    assert cli.main(["study", "teacher", *arguments]) == 0
    assert len(set(trained)) == 3, "twin, mkd, cwd: the study of teachers has the same runs"


def test_runs_of_a_teacher_share_a_cache_that_is_written_first(trained, tmp_path, monkeypatch, capsys):
    """With views for all seeds, otherwise for each; whether a finished run had one makes no difference."""
    calls = []
    monkeypatch.setattr(study_runs, "call", lambda command: calls.append((command[3:5], command[5:])))
    common = [f"--workdir={tmp_path / 'runs'}", "--seeds=2", "--methods=mkd,cwd", f"--config.teacher.cache={tmp_path}"]
    assert cli.main(["study", "methods", *common, "--config.data.views=3"]) == 0
    assert [call[0] for call in calls] == [["cache", "--config=quickstart:mkd+cwd"]] * 2
    assert all(f"--config.teacher.cache={tmp_path}" in flags for _, flags in calls)
    calls.clear()
    other = shutil.copytree(TEACHER, tmp_path / "other")
    assert cli.main(["study", "methods", *common, f"--teachers={TEACHER},{other}"]) == 0
    folders = [flag.partition("=")[2] for _, flags in calls for flag in flags if "teacher.cache=" in flag]
    assert [Path(folder).name for folder in folders] == ["seed0", "seed0", "seed1", "seed1"]
    assert len({*folders}) == 4, "each teacher and seed has its own"
    variant = Variant("mkd", "mkd")
    cached = options(cache=str(tmp_path), views=True, flags=[f"--config.teacher.cache={tmp_path}"])
    assert f"--config.teacher.cache={tmp_path}" in study_layout.run_flags(cached, variant, 0)
    assert not [flag for flag in study_layout.twin_flags(cached, variant, 0) if "cache" in flag]
    flags = ["--config=a", "--config.seed=1", "--config.teacher.cache=A"]
    assert study_runs._without_cache(flags) == study_runs._without_cache([*flags[:2], "--config.teacher.cache=B"])

    def refuse(command):
        raise study_runs.Failed("config.methods.ld: no bins")

    monkeypatch.setattr(study_runs, "call", refuse)
    told = refused(capsys, "study", "methods", *common)
    assert told == "kdjax: the teacher's cache, which all runs need, was not written: config.methods.ld: no bins"


@pytest.mark.user_input(
    "Config and flags", "an unknown method, teacher, student or flag of a study", "refused before any run"
)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["methods", "--methods=nope"], "'nope'"),
        (["teacher"], "--teachers is missing"),
        (["teacher", "--teachers=/nowhere"], "/nowhere is not a student/ folder"),
        (["sizes", "--students=rtmdet_huge"], "rtmdet_huge"),
        (["weight", "--weights=a"], "--weights: 'a' is not a number"),
        (["methods", "--weights=1"], "--weights: '1' is not published or auto"),
        (["weight", "--seeds=0"], "--seeds must be >= 1, not 0"),
        (["weight", "--config=quickstrat"], "did you mean quickstart?"),
        (["weight", "--config.teachers.a.weights=a"], "config.teachers.a: a study has one teacher: set config.teacher"),
        (["weight", "--config.step=1"], "unknown setting config.step (did you mean config.steps?)"),
    ],
)
def test_bad_input_is_refused_before_any_run(arguments, words, trained, tmp_path, capsys):
    assert cli.main(["study", *arguments, f"--workdir={tmp_path}"]) == 2
    assert words in capsys.readouterr().err and not trained


def test_a_folder_is_named_after_its_flags():
    assert study_layout.label("mkd", "--config.teacher.weights=/a b/c") == "mkd_teacher.weights=-a-b-c"


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a study that runs already, or whose files are damaged",
    "refused: wait until it ends; it is damaged or incomplete",
)
@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a `results.json` changed by hand, which a study reads",
    "refused: its SHA-256 differs: delete it, and let the run evaluate again",
)
def test_a_study_whose_files_are_damaged_busy_or_in_the_way_is_refused(tmp_path, capsys):
    given = options(workdir=tmp_path, log=tmp_path / "log.md")
    (tmp_path / "methods.png").mkdir()
    with pytest.raises(
        UserError, match=r"^--workdir: .*methods.png is a folder, where a file is to be written: move it"
    ):
        study.check_outputs(given)
    (tmp_path / "methods.png").rmdir()
    (tmp_path / "log.md").mkdir()
    with pytest.raises(UserError, match=r"^--log: .*log.md is a folder, where a file is to be written: move it away$"):
        study.check_outputs(given)
    (tmp_path / "log.md").rmdir()
    with files.lock(tmp_path / ".lock", "busy"):
        told = refused(capsys, "study", "methods", f"--workdir={tmp_path}", "--methods=mkd")
    busy = f"--workdir: another study runs in {tmp_path}: wait until it ends, or choose another folder"
    assert told == f"kdjax: {busy}"
    flags = ["--config=a"]
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "runs": [FACTS | {"command": flags}]}))
    for text in ("{", "[]", '{"student": {}}', '{"student": null}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match=r"^.*results.json: it is damaged or incomplete \("):
            study_runs.train(flags, tmp_path)
    for changed in ((), ("0.25", "0.75"), ("sha256", "sha257")):
        text = json.dumps(files.sealed({"student": {"AP": 0.25}}))
        (tmp_path / "results.json").write_text(text.replace(*changed) if changed else text)
        told = r"^.*results.json: it was changed \(its SHA-256 differs\): delete it, and let the run evaluate again$"
        with pytest.raises(UserError, match=told) if changed else contextlib.nullcontext():
            study_runs.train(flags, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^.*config.json: it is damaged or incomplete \(KeyError\('runs'\)\)$"):
        study_runs.flags_of(tmp_path)
