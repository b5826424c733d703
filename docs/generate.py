"""Writes docs/methods.md and docs/zoo.md from methods and detectors, and docs/inputs.md from the marks of the tests.

    python docs/generate.py            # writes the files and prints what it wrote
    python docs/generate.py --check    # exits with 1 if a file is out of date

The layout of a method's docstring is shown in docs/add_a_method.md. Nothing is compiled: only the shapes of
detectors and methods are computed. Tests are read and not imported.
"""

import argparse
import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not


from kdjax import detectors, methods
from kdjax.detectors.api import Detector
from kdjax.distill import taps as taps_of
from kdjax.evals import complexity
from kdjax.structs import DetectorOutput

FOLDER = Path(__file__).parent
SECTIONS = ("Paper", "Taps", "Open", "Proof", "Status")
STATUSES = {
    "proven": "its values equal those of the authors' code, or of a widely used port, within the stated error",
    "formula": "there is no public original to compare with; each formula has a test of its own",
    "experimental": "the paper leaves so much open that this is one interpretation of it",
}
# How a proof names reference files (tests/golden/README.md).
GOLDEN = re.compile(r"\b(?:coco|kd|loss|model|ops|tables)/[\w*]+(?:\.\w+)?")
SIZE, CLASSES = 320, 20  # of the images and detectors on which methods are tried
INTRO = """\
# Methods

<!-- Written by `python docs/generate.py` from the files in kdjax/methods; change those, not this page. -->

A method is chosen by its name, `config.methods.<name>`, in a config file or as its argument
(`--config=configs/quickstart.py:mkd`); + adds several up (`:mkd+rtmdet_cwd`). Its options are flags
(`--config.methods.mkd.zeta=0.3`); an option that does not exist is refused with the list of those that do.

Every method has a `weight`, its taps, and a schedule in steps (optimiser updates) for all its terms: `start` (0) is
the first step with a weight above zero, over `warmup` (0) steps it rises linearly to the full weight, and over the
last `decay` (0) steps before `stop` (0: never) it falls linearly to zero. These four are not repeated below.

With `--config.methods.NAME.weight=auto` the weight sets itself: the method's share of the gradient at the student's
neck is held at `config.auto_weight.share` (0.3 for all such methods together), by the rule of RT-DETRv4, with a
measurement every `config.auto_weight.every` (50) steps and more at the start
([what it costs](../benchmarks/README.md#automatic-weights)). The published weights of its terms keep
their proportions. `metrics.jsonl` has the weights in use, the `share` of each method and its `conflict`, the cosine
between its gradient and that of the detection losses; `config.auto_weight.log=True` logs these for fixed weights too.
The rule in full: [`kdjax/training/auto_weight.py`](../kdjax/training/auto_weight.py).

A tap names maps of the detector: `neck`, one level of it (`backbone.2`) or several (`neck.0:3`, the first three), or
a convolution of a head's tower (`cls_tower.1`). Levels of student and teacher pair by stride. Where channels differ,
most methods bring the student's to the teacher's by an adapter, a convolution that is trained beside the student and
not exported.

Status:

{statuses}

"Runs on" lists the families on which the method, with its default options, accepts a student and a teacher of that
family; for teachers of another family see [zoo.md](zoo.md). How to add your own: [add_a_method.md](add_a_method.md).

"Proof" names files of reference numbers. Those that are not in `tests/golden` belong to a larger set that is not
published ([provenance](../tests/golden/README.md)).
"""
ZOO = """\
# Detectors, and what can teach what

<!-- Written by `python docs/generate.py` from the files in kdjax/detectors; change those, not this page. -->

Parameters are those of {classes} classes, GFLOPs count a multiply-add once, at {side}x{side}; of two-stage detectors
they count the second stage on 1,000 proposals too, and the masks of 100 detections. A family is one file in
`kdjax/detectors`; what its docstring says about published weights and metrics stands above its table.
"""
MATRIX = """\
## Student, teacher, method

Levels are paired by stride and rows by position; adapters bring the channels of the student to those of the teacher.
The table lists the methods that, with their default options, accept the smallest student of a family and the second
smallest teacher of another. Other combinations are refused before a run starts, with the reason and the names of the
methods that are possible. All accepted pairs have been [computed](../benchmarks/README.md#every-pair-of-families).
"""
SIDE, OF_COCO = 640, 80  # of the images, and classes, for which the sizes are given
TESTS = FOLDER.parent / "tests"
INPUTS = """\
# What you may bring

<!-- Written by `python docs/generate.py` from the marks `user_input` of the tests; change those, not this page. -->

What kdjax does with inputs of many kinds, sound or not. This page is written from the tests: each line is checked by
the test beside it. Settings are explained in [Data](data.md) and [The command line](command_line.md).

{outcomes}
"""
AREAS = (
    "COCO json",
    "YOLO and VOC folders",
    "Images and videos",
    "Folders and names",
    "TFDS directories",
    "Prepared data",
    "A teacher's cache",
    "Files of detections",
    "Weights",
    "Models and exports",
    "Config and flags",
    "Workdirs, checkpoints and logs",
    "The machine",
)
OUTCOMES = {  # the first word of an outcome
    "read": "used as it is meant",
    "refused": "the command ends with one sentence, what is wrong and what would be right, and exit code 2",
    "counted": "used, mended or left out, and listed with its reason in the dry run, the doctor and the report",
    "reported": "told, and what can go on goes on",
    "survived": "nothing is lost",
}


