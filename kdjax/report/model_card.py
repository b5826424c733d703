"""The model card: README.md of the folder of an exported model."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kdjax import methods as zoo
from kdjax.data import Dataset
from kdjax.evals import coco
from kdjax.report.format import is_defined, percent
from kdjax.report.run import verdict
from kdjax.resources import Config

TASK = "object-detection"  # as the Hub names it
_INDEXED = ("AP", "AP50", "AP75", "mask_AP")  # metrics in the header
_USE = """\
    kdjax predict IMAGES --model={role} --out=predicted

(`--model` is this folder; `evaluate`, `export` and `latency` take it too.) In Python:

```python
import kdjax

model = kdjax.load("{role}")  # this folder
found = model.detect("image.jpg")
for box, score, label in zip(found.boxes, found.scores, found.labels):  # best first
    print(found.class_names[label], score, box)  # the box is x1, y1, x2, y2 in pixels
```
"""


def card(
    role: str,
    *,
    student: str,
    teachers: Mapping[str, str],
    dataset: Dataset,
    config: Config,
    results: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """The text of the card: Markdown after a header in the format of the Hugging Face Hub.

    Args:
      role: "student" or "twin".
      student: name of the detector.
      teachers: names of the detectors by "teacher" or "teacher/NAME"; none: trained without a teacher.
      dataset: the training and validation data.
      config: of the run.
      results: the content of results.json.
      fingerprints: hash of the weights of `role` and, of the teachers, by their names.
      versions: of packages, commit and devices, by name.
    """
    name, teachers = student, teachers if role == "student" else {}
    used = _methods(config) if teachers else {}
    methods = " + ".join(used) or "no teacher"
    return "\n".join(
        [
            _header(name, dataset, results[role], distilled=bool(teachers)),
            f"# {_plain(name)} on {_plain(dataset.name)}, {_plain(methods)}\n",
            _introduction(role, results) + "\n",
            "## Use\n",
            _USE.format(role=role),
            "## Metrics\n",
            _metrics(role, results, config),
            "## How it was made\n",
            _list(
                _data(dataset) | _training(config, teachers, fingerprints) | {"hash of the weights": fingerprints[role]}
            ),
            _list({name: _plain(value) for name, value in versions.items() if value}),
            "## Licence\n",
            _licence(dataset.licenses, config, distilled=bool(teachers)),
        ]
    )


def short(name: str, classes: Sequence[str], image_size: tuple[int, int]) -> str:
    """The card of a model of which only its detector is known, such as converted weights.

    Args:
      name: of the detector.
      classes: names of the K classes.
      image_size: height and width of the network input in pixels.
    """
    height, width = image_size
    return "\n".join(
        [
            _written({"library_name": "kdjax", "pipeline_tag": TASK, "tags": [TASK, "jax", name]}),
            f"# {_plain(name)}\n",
            "## Use\n",
            _USE.format(role="model"),
            _list({"input": f"{height}x{width} pixels", "classes": _plain(", ".join(classes))}),
        ]
    )


def parted(text: str) -> tuple[dict[str, Any], str]:
    """The header of a card and the rest; ({}, text) if it has none, or one that is not a mapping in YAML."""
    found = re.match(r"---\r?\n(.*?\r?\n)---\r?\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        values = None
    return (values, text[found.end() :]) if found and isinstance(values, dict) else ({}, text)


def completed(text: str, license: str = "") -> str:
    """A card with the header that the Hub needs to know what it is of; what it has already stays.

    Args:
      text: of the card, with or without a header.
      license: is written into the header, as the Hub names it; "": the card's own, if any.
    """
    before, body = parted(text)
    now = {"library_name": "kdjax", "pipeline_tag": TASK} | before | ({"license": license} if license else {})
    return text if now == before else _written(now) + body


def _header(name: str, dataset: Dataset, metrics: Mapping[str, Any], *, distilled: bool) -> str:
    """What the Hub reads: kind of model, tags, data of which the name is public, and AP on the validation split."""
    header: dict[str, Any] = {"library_name": "kdjax", "pipeline_tag": TASK}
    header["tags"] = [TASK, "jax", name] + ["knowledge-distillation"] * distilled
    if dataset.source == "tfds":
        header["datasets"] = [_slug(dataset.name)]
    measured = [
        {"type": "map", "name": metric.replace("_", " "), "value": round(metrics[metric], 4)}
        for metric in _INDEXED
        if metrics.get(metric, -1) >= 0
    ]
    if measured:
        on = {"name": dataset.name, "type": _slug(dataset.name), "split": dataset.splits["val"].name}
        header["model-index"] = [
            {"name": name, "results": [{"task": {"type": TASK}, "dataset": on, "metrics": measured}]}
        ]
    return _written(header)


def _written(header: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)}---\n"


def _slug(name: str) -> str:
    """A name of a data set as the Hub allows it: letters, digits and some signs."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"


