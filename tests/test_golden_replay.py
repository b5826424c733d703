"""kdjax reproduces the reference numbers, and the replay fails where a number is wrong."""

import fnmatch
import functools
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdjax import methods
from tests import golden_replay
from tests.golden_checks import detr_grad, whole_steps
from tests.golden_checks.api import Check, load, relative_error
from tests.shared import ROOT, SHARED, script

OWN = Path(__file__).parent / "golden"
# Steps of two whole networks, and gradients of transformers, take long to compile and have a test of their own.
WHOLE = whole_steps.CHECKS + detr_grad.CHECKS
CHECKS = [entry for entry in golden_replay.known_checks() if entry not in WHOLE]
# Files that hold cases of several methods: how those of each method begin. Otherwise a file is its method's as a whole.
CASES = {
    "kd/logit_*": {
        "bckd": ("BCKD",),
        "crosskd": ("CrossKD KL", "CrossKD KD-QFL"),
        "dkd": ("DKD",),
        "hinton": ("KL", "KD (mdistiller)"),
        "ld": ("LD", "KL"),
    },
    "kd/feature_misc_*": {"fitnet": ("mmrazor L2Loss",), "mkd": ("multi-scale average", "FFT mask")},
    "ops/detr_losses_*": {"dsi": ("DSI",)},
}


# Whole networks take long to compile: some of RTMDet and one with a ResNet run by default, beside the heads in our own
# folder.
LONG = (
    "model/retinanet_*",
    "model/fcos_*",
    "model/gfl_*",
    "model/atss_*",
    "model/rtmdet_[bdf]*",
    "model/rtmdetins_*",
    "model/faster_a*",
    "model/mask_a*",
    "model/dfine_*",
    "model/rtdetr_*",
    "tables/rtmdet_family*",
    "ops/contrastive_dn_*",
    "ops/deform_attn_*",
    "ops/hungarian_*",
)


def files() -> list:
    """Every file of both folders; one that is the same in both is replayed from the shared one."""
    shared = SHARED and SHARED / "golden"
    found = [("shared", shared, name) for name in golden_replay.files_of(shared)] if shared else []
    for name in golden_replay.files_of(OWN):
        twin = shared and shared / name
        if not (twin and twin.is_file() and twin.read_bytes() == (OWN / name).read_bytes()):
            found.append(("own", OWN, name))
    return [
        pytest.param(root, name, id=f"{label}:{name}", marks=[pytest.mark.slow] * is_long(name))
        for label, root, name in found
    ]


def is_long(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LONG)


@functools.cache
def replayed(root: Path, name: str) -> list[Check]:
    """Every file is replayed once, for all tests."""
    return list(golden_replay.replay_file(root, name, CHECKS))


