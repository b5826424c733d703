"""The wheel, installed where nothing but its declared dependencies is, does what the README says in an empty folder."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest
from packaging.requirements import Requirement

from kdjax.data import records, scenes
from tests.shared import ROOT


class Installed(NamedTuple):
    """A virtual environment with the wheel, and the files that the build wrote."""

    folder: Path
    site: Path  # its site-packages
    requires: list[str]
    wheel: Path
    sdist: Path

    def link(self, extra: str = "") -> None:
        """Adds what pip would install: what kdjax, or one of its extras, requires, and what that requires."""
        for name in closure(text for text in self.requires if applies(text, extra)):
            for top in {file.parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
                target = self.site / top
                if not target.exists() and not top.endswith(".pth"):
                    target.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))


def applies(text: str, extra: str) -> bool:
    """Whether a requirement belongs to an extra; "" stands for those without one."""
    marker = Requirement(text).marker
    return marker is None or marker.evaluate({"extra": extra})


def closure(texts: Iterable[str]) -> set[str]:
    """The packages that these requirements install, of those that are installed here."""
    open_, seen = [Requirement(text) for text in texts], set()
    while open_:
        asked = open_.pop()
        for extra in {"", *asked.extras} - {extra for name, extra in seen if name == asked.name}:
            seen.add((asked.name, extra))
            open_ += [Requirement(text) for text in metadata.requires(asked.name) or () if applies(text, extra)]
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Builds with the command of `make package`, and installs the wheel into a new virtual environment."""
    [build] = re.findall(r"^\t\$\(PY\) (-m build .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    dist, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("env")
    call([sys.executable, *build.split(), f"--outdir={dist}"], cwd=ROOT)
    ([wheel], [sdist]) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    call([*pip, "--no-deps", "--no-index", str(wheel)])
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    [kdjax] = metadata.distributions(path=[str(site)])
    made = Installed(folder, site, kdjax.requires or [], wheel, sdist)
    made.link()
    return made


@pytest.fixture
def run(installed, tmp_path, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """Calls a program of the environment in an empty folder, as a user who has no checkout."""
    for name in {"PYTHONPATH", *(name for name in os.environ if name.startswith("KDJAX_"))}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, and not the eight of these tests
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    (tmp_path / "empty").mkdir()

    def run(program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        return call([str(installed.folder / "bin" / program), *arguments], cwd=tmp_path / "empty", code=code)

    return run


def call(command: list[str], cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)
    assert done.returncode == code, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done


def files(folder: str) -> set[str]:
    """What git tracks, or would track, in a folder of the repository."""
    listed = call(["git", "ls-files", "--cached", "--others", "--exclude-standard", folder], cwd=ROOT).stdout
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


def images(folder: Path, count: int) -> list[Path]:
    """Images of the scenes as files."""
    paths = []
    for image, encoded in scenes.stream("val", count):
        paths.append(folder / Path(image.file_name).with_suffix(".png").name)
        cv2.imwrite(str(paths[-1]), records.decode(encoded)[..., ::-1])
    return paths


# ------------------------------------------------------------------------------------------------------------ packages


def test_the_wheel_holds_the_package_the_configs_and_the_teacher(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files("kdjax") | {f"kdjax/{name}" for name in files("configs") | files("assets")}
    assert {"kdjax/py.typed", "kdjax/configs/quickstart.py", "kdjax/assets/quickstart_teacher/config.json"} <= names


def test_the_sdist_holds_what_the_tests_and_the_site_need(installed):
    with tarfile.open(installed.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("kdjax", "configs", "assets", "tests", "docs", "benchmarks", "constraints"):
        assert files(folder) <= names, files(folder) - names
    assert {"train.py", "Makefile", "mkdocs.yml", "README.md", "LICENSE", "pyproject.toml"} <= names


def test_twine_accepts_both(installed):
    call([sys.executable, "-m", "twine", "check", "--strict", str(installed.wheel), str(installed.sdist)])


# ------------------------------------------------------------------------------------------------------- the cheap half


def test_help_needs_no_checkout(run):
    told = run("kdjax", "--help").stdout
    for command in ("train", "study", "doctor", "predict", "evaluate", "latency", "export", "import-weights"):
        assert command in told


def test_configs_and_models_have_names(run, installed):
    """And nothing is imported from the repository, or from packages that only tests need."""
    code = """
import importlib.util, json, kdjax
from kdjax.commands import settings
config, recipe = settings.read("quickstart"), settings.read("distill/coco_folder:cwd")
model = kdjax.load("quickstart_teacher")
extra = [name for name in ("chex", "pytest", "onnxruntime", "torch") if importlib.util.find_spec(name)]
names = [config.student.detector, *recipe.methods, model.detector.name]
print(json.dumps([kdjax.__file__, str(model.path), extra, names, kdjax.__version__]))
"""
    file, path, extra, names, version = json.loads(run("python", "-c", code).stdout)
    assert Path(file).is_relative_to(installed.site) and Path(path).is_relative_to(installed.site)
    assert extra == [] and names == ["rtmdet_pico", "cwd", "rtmdet_micro"]
    assert installed.wheel.name.startswith(f"kdjax-{version}-")
    assert "did you mean quickstart?" in run("kdjax", "doctor", "--config=quickstrat", code=2).stderr


def test_losses_cost_jax_and_numpy(run):
    """`import kdjax.losses` imports nothing else, in less than 0.2 s beyond them."""
    code = """
import json, sys, time
import jax, jax.numpy, numpy
before, begun = set(sys.modules), time.process_time()
import kdjax.losses
spent = time.process_time() - begun
heads = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([spent, sorted(heads - set(sys.stdlib_module_names))]))
"""
    spent, heads = zip(*(json.loads(run("python", "-c", code).stdout) for _ in range(2)), strict=True)
    assert set(heads[0]) <= {"jax", "jaxlib", "numpy", "kdjax"}
    assert min(spent) < 0.2


def test_the_teacher_predicts(run, tmp_path):
    [path] = images(tmp_path, 1)
    run("kdjax", "predict", str(path), "--model=quickstart_teacher", "--out=predicted")
    found = json.loads((tmp_path / "empty" / "predicted" / "detections.json").read_text())
    assert max(row["score"] for row in found) > 0.3
    assert [file.name for file in (tmp_path / "empty" / "predicted" / "drawn").iterdir()]


# -------------------------------------------------------------------------------------------------------- the slow half

SMALL = ("--config.data.image_size=(64, 64)", "--config.data.scenes_val=8")
SHORT = (
    *SMALL,
    "--config.data.scenes_train=16",
    "--config.steps=4",
    "--config.optimizer.warmup=1",
    "--config.eval.every=2",
    "--config.eval.batch_size=8",
    "--config.log_every=2",
    "--config.checkpoint.every=2",
)


@pytest.mark.slow
def test_the_readmes_commands_and_example(run, installed, tmp_path):
    """A shortened quickstart and what follows it, with what `pip install kdjax` and then `kdjax[export]` bring."""
    folder = tmp_path / "empty"
    run("kdjax", "train", "--config=quickstart", "--workdir=runs/q", *SHORT)
    results = json.loads((folder / "runs" / "q" / "results.json").read_text())
    assert {"student", "twin", "teacher", "gain"} <= set(results) and (folder / "runs" / "q" / "report.html").is_file()

    run("kdjax", "evaluate", "--model=runs/q", "--data=scenes", "--limit=8", "--out=evaluated")
    assert 0 <= json.loads((folder / "evaluated" / "evaluation.json").read_text())["model"]["metrics"]["AP"] <= 1
    paths = images(tmp_path, 2)
    run("kdjax", "predict", *map(str, paths), "--model=runs/q/student", "--out=predicted")
    assert len(list((folder / "predicted" / "drawn").iterdir())) == 2

    assert "0 errors" in run("kdjax", "doctor", "--config=quickstart", *SMALL).stdout
    run("kdjax", "study", "methods", "--workdir=runs/study", "--methods=mkd,cwd", "--seeds=1", "--log=log.md", *SHORT)
    rows = [line.split("|") for line in (folder / "log.md").read_text().splitlines() if line.startswith("|")]
    assert {"mkd", "cwd"} <= {row[1].strip() for row in rows}
    assert (folder / "runs" / "study" / "methods.png").is_file()

    [block] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    after = f"\nassert set(adapters) == {{'cwd', 'pfi'}}\nkdjax.load('runs/q').detect({str(paths[0])!r})\n"
    run("python", "-c", block + after)

    export = ("kdjax", "export", "--model=runs/q", "--format=onnx", "--out=q.onnx")
    assert "pip install 'kdjax[export]'" in run(*export, code=2).stderr
    installed.link("export")
    run(*export)
    code = "import onnxruntime, sys; print([x.name for x in onnxruntime.InferenceSession('q.onnx').get_outputs()])"
    assert run("python", "-c", code).stdout.strip() == "['boxes', 'scores', 'labels']"
