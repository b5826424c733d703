"""The files that no other test reads: workflows, pre-commit, the script of continuous integration, metadata."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.shared import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path: Path) -> list[str]:
    """The lines of the steps of a workflow."""
    return [line for job in jobs(path).values() for step in job["steps"] for line in step.get("run", "").splitlines()]


def called(text: str) -> set[str]:
    """The targets of make that a script calls."""
    return {target for words in re.findall(r"\bmake((?: +[a-z][\w-]*)+)", text) for target in words.split()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_what_github_asks_for(path):
    whole = yaml.safe_load(path.read_text())
    assert isinstance(whole["name"], str) and whole["permissions"] == {"contents": "read"}
    assert set(whole[True]) >= {"push", "pull_request"}, "YAML 1.1 reads the key `on` as true"
    for name, job in whole["jobs"].items():
        assert job["runs-on"] and job["steps"], name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/a@v1")), step
        text = yaml.safe_dump(job)
        for variable in re.findall(r"\$\{\{ matrix\.(\w+) \}\}", text):
            matrix = job["strategy"]["matrix"]
            assert variable in matrix or all(variable in entry for entry in matrix["include"]), (name, variable)


def test_workflows_call_targets_and_tests_that_exist():
    text = "\n".join(line for path in WORKFLOWS for line in commands(path))
    assert called(text) == {"lint", "test", "test-all", "docs", "package"} <= TARGETS
    for name in re.findall(r"\btests/[\w/.]+", text):
        assert (ROOT / name).exists(), name
    extras = {extra for names in re.findall(r"'\.\[([\w,]+)\]'", text) for extra in names.split(",")}
    assert extras and extras <= set(PROJECT["optional-dependencies"])


def test_every_python_of_the_classifiers_is_tested():
    named = {word for line in PROJECT["classifiers"] for word in re.findall(r"^Programming.*:: (3\.\d+)$", line)}
    matrices = [job.get("strategy", {}).get("matrix", {}) for path in WORKFLOWS for job in jobs(path).values()]
    versions = {version for matrix in matrices for version in matrix.get("python", [])}
    versions |= {entry["python"] for matrix in matrices for entry in matrix.get("include", [])}
    assert named == versions
    oldest = min(versions, key=lambda version: int(version.partition(".")[2]))
    assert PROJECT["requires-python"] == f">={oldest}"


def test_the_oldest_jax_that_is_allowed_is_tested():
    [lowest] = [re.fullmatch(r"jax>=(.*)", text)[1] for text in PROJECT["dependencies"] if text.startswith("jax>")]
    wanted = [entry["jax"] for path in WORKFLOWS for entry in jobs(path)["jax"]["strategy"]["matrix"]["include"]]
    assert wanted.count(f"jax=={lowest}.0") == 1 and "jax" in wanted


def test_pre_commit_runs_tools_that_setup_installs():
    whole = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in whole["repos"] for hook in repository["hooks"]]
    tools = {hook["entry"].split()[0] for hook in hooks}
    dev = {re.match(r"[\w-]+", text)[0] for text in PROJECT["optional-dependencies"]["dev"]}
    assert tools and tools <= dev
    assert all(hook["language"] == "system" for hook in hooks), "nothing is downloaded"


@pytest.mark.parametrize("failing", ["", "lint", "test"])
def test_continuous_integration_lints_and_then_tests(failing, tmp_path):
    """The script with a stand-in for make, which writes its target down and fails for one of them."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ "$1" != "{failing}" ]\n')
    make.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run")], cwd=tmp_path, env=os.environ | path, timeout=60)
    assert (done.returncode == 0) == (not failing)
    assert (tmp_path / "called").read_text().split() == ["lint", "test"]


def test_constraints_pin_what_pyproject_asks_for():
    """Every requirement of kdjax, of its dev extra and of the extras in that has a version in each file."""
    names = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in ("docs", "export"))]
    texts = [text for entry in names for text in (entry if isinstance(entry, list) else [entry])]
    texts += [text for text in PROJECT["optional-dependencies"]["dev"] if "python_version" not in text]
    wanted = {re.match(r"[\w-]+", text)[0].lower().replace("_", "-") for text in texts} - {"kdjax"}
    files = sorted((ROOT / "constraints").glob("*.txt"))
    assert len(files) == 2
    for file in files:
        pins = [re.fullmatch(r"([\w.-]+)==[\w.]+", line)[1] for line in file.read_text().splitlines()]
        assert wanted <= {name.lower().replace("_", "-") for name in pins}, file.name