def _introduction(role: str, results: Mapping[str, Any]) -> str:
    if role == "student":
        return verdict(results)
    ap = results["twin"].get("AP")
    reached = f" It reaches AP {percent(ap)}." if is_defined(ap) else ""
    return (
        "This is the twin of `student/`: the same detector with the same initial weights, trained on the same batches "
        f"without the teacher.{reached}"
    )


def _metrics(role: str, results: Mapping[str, Any], config: Config) -> str:
    """The 12 metrics in percent; the student beside its teacher and twin."""
    shown = ("teacher", "twin", "student", "gain") if role == "student" else (role,)
    shown = [one for one in shown if results.get(one)]
    lines = ["| | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    masked = [metric for metric in coco.MASK_METRICS if any(metric in results[one] for one in shown)]
    for metric in (*coco.METRICS, *masked):
        cells = []
        for one in shown:
            value, sign = results[one].get(metric, -1), "+" if one == "gain" else ""
            cells.append("–" if value == -1 else f"{100 * value:{sign}.1f}")
        lines.append(f"| {metric.replace('_', ' ')} | {' | '.join(cells)} |")
    for count in ("params", "flops"):
        cells = [f"{results[one][count]:,}" if count in results[one] else "" for one in shown]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    height, width = config.data.image_size
    lines.append(
        "\nCOCO metrics in percent (– is undefined) of the moving-average weights on the validation images below. "
        f"FLOPs are multiply-adds per image of {height}x{width} pixels."
    )
    return "\n".join(lines) + "\n"


def _data(dataset: Dataset) -> dict[str, str]:
    facts = {}
    for role, split in dataset.splits.items():
        boxes = sum(not entry["iscrowd"] for entry in split.truth["annotations"])
        facts[f"data, {role}"] = (
            f"{_plain(dataset.name)}, split {_code(split.name)}: {split.size} images, {boxes} boxes"
        )
    return facts | {"classes": _plain(", ".join(dataset.classes))}


def _methods(config: Config) -> dict[str, Any]:
    """The options of all methods, by "METHOD" or, with several teachers, "TEACHER/METHOD"."""
    several = {f"{name}/{key}": own for name, one in config.teachers.items() for key, own in one.methods.items()}
    return several or dict(config.methods.items())


def _training(config: Config, teachers: Mapping[str, str], fingerprints: Mapping[str, str]) -> dict[str, str]:
    facts = {}
    for role, detector in teachers.items():
        chosen = config.teachers[role.partition("/")[2]] if "/" in role else config.teacher
        source = f"mean of {_code(chosen.mean)}" if "/" in role and chosen.mean else f"weights {_code(chosen.weights)}"
        facts[role] = f"{detector}, {source}, hash {fingerprints[role]}"
    if teachers:
        for name, options in _methods(config).items():
            defaults = zoo.options(name.rpartition("/")[2])
            changed = {key: value for key, value in options.items() if key != "weight" and value != defaults[key]}
            shown = ", ".join(f"{key} {value}" for key, value in {"weight": options.weight, **changed}.items())
            facts[f"method {name}"] = f"{_plain(shown)}; other options at their defaults"
    start = _code(config.student.weights) if config.student.weights else "random initialisation"
    return facts | {
        "initial weights": start,
        "training": f"{config.steps} steps of {config.batch_size} images, {config.dtype}, seed {config.seed}",
    }


def _list(facts: dict[str, str]) -> str:
    return "".join(f"- {name}: {' '.join(str(value).split())}\n" for name, value in facts.items())


def _plain(text: str) -> str:
    """Text of others in one line, in which Markdown and HTML see no mark."""
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split())), quote=False)


def _code(text: str) -> str:
    """Text of others in one line, as code."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def _licence(licenses: Sequence[str], config: Config, *, distilled: bool) -> str:
    """The known licences of the data and weights that the model was trained from."""
    sources = ["the images"] + ["the teacher's weights"] * distilled
    sources += ["the initial weights"] * bool(config.student.weights)
    text = (
        "kdjax claims no rights in these weights and grants none. How they may be used depends on the terms of "
        f"{' and of '.join(sources)}. "
    )
    if config.data.source == "scenes":
        return text + "The images are generated by kdjax (Apache-2.0).\n"
    if licenses:
        return (
            text
            + "The annotation file lists these licences of the images:\n\n"
            + "".join(f"- {_plain(one)}\n" for one in licenses)
        )
    return text + "The data names no licence: add it here before you share this model.\n"
