"""What is read: links lead somewhere, commands are understood, the tutorial, the tasks and the notebook run."""

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh
from packaging.requirements import Requirement
from safetensors.numpy import save_file

import kdjax
from kdjax import cli, detectors, sharding, weights
from kdjax.commands.settings import read
from kdjax.data import scenes
from kdjax.export import packages
from kdjax.training import config as settings
from tests.shared import ROOT, script
from tests.support.models import save_noisy

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "benchmarks" / "README.md"]
PAGES += [ROOT / "assets" / "README.md", ROOT / "tests" / "golden" / "README.md"]
TUTORIAL = (DOCS / "tutorial.md").read_text()
# Pages whose commands run one after the other, and what they find; the tutorial makes its images.
WALKED = {
    "tutorial.md": {"images", "images/images/val"},
    "tasks/yolox.md": {"images", "best_ckpt.pth", "images/annotations/instances_train.json"},
    "tasks/phone.md": {"images", "model.safetensors", "images/annotations/instances_train.json"},
    "tasks/table.md": set(),
}
NOTEBOOK = DOCS / "quickstart.ipynb"


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```[^\0]*?^```$|^    .*$", "", text, flags=re.MULTILINE)


def headings(path: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of the links to files."""
    return re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target, anchor in links(prose(path.read_text())):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        assert not anchor or anchor in headings(found), f"{target}#{anchor}"


def pages_of(nav: list) -> list[str]:
    """The pages of a table of contents, with those of its sections."""
    values = [value for entry in nav for value in entry.values()]
    return [page for value in values for page in (pages_of(value) if isinstance(value, list) else [value])]


def test_every_page_is_in_the_sites_contents():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    outside = re.findall(r'^    "(\w+\.md)": "([\w/]+\.md)",$', (DOCS / "hooks.py").read_text(), re.MULTILINE)
    inside = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*inside, *(page for page, _ in outside)])
    assert len(outside) == 4 and all((ROOT / path).is_file() for _, path in outside)


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs kdjax[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The folder" in (tmp_path / "tutorial" / "index.html").read_text()
    assert 'href="../../methods/"' in (tmp_path / "reference" / "methods" / "index.html").read_text()
    for name in ("losses", "boxes", "methods", "detectors", "distill", "inference"):
        module = importlib.import_module(f"kdjax.{name}")
        page = (tmp_path / "reference" / name / "index.html").read_text()
        assert not [public for public in module.__all__ if f'id="kdjax.{name}.{public}"' not in page]
    page = (tmp_path / "reference" / "kdjax" / "index.html").read_text()
    modules = {"__version__", "boxes", "detectors", "losses", "methods"}
    assert not [name for name in set(kdjax.__all__) - modules if f'id="kdjax.{name}"' not in page]
    assert 'id="kdjax.training.run.run"' in (tmp_path / "reference" / "training" / "index.html").read_text()


def test_docstrings_become_what_the_reference_reads():
    """See docs/docstrings.py."""
    pytest.importorskip("griffe", reason="the site needs kdjax[docs]")
    text = "One.\n\nArgs:\n  a, *b: both\n    of them.\n  c: alone.\n\n"
    text += "Scope: all\n  of it.\nPeers: none.\n\nExample:\n  >>> 1"
    wanted = "One.\n\nArgs:\n  a: both\n    of them.\n  *b: both\n    of them.\n  c: alone.\n\n"
    wanted += "\n**Scope:** all of it.\n\n\n**Peers:** none.\n\n\nExamples:\n  >>> 1"
    assert script(DOCS / "docstrings.py").rewritten(text) == wanted


# ----------------------------------------------------------------------------------------------------------- commands


def joined(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


def documented() -> list[str]:
    """Every line of a block of code that calls kdjax."""
    text = "\n".join(joined(path.read_text()) for path in PAGES)
    lines = re.findall(r"^    (?:\.venv/bin/)?(kdjax .*)$", text, re.MULTILINE)
    return lines + [line for page in WALKED for line in commands(page) if line.startswith("kdjax ")]


def commands(page: str) -> list[str]:
    """The commands of a page that are run, each as one line."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in joined(block).splitlines()]


def resolved(arguments: list[str]):
    """The config of a train.py or doctor command, looked at as far as that needs no data."""
    (config,) = [flag.partition("=")[2] for flag in arguments if flag.startswith("--config=")]
    rest = [flag for flag in arguments if not flag.startswith(("--config=", "--workdir="))]
    made = read(config, rest)
    assert settings.unknown_keys(made) == []
    settings.check_values(made)
    return made


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize("line", documented())
def test_a_documented_command_is_understood(line, monkeypatch):
    """Its config and flags are read; what it would run is replaced."""
    _, command, *rest = shlex.split(line.replace("DIR", "x"), comments=True)
    rest = [flag for flag in rest if flag not in ("…", "...")]
    rest = [flag.replace(":NAME", ":cwd").replace("methods.NAME.", "methods.cwd.") for flag in rest]
    module, name = cli.RUNS.get(command, (f"kdjax.commands.{command.replace('-', '_')}", "run"))
    asked = inspect.signature(getattr(importlib.import_module(module), name))
    taken = {}
    monkeypatch.setattr(f"{module}.{name}", lambda **arguments: taken.update(asked.bind(**arguments).arguments) or 0)
    assert cli.main([command, *rest]) == 0 and taken
    if command in cli.RUNS:
        assert settings.unknown_keys(taken["config"]) == []
        settings.check_values(taken["config"])
        config = taken["config"]
        assert not config.methods or config.teacher.weights or config.teachers or config.data.check, "no teacher"


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize("page", WALKED)
def test_the_commands_of_a_page_are_understood_and_fit_together(page):
    """Also without the runs below: each config resolves, and what a command reads, one before it has written."""
    there = set(WALKED[page])
    for line in commands(page):
        program, *rest = shlex.split(line)
        assert (program, rest[0]) == ("python", "train.py") or (program in ("kdjax",) and line in documented()), line
        flags = [tuple(flag.removeprefix("--").split("=", 1)) for flag in rest if flag.startswith("--")]
        read = {value for name, value in flags if name in ("model", "against", "data", "config.data.root")}
        read |= {value for name, value in flags if name in ("config.teacher.weights", "classes")}
        read |= {path for path in rest[1:] if not path.startswith("--") and rest[0] != "study"}
        assert (read or rest[0] == "study") and read <= there, (line, read - there)
        for name, value in flags:
            there |= {value} if name == "out" else {f"{value}/student", f"{value}/twin"} if name == "workdir" else set()
        if program == "python":
            config = resolved(rest[1:])
            assert config.data.check or any(name == "workdir" for name, _ in flags)


# What makes the pages short: flags that are added to a command, by its program or command, and names in all of them.
TINY = [
    "--config.steps=4",
    "--config.batch_size=4",
    "--config.data.image_size=(64,64)",
    "--config.optimizer.warmup=1",
    "--config.eval.batch_size=4",
    "--config.eval.every=0",
    "--config.log_every=2",
    f"--config.compile_cache={ROOT / '.cache' / 'jax'}",
]
STUDENT = "--config.student.detector="
SHORT = {"train.py": TINY, "train": TINY, "doctor": TINY, "evaluate": ["--limit=6"]}
SHORT |= {"export": ["--limit=6", "--max-ap-loss=100"], "latency": ["--runs=2", "--threads=1"]}
SHORT["study"] = [*TINY, "--seeds=1", "--config.data.scenes_train=8", "--config.data.scenes_val=4"]
SMALL = {"yolox_s": "yolox_pico", "yolox_nano": "yolox_pico", "dfine_s": "dfine_n", "rtmdet_nano": "rtmdet_pico"}
IMAGES = {'("train", 200)': '("train", 12)', '("val", 100)': '("val", 6)'}


def no_litert() -> bool:
    return None in [importlib.util.find_spec(name) for name in ("ai_edge_litert", "litert_converter")]


def walk(page: str, folder: Path, training: Sequence[str] = ()) -> dict[str, str]:
    """Runs the commands of a page, one after the other, in a folder with what the checkout has; what each printed.

    Flags of `training` are given to `kdjax train` and `kdjax doctor`, in place of those of the page and of `TINY`.
    """
    for name in ("train.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    [makes] = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
    for old, new in IMAGES.items():
        assert makes.count(old) == 1
        makes = makes.replace(old, new)
    caches = {"KDJAX_CACHE": str(folder / "cache"), "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | caches | {"PYTHONPATH": paths, "XLA_FLAGS": ""}

    def call(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)

    assert call("-c", makes).returncode == 0
    told = {}
    for line in commands(page):
        program, *rest = shlex.split(functools.reduce(lambda text, name: text.replace(name, SMALL[name]), SMALL, line))
        if (packages.missing() and ".onnx" in line) or (no_litert() and ".tflite" in line):
            continue  # needs kdjax[export] or kdjax[litert]
        more = SHORT.get(rest[0], [])
        if rest[0] in ("train", "doctor"):
            own = {flag.partition("=")[0] for flag in training}
            more = [flag for flag in more if flag.partition("=")[0] not in own] + list(training)
        names = {flag.partition("=")[0] for flag in more}
        rest = [flag for flag in rest if flag.partition("=")[0] not in names]  # a flag may be given once
        if rest[0] in ("train.py", "train", "doctor", "study") and STUDENT not in line:
            more = [*more, f"{STUDENT}rtmdet_pico"]
        done = call(*(["-m", "kdjax"] if program == "kdjax" else []), *rest, *more)
        # An untrained teacher is a fault, which the doctor names.
        assert done.returncode in ((0, 1) if rest[0] == "doctor" else (0,)), (line, done.stderr[-2000:])
        told[line] = done.stdout
    return told


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    told = walk("tutorial.md", tmp_path)
    assert "12 images" in next(iter(told.values()))
    assert re.search(
        r"^\d+ errors?, \d+ warnings?, \d+ ok$",
        next(text for line, text in told.items() if "doctor" in line),
        re.MULTILINE,
    )
    assert set(json.loads((tmp_path / "runs" / "mkd" / "results.json").read_text())["gain"]) > {"AP", "AP50"}
    made = ["runs/mkd/report.html", "runs/mkd/student/README.md", "evaluated/report.html", "predicted/detections.json"]
    made += [] if packages.missing() else ["student.onnx", "student_int8.onnx"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    assert len(list((tmp_path / "predicted" / "drawn").iterdir())) == 6


@pytest.mark.slow
def test_the_page_of_a_yolox_runs(tmp_path):
    torch = pytest.importorskip("torch")
    detector = detectors.build("yolox_pico", len(scenes.CLASSES))
    state = weights.to_torch(detector, *detector.init(jax.random.key(0)))
    torch.save({"model": {name: torch.tensor(value) for name, value in state.items()}}, tmp_path / "best_ckpt.pth")
    # The student starts from weights that detect something: a file is compared by its detections.
    save_noisy("yolox_pico", tmp_path / "noisy")
    noisy = kdjax.load(tmp_path / "noisy")
    save_file(weights.to_torch(noisy.detector, *noisy.variables), tmp_path / "start.safetensors")
    walk("tasks/yolox.md", tmp_path, ["--config.student.weights=start.safetensors"])
    made = ["evaluated_teacher/report.html", "runs/study/methods.png", "runs/student/report.html"]
    made += [] if packages.missing() else ["student.onnx", "student_int8.onnx"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []


@pytest.mark.slow
def test_the_page_of_a_phone_runs(tmp_path):
    detector = detectors.build("dfine_n", len(scenes.CLASSES))
    save_file(weights.to_torch(detector, *detector.init(jax.random.key(0))), tmp_path / "model.safetensors")
    # A file in int8 is compared by its detections, so the student starts from weights of the same images.
    trained = kdjax.load("quickstart_teacher")
    save_file(weights.to_torch(trained.detector, *trained.variables), tmp_path / "start.safetensors")
    start = ["--config.student.detector=rtmdet_micro", "--config.student.weights=start.safetensors"]
    training = [*start, "--config.data.image_size=(128,128)", "--config.optimizer.lr=0.002", "--config.steps=60"]
    told = walk("tasks/phone.md", tmp_path, training)
    made = ["evaluated_teacher/report.html", "runs/phone/report.html", "runs/phone/twin/model.safetensors"]
    made += [] if no_litert() else ["student.tflite", "student.tflite.json"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    assert any("rtmdet_micro" in text for line, text in told.items() if "doctor" in line)


@pytest.mark.slow
def test_the_page_of_a_table_runs(tmp_path):
    walk("tasks/table.md", tmp_path)
    rows = (tmp_path / "runs" / "components.md").read_text()
    assert all(f"| mkd without {part} |" in rows for part in ("feature", "multiscale", "frequency", "alignment"))
    assert all(f"| {method} |" in (tmp_path / "runs" / "methods.md").read_text() for method in ("pkd", "cwd", "mgd"))


# ------------------------------------------------------------------------------------------------------------ numbers

LOG = ROOT / "benchmarks" / "README.md"
# Of README.md, with the reason why no run is behind them.
NOT_MEASURED = {
    r"Python 3\.11": "the oldest version that is supported",
    r"ResNe(X)?t [\d, ]+ and \d+": "names of networks",
    r"COCO's 12 metrics": "COCO defines them",
    r"\*\*Methods\*\*: \d+": "the number of files, which the test below counts",
    r"Apache-2\.0": "a licence",
}
NUMBER = r"(?<![\w.,-])[+−-]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\w)(?: million)?"


def sections(text: str) -> dict[str, str]:
    """The text under each heading, by its anchor, with that of the headings below it."""
    found, open_ = {}, []
    for line in text.splitlines():
        if title := re.match(r"(#+) (.*)", line):
            open_ = [(depth, name) for depth, name in open_ if depth < len(title[1])]
            open_.append((len(title[1]), re.sub(r"[^\w\- ]", "", title[2].lower()).replace(" ", "-")))
        for _, name in open_:
            found[name] = found.get(name, "") + line + "\n"
    return found


def plain(text: str) -> str:
    """What is read as a sentence: without code, and of links their text alone."""
    text = re.sub(r"`[^`]*`", "", prose(text))
    return re.sub(r"\]\([^)]*\)", "]", text)


def numbers(text: str) -> list[tuple[str, ...]]:
    """All numbers, and those of "a ± b" together, with the signs that they are written with."""
    found = re.findall(rf"({NUMBER})(?: ± ({NUMBER}))?", text.replace("−", "-"))
    return [tuple(one for one in pair if one) for pair in found]


def is_rounded(written: str, logged: str) -> bool:
    """Whether a number is another one, rounded: 12.7 for 12.67, 0.55 million for 550,882; a sign must be the same."""
    digits, _, unit = written.partition(" ")
    places = len(digits.partition(".")[2])
    values = [float(one.replace(",", "").removesuffix(" million")) for one in (written, logged)]
    scale = 1e6 if unit else 1.0
    same = abs(values[0] * scale - values[1]) <= 0.5 * scale * 10**-places * (1 + 1e-6)
    return same and (written[0] == "+") == (logged[0] == "+")


def unlogged(text: str, log: dict[str, str]) -> list[str]:
    """The numbers of a page that are in no section of the log to which their paragraph links.

    A table belongs to the paragraph above it. "a ± b" must be in the section as such a pair.
    """
    missing, anchors = [], []
    for block in re.split(r"\n(?:\s*\n|(?=- ))", prose(text)):
        linked = re.findall(r"\(benchmarks/README\.md#([^)]*)\)", block)
        anchors = anchors if block.startswith("|") else linked
        known = [pair for anchor in anchors for pair in numbers(plain(log[anchor]))]
        told = plain(block)
        for pattern in NOT_MEASURED:
            told = re.sub(pattern, "", told)
        for pair in numbers(told):
            logged = (
                [one for one in known if len(one) == len(pair)] if len(pair) > 1 else [(x,) for y in known for x in y]
            )
            if not any(all(map(is_rounded, pair, one)) for one in logged):
                missing.append(f"{' ± '.join(pair)} in {' '.join(told.split())[:80]!r}, which links to {anchors}")
    return missing


def test_every_number_of_the_readme_is_in_the_log():
    text = (ROOT / "README.md").read_text()
    assert unlogged(text, sections(LOG.read_text())) == []
    assert [pattern for pattern in NOT_MEASURED if not re.search(pattern, text)] == [], "no longer there"
    assert re.search(r"\*\*Methods\*\*: (\d+)", text)[1] == str(len(kdjax.methods.names()))


def test_every_run_of_the_log_has_its_command_and_its_date():
    without = {
        part.splitlines()[0]
        for part in re.split(r"^## ", LOG.read_text(), flags=re.MULTILINE)[1:]
        for pattern in (r"^    .*(python|kdjax) \S", r"20\d\d-\d\d-\d\d")
        if not re.search(pattern, part, re.MULTILINE)
    }
    assert without == {"A card"}, "no run of it is logged"


@pytest.mark.parametrize(
    ("written", "missing"),
    [
        ("[gain](benchmarks/README.md#a) +3.0 ± 0.7 of 200, 57.7, 0.55 million, -1.2", []),
        ("[gain](benchmarks/README.md#a)\n\n| AP |\n|---|\n| 57.7 |", []),
        ("+3.0 ± 0.7 without a link", ["+3.0 ± 0.7"]),
        ("[gain](benchmarks/README.md#a): +3.1, 3.0, +1.2, 57.6", ["+3.1", "3.0", "+1.2", "57.6"]),
        ("[pair](benchmarks/README.md#a): +3.0 ± 0.6", ["+3.0 ± 0.6"]),
        ("[another](benchmarks/README.md#b): 57.7 of 8", ["57.7"]),
        ("[in code](benchmarks/README.md#a): 9, `9`", ["9"]),
    ],
)
def test_a_number_that_is_not_in_the_log_is_found(written, missing):
    log = "## A\n+3.02 ± 0.66, 57.67; 200 scenes; 550,882; −1.24\n\n    run --n=9\n\n## B\n### C\n8\n"
    assert [one.partition(" in ")[0] for one in unlogged(written, sections(log))] == missing


# ----------------------------------------------------------------------------------------------------------- notebook


def cells() -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_the_notebook_is_kept_without_outputs_and_its_links_lead_somewhere():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), str(NOTEBOOK), "exec")
        for target, _ in links("".join(cell["source"])) if cell["cell_type"] == "markdown" else []:
            assert (DOCS / target).exists(), target


def test_the_notebook_installs_kdjax_where_it_is_missing(monkeypatch):
    """From the repository that the package names, with its extra for GPUs where there is a driver."""
    first, ran = cells()[0].partition("import jax\n")[0], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(first, {})
    assert ran == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for driver, extra in ((None, set()), ("/usr/bin/nvidia-smi", {"cuda12"})):
        monkeypatch.setattr("shutil.which", lambda _, driver=driver: driver)
        exec(first, {})
        needed = Requirement(ran[-1][-1])
        assert needed.name == "kdjax" and needed.extras == extra
    [source] = [line for line in metadata.metadata("kdjax").get_all("Project-URL") or [] if line.startswith("Source")]
    assert needed.url == f"git+{source.partition(', ')[2]}"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
    monkeypatch.chdir(tmp_path)  # it needs no checkout
    space = {}
    for source in cells():
        exec(compile(source, str(NOTEBOOK), "exec"), space)
    assert len(space["detections"]) == 4 and all((found.scores > 0.3).any() for found in space["detections"])
    assert len(space["rows"]) == 10 and all(np.isfinite(list(row.values())).all() for row in space["rows"])
    assert {"loss_cls", "loss_box", "mkd/feature", "mkd/alignment"} <= set(space["names"])
    assert len(space["figure"].axes) == len(space["names"])