@pytest.mark.parametrize(("root", "name"), files())
def test_reference_numbers_hold(root, name):
    checks = replayed(root, name)
    failed = [golden_replay.line(name, check) for check in checks if check.verdict == "failed"]
    assert not failed, "\n".join(failed)
    reasons = {check.skip for check in checks}
    if None not in reasons:
        pytest.skip("; ".join(sorted(reasons)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("root", "name"), [p for p in files() if any(fnmatch.fnmatchcase(p.values[1], pattern) for pattern, _ in WHOLE)]
)
def test_whole_steps_hold(root, name):
    checks = list(golden_replay.replay_file(root, name, WHOLE))
    failed = [golden_replay.line(name, check) for check in checks if check.verdict == "failed"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("method", methods.names())
def test_the_errors_that_a_method_states_are_not_exceeded(method):
    """Twice the stated error is allowed: rounding differs between processors and versions of the compiler."""
    generate = script(ROOT / "docs" / "generate.py")
    *_, sections = generate.read_module(method, importlib.import_module(f"kdjax.methods.{method}").__doc__)
    bounds = stated_errors(sections["Proof"], generate.GOLDEN)
    for root, name in [parameters.values for parameters in files()]:
        for pattern, bound in bounds.items():
            if fnmatch.fnmatchcase(name, f"{pattern}.npz"):
                cases = own_cases(method, root, name)
                compared = [
                    c for c in replayed(root, name) if c.tolerance and (not cases or c.name.split()[0] in cases)
                ]
                assert compared, f"{name} has no check for {method}"
                worst = max(compared, key=lambda check: check.error)
                assert worst.error <= 2 * bound, f"{method} states {bound} for {pattern}; {name}, {worst}"


def stated_errors(proof: str, golden: re.Pattern) -> dict[str, float]:
    """Pattern of files -> the largest error that a clause which names it states."""
    bounds = {}
    for clause in re.split(r"; |\. ", proof):
        numbers, patterns = [float(x) for x in re.findall(r"\d(?:\.\d+)?e-\d+", clause)], golden.findall(clause)
        assert patterns or not numbers, f"of which files is the error in {clause!r}?"
        for pattern in patterns if numbers else ():
            bounds[pattern] = max(bounds.get(pattern, 0.0), *numbers)
    return bounds


def own_cases(method: str, root: Path, name: str) -> list[str]:
    """The cases of a file that are the method's, by their key; none if the file is its own as a whole."""
    for pattern, owners in CASES.items():
        if fnmatch.fnmatchcase(name, pattern) and method in owners:
            return [
                case
                for case, entry in load(root / name)[1]["cases"].items()
                if entry["what"].startswith(owners[method])
            ]
    return []


def test_subset_is_small_and_of_every_kind():
    names = golden_replay.files_of(OWN)
    assert sum((OWN / name).stat().st_size for name in names) < 3e6
    assert {name.split("/")[0] for name in names} == {"coco", "kd", "loss", "model", "ops", "tables"}


def run(capsys, *arguments) -> tuple[int, str]:
    status = golden_replay.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out + output.err


def copy_of(tmp_path: Path, name: str) -> Path:
    """The file of that name alone, in a folder of its own."""
    target = tmp_path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(OWN / name, target)
    target.chmod(0o644)
    return target


def rewrite(path: Path, change) -> None:
    """Store an `.npz` file again after `change(arrays, meta)`."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    change(arrays, meta)
    np.savez(path, meta=json.dumps(meta), **arrays)


def own(pattern: str) -> str:
    (name,) = [path.relative_to(OWN).as_posix() for path in OWN.glob(pattern)]
    return name


def nudge(arrays, key: str, tolerance: float) -> None:
    """Move one number by ten times the tolerance, which is relative to the largest."""
    flat = arrays[key].astype(np.float64).ravel()
    flat[np.argmax(np.abs(flat))] += 10 * tolerance * np.abs(flat).max()
    arrays[key] = flat.reshape(arrays[key].shape).astype(arrays[key].dtype)


def find_case(meta, *words: str) -> str:
    return next(case for case, entry in meta["cases"].items() if all(word in json.dumps(entry) for word in words))


@pytest.mark.parametrize(
    ("pattern", "words", "key", "tolerance"),
    [
        ("ops/anchors_*.npz", ("MlvlPointGenerator",), "points1", 1e-5),
        ("ops/coders_*.npz", ("DistancePoint decode",), "boxes", 1e-5),
        ("ops/coders_*.npz", ("pairwise giou",), "out", 1e-5),
        ("ops/assigners_*.npz", ("DynamicSoftLabel", "normal"), "max_overlaps", None),
        ("ops/nms_*.npz", ("multiclass",), "dets", 1e-5),
        ("loss/det_cls_*.npz", ("QualityFocalLoss",), "value", 1e-5),
        ("loss/det_cls_*.npz", ("QualityFocalLoss",), "grad_pred", 1e-4),
        ("loss/det_box_*.npz", ("GIoULoss", "mean"), "value", 1e-5),
        ("loss/det_box_*.npz", ("CIoULoss", "none"), "grad_pred", 1e-4),
    ],
)
def test_a_wrong_number_fails(tmp_path, capsys, pattern, words, key, tolerance):
    path = copy_of(tmp_path, own(pattern))

    def change(arrays, meta):
        case = find_case(meta, *words)
        meta["cases"] = {case: meta["cases"][case]}
        for other in [name for name in arrays if not name.startswith(case)]:
            del arrays[other]
        if tolerance is None:  # overlaps: -1e8 stands for none, so the largest number is no overlap
            arrays[f"{case}/{key}"][arrays[f"{case}/gt_inds"] > 0] *= 1 + 1e-3
        else:
            nudge(arrays, f"{case}/{key}", tolerance)

    rewrite(path, change)
    status, output = run(capsys, tmp_path)
    assert status == 1 and " 0 failed" not in output
    assert any(" failed" in text and path.name in text for text in output.splitlines())


def test_a_wrong_index_fails(tmp_path, capsys):
    path = copy_of(tmp_path, own("ops/nms_*.npz"))

    def change(arrays, meta):
        case = find_case(meta, "batched")
        arrays[f"{case}/keep"] = arrays[f"{case}/keep"][1:]

    rewrite(path, change)
    assert run(capsys, tmp_path)[0] == 1


def test_a_wrong_metric_fails(tmp_path, capsys):
    folder = own("coco/*/expected.json").rsplit("/", 1)[0]
    shutil.copytree(OWN / folder, tmp_path / folder)
    path = tmp_path / folder / "expected.json"
    path.chmod(0o644)
    expected = json.loads(path.read_text())
    expected["bbox"]["stats"][5] += 1e-8
    path.write_text(json.dumps(expected))
    status, output = run(capsys, tmp_path)
    assert status == 1 and ", 1 failed, 0 skipped" in output and "bbox stats" in output


def test_unknown_files_cases_and_parameters_fail(tmp_path, capsys):
    path = copy_of(tmp_path, own("ops/coders_*.npz"))

    def change(arrays, meta):
        meta["cases"][find_case(meta, "pairwise iou")]["what"] = "an unknown operation"
        meta["cases"][find_case(meta, "DistancePoint encode")]["params"]["novelty"] = 3
        arrays["case99/out"] = np.zeros(2)

    rewrite(path, change)
    (tmp_path / "ops" / "strange.npz").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("?")
    status, output = run(capsys, tmp_path)
    assert status == 1 and ", 5 failed, " in output
    for words in ("an unknown operation", "novelty", "case99", "ops/strange.npz", "notes.txt"):
        assert any(words in text and "failed" in text for text in output.splitlines()), words


def test_a_broken_file_fails_and_the_run_goes_on(tmp_path, capsys):
    path = copy_of(tmp_path, own("ops/anchors_*.npz"))
    copy_of(tmp_path, own("ops/nms_*.npz"))
    path.write_bytes(path.read_bytes()[:300])
    status, output = run(capsys, tmp_path)
    assert status == 1 and ", 1 failed, 0 skipped" in output and not output.splitlines()[-1].startswith("0 passed")


def test_only_and_empty_selections(tmp_path, capsys):
    path = copy_of(tmp_path, own("ops/nms_*.npz"))
    (tmp_path / "README.md").write_text("about")
    status, output = run(capsys, tmp_path, "--only", "ops/nms")
    assert status == 0 and output.splitlines()[-1].endswith(" passed, 0 failed, 0 skipped")
    assert all(path.name in text for text in output.splitlines()[1:-1])
    for arguments in ((tmp_path, "--only", "ops/mns"), (tmp_path / "nothing",)):
        status, output = run(capsys, *arguments)
        assert status == 2 and len(output.splitlines()) == 1 and "no f" in output


def test_verdicts_and_errors():
    assert Check("a", 0.5, 1.0).verdict == "passed"
    assert Check("a", 0.5, 1.0, skip="why").verdict == "skipped"
    for bad in (Check("a"), Check("a", 2.0, 1.0), Check("a", float("nan"), 1.0), Check("a", 0.0, 1.0, message="no")):
        assert bad.verdict == "failed"
    assert relative_error([1.0, 4.0], [1.0, 5.0]) == pytest.approx(0.2)
    assert relative_error([1e-3], [0.0]) == pytest.approx(1e-3)
    assert relative_error([np.nan], [1.0]) == np.inf and relative_error([np.nan], [np.nan]) == np.inf
    with pytest.raises(ValueError, match="shape"):
        relative_error([1.0], [[1.0]])