class Input(NamedTuple):
    """A kind of input, as the mark of a test tells of it."""

    area: str
    what: str
    outcome: str
    test: str  # its file, below tests/


class Method(NamedTuple):
    """What the page says about one method."""

    name: str
    title: str  # "MKD"
    what: str
    formula: str
    sections: dict[str, str]
    options: list[tuple[str, str, str]]  # names, defaults, meaning
    refusals: dict[str, str]  # family of both detectors -> why not, "" where it runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of date")
    options = parser.parse_args(arguments)
    try:
        described = [describe(name) for name in methods.names()]
        marked = [one for path in sorted(TESTS.rglob("test_*.py")) for one in read_marks(path)]
    except ValueError as error:
        print(f"docs/generate.py: {error}", file=sys.stderr)
        return 2
    pages = {"methods.md": page(described), "zoo.md": zoo(), "inputs.md": inputs(marked)}
    old = [name for name, text in pages.items() if not (file := FOLDER / name).is_file() or file.read_text() != text]
    if options.check:
        for name in old:
            print(f"docs/{name} is out of date: run python docs/generate.py", file=sys.stderr)
        return 1 if old else 0
    for name, text in pages.items():
        (FOLDER / name).write_text(text)
    print(f"wrote {', '.join(f'docs/{name}' for name in pages)}")
    return 0


# ------------------------------------------------------------------------------------------------------------ reading


def describe(name: str) -> Method:
    """Reads one method.

    Raises:
      ValueError: its docstrings do not have the layout, or disagree with its options.
    """
    module = importlib.import_module(f"kdjax.methods.{name}")
    where = f"kdjax/methods/{name}.py"
    title, what, formula, sections = read_module(where, module.__doc__ or "")
    within = {family: refusal(name, family, family) for family in families()}
    return Method(name, title, what, formula, sections, read_options(where, module.make), within)


def read_module(where: str, doc: str) -> tuple[str, str, str, dict[str, str]]:
    """Title, what it is, formula and sections of a method's module docstring."""
    first, _, rest = inspect.cleandoc(doc).partition("\n")
    title, colon, what = first.partition(": ")
    if not colon or not what.endswith("."):
        raise ValueError(f"{where}: the docstring begins with 'NAME: what it is.' in one line, not with {first!r}")
    formula, *found = re.split(rf"^({'|'.join(SECTIONS)}):", rest, flags=re.MULTILINE)
    names, texts = found[::2], found[1::2]
    for section in SECTIONS:
        if section not in names:
            raise ValueError(f"{where}: the docstring has no section '{section}:' at the start of a line")
    if tuple(names) != SECTIONS:
        raise ValueError(
            f"{where}: the docstring's sections are {', '.join(names)}; each comes once, in the order "
            f"{', '.join(SECTIONS)}"
        )
    lines = formula.strip("\n").splitlines()
    if not lines or any(line and not line.startswith("    ") for line in lines):
        raise ValueError(f"{where}: after its first line the docstring has the formula, every line indented by 4")
    sections = dict(zip(names, map(flow, texts), strict=True))
    for section, text in sections.items():
        if not text:
            raise ValueError(f"{where}: the docstring's section '{section}:' is empty")
    if sections["Status"] not in STATUSES:
        raise ValueError(f"{where}: the status is {sections['Status']!r}; it must be one of {', '.join(STATUSES)}")
    return title, what.removesuffix("."), "\n".join(lines), sections


def flow(text: str) -> str:
    """One line a paragraph or list item."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*- )", text)
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()


def read_options(where: str, make: Callable[..., object]) -> list[tuple[str, str, str]]:
    """The rows of the table of options: the Args of `make` with the defaults of its signature."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    entries = read_args(inspect.getdoc(make) or "")
    told = [name for names, _ in entries for name in names]
    for name in defaults:
        if name not in told:
            raise ValueError(f"{where}: the docstring of make does not tell what the option {name!r} means")
    for name in told:
        if name not in defaults or told.count(name) > 1:
            raise ValueError(f"{where}: the docstring of make tells of {name!r}, which is no option or is repeated")
    rows = []
    for names, meaning in entries:
        values = dict.fromkeys(shown(defaults[name]) for name in names)
        rows.append((", ".join(f"`{name}`" for name in names), ", ".join(values), meaning))
    return rows


def read_args(doc: str) -> list[tuple[list[str], str]]:
    """The entries of the section "Args:": names and meaning."""
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", doc + "\n", re.MULTILINE)
    entries = []
    for line in textwrap.dedent(section[1] if section else "").splitlines():
        entry = re.match(r"(\w+(?:, \w+)*):(.*)", line)
        if entry:
            entries.append((entry[1].split(", "), entry[2].strip()))
        elif line and entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
    return entries


def read_marks(path: Path) -> list[Input]:
    """The kinds of input that the tests of a file are marked with, in their order.

    Raises:
      ValueError: a mark has other arguments than a known area, what the input is, and a known outcome.
    """
    where, found = path.relative_to(TESTS).as_posix(), []
    tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    for mark in (mark for test in tests for mark in test.decorator_list if isinstance(mark, ast.Call)):
        if ast.unparse(mark.func) != "pytest.mark.user_input":
            continue
        area, what, outcome = (ast.literal_eval(argument) for argument in mark.args)
        if area not in AREAS:
            raise ValueError(f"tests/{where}: unknown area {area!r}: the areas are {', '.join(AREAS)}")
        if (first := re.split(r"\W", outcome)[0]) not in OUTCOMES:
            raise ValueError(f"tests/{where}: {outcome!r} begins with {first!r}, not with {', '.join(OUTCOMES)}")
        found.append(Input(area, what, outcome, where))
    return found


def shown(default: object) -> str:
    return f'`"{default}"`' if isinstance(default, str) else f"`{default!r}`"


@functools.cache
def families() -> dict[str, list[str]]:
    """Detector family -> its variants by name, small to large."""
    found = {}
    for name in detectors.names():
        family = max((family for family in detectors.families() if name.startswith(f"{family}_")), key=len)
        found.setdefault(family, []).append(name)
    return found


@functools.cache
def pair_of(family: str) -> tuple[str, str]:
    """The smallest student of a family, and the next larger teacher."""
    variants = families()[family]
    return variants[0], variants[min(1, len(variants) - 1)]


@functools.cache
def built(name: str) -> Detector:
    return detectors.build(name, CLASSES)


@functools.cache
def specs(name: str) -> DetectorOutput:
    """Shapes of everything that a detector returns for an image."""
    return built(name).spec((SIZE, SIZE))


@functools.cache
def refusal(name: str, student: str, teacher: str) -> str:
    """The sentence with which a method refuses a student and a teacher of two families, "" if it runs."""
    return methods.refusal(name, built(pair_of(student)[0]), built(pair_of(teacher)[1]), (SIZE, SIZE))


# ------------------------------------------------------------------------------------------------------------ writing


def page(methods: list[Method]) -> str:
    statuses = "\n".join(f"- `{status}`: {meaning}." for status, meaning in STATUSES.items())
    return "\n".join([INTRO.format(statuses=statuses), summary(methods), *map(section, methods)])


def zoo() -> str:
    parts = [ZOO.format(classes=OF_COCO, side=SIDE)]
    for family, variants in families().items():
        doc = inspect.cleandoc(importlib.import_module(f"kdjax.detectors.{family}").__doc__)
        seen = specs(variants[0])
        taps = ", ".join(f"`{tap}`" for tap in dict.fromkeys(tap.partition(".")[0] for tap in taps_of.taps(seen)))
        where = f"Strides {', '.join(map(str, seen.strides))}. Taps: {taps}."
        rows = table(("detector", "parameters, M", "GFLOPs"), [row_of(name) for name in variants])
        parts.append(f"## {family}\n\n{prose(flow(doc))}\n\n{where}\n\n{rows}")
    return "\n".join([*parts, MATRIX, matrix()])


def row_of(name: str) -> tuple[str, ...]:
    """A variant's line: name, parameters, operations."""
    detector = detectors.build(name, OF_COCO)
    counts = (complexity.parameters(detector.shapes[0]) / 1e6, complexity.flops(detector, (SIDE, SIDE)) / 1e9)
    return f"`{name}`", *(f"{count:.2f}" for count in counts)


def matrix() -> str:
    """Which methods run, by family of the student (rows) and of the teacher (columns)."""
    rows = []
    for student in families():
        rows.append((student, *(cell(student, teacher) for teacher in families())))
    return table(("student / teacher", *families()), rows)


def cell(student: str, teacher: str) -> str:
    """The methods that run on a student and a teacher of two families."""
    runs = [name for name in methods.names() if not refusal(name, student, teacher)]
    lacks = [name for name in methods.names() if name not in runs]
    short = f"all but {', '.join(lacks)}" if lacks else "all"
    return short if len(lacks) < len(runs) else ", ".join(runs) or "none"


def inputs(marked: list[Input]) -> str:
    """The page of the kinds of input: a table for each area."""
    parts = [INPUTS.format(outcomes="\n".join(f"- **{name}**: {meaning}." for name, meaning in OUTCOMES.items()))]
    for area in AREAS:
        rows = [
            (prose(one.what), prose(one.outcome), f"[{one.test}](../tests/{one.test})")
            for one in marked
            if one.area == area
        ]
        parts.append(f"## {area}\n\n{table(('what you bring', 'what happens', 'test'), rows)}")
    return "\n".join(parts)


def summary(methods: list[Method]) -> str:
    rows = [
        (
            f"[{method.name}](#{method.name})",
            prose(method.what),
            prose(short(method.sections["Paper"])),
            method.sections["Status"],
            prose(bare(method.sections["Taps"])),
            ", ".join(family for family, why in method.refusals.items() if not why) or "none yet",
        )
        for method in methods
    ]
    return table(("method", "what", "paper", "status", "taps", "runs on"), rows)


def section(method: Method) -> str:
    told = method.sections
    quoted = GOLDEN.sub(r"`\g<0>`", told["Proof"])
    runs = [family for family, why in method.refusals.items() if not why]
    where = [f"{', '.join(runs)}." if runs else "No detector of kdjax yet."]
    where += [f"Not on {family}: {why.rstrip('.')}." for family, why in method.refusals.items() if why]
    parts = [
        f"## {method.name}",
        f"{method.title}: {prose(method.what)}. Status: `{told['Status']}`.",
        method.formula,
        f"**Paper.** {prose(told['Paper'])}",
        f"**Needs.** {prose(told['Taps'])}",
        table(("option", "default", "meaning"), [(n, d, prose(m)) for n, d, m in method.options]),
        f"**Open.** {prose(told['Open'])}",
        f"**Proof.** {prose(quoted)}",
        f"**Runs on.** {prose(' '.join(where))}",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def short(paper: str) -> str:
    """Authors, venue and year: the citation without the title in quotation marks and what follows the year."""
    return re.split(r"(?<=\d{4})\W|(?<! al)\. ", re.sub(r'"[^"]*",? *', "", paper))[0].rstrip(".")


def bare(taps: str) -> str:
    """The taps alone: the first clause without what it says in parentheses."""
    while taps != (without := re.sub(r" ?\([^()]*\)", "", taps)):
        taps = without
    return re.split(r";|\.(?=\s|$)", taps)[0]


def prose(text: str) -> str:
    """Plain text as Markdown: list items apart, and outside of `code` nothing that Markdown would take for its own."""
    pieces = re.split(r"(`[^`]*`)", text.replace("\n", "\n\n"))
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<\[\]\\])", r"\\\1", piece) for piece in pieces)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
