"""The model card: README.md of a folder that is handed out, with what whoever gets the folder should know."""

import json

from kdjax.evals import coco
from kdjax.methods import api
from kdjax.report import run_report
from kdjax.train.checkpoint import fingerprint
from kdjax.train.step import Teacher

_USE = """\
    kdjax predict IMAGES --model={role} --out=predicted

(`--model` is this folder; `evaluate`, `export` and `latency` take it too.) In Python:

```python
import numpy as np
from PIL import Image

from kdjax.commands import model

detector = model.load("{role}")  # this folder
image = np.asarray(Image.open("image.jpg").convert("RGB"))
[(_, found)] = model.detect(detector, [(1, image)])
for one in found:  # best first; the box is x, y, width, height in pixels
    print(detector.classes[detector.category_ids.index(one["category_id"])], one["score"], one["bbox"])
```
"""


def card(role: str, setup, results: dict, variables: tuple, versions: dict) -> str:
    """The text, Markdown behind a header as Hugging Face reads it.

    Args:
      role: "student" or "twin".
      setup: `kdjax.train.loop.Setup`.
      results: the content of results.json.
      variables: (params, stats) that are handed out.
      versions: name -> version, commit, devices.
    """
    config, dataset, name = setup.config, setup.dataset, setup.student.name
    teacher = setup.teacher if role == "student" else None
    methods = " + ".join(setup.methods) if teacher else "no teacher"
    return "\n".join(
        [
            _header(name, dataset.name, results[role]["AP"], distilled=teacher is not None),
            f"# {name} on {dataset.name}, {methods}\n",
            _first_words(role, results) + "\n",
            "## Use\n",
            _USE.format(role=role),
            "## Metrics\n",
            _metrics(role, results, config),
            "## How it was made\n",
            _list(_data(dataset) | _training(role, setup) | {"hash of its arrays": fingerprint(Teacher(*variables))}),
            _list({name: value for name, value in versions.items() if value}),
            "## Licence\n",
            _licence(dataset, teacher, config),
        ]
    )


def _header(name: str, data: str, ap: float, *, distilled: bool) -> str:
    tags = ["object-detection", "jax", name] + ["knowledge-distillation"] * distilled
    lines = ["---", "library_name: kdjax", "pipeline_tag: object-detection", f"tags: {json.dumps(tags)}"]
    if ap >= 0:
        metrics = [{"type": "map", "name": "AP", "value": round(ap, 4)}]
        task, on = {"type": "object-detection"}, {"name": data, "type": data}
        index = [{"name": name, "results": [{"task": task, "dataset": on, "metrics": metrics}]}]
        lines.append(f"model-index: {json.dumps(index)}")
    return "\n".join([*lines, "---", ""])


def _first_words(role: str, results: dict) -> str:
    if role == "student":
        return run_report.verdict(results)
    return (
        "This is the twin of `student/`: the same detector from the same start on the same batches, without the "
        f"teacher. {run_report.verdict({'student': results['twin']})}"
    )


def _metrics(role: str, results: dict, config) -> str:
    """The 12 metrics in points; the student beside its teacher and twin."""
    shown = ("teacher", "twin", "student", "gain") if role == "student" else (role,)
    shown = [one for one in shown if results.get(one)]
    lines = ["| | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for figure in coco.METRICS:
        cells = []
        for one in shown:
            value, sign = results[one][figure], "+" if one == "gain" else ""
            cells.append("–" if value == -1 else f"{100 * value:{sign}.1f}")
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    for count in ("params", "flops"):
        cells = [f"{results[one][count]:,}" if count in results[one] else "" for one in shown]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    height, width = config.data.image_size
    lines.append(
        "\nCOCO's metrics in points of 100 (– is undefined), of moving-average weights, on the validation images "
        f"below; FLOPs are multiply-adds of one image on a canvas of {height}x{width}."
    )
    return "\n".join(lines) + "\n"


def _data(dataset) -> dict[str, str]:
    found = {}
    for role, split in dataset.splits.items():
        boxes = sum(not entry["iscrowd"] for entry in split.truth["annotations"])
        found[f"data, {role}"] = f"{dataset.name}, split `{split.name}`: {split.size} images, {boxes} boxes"
    return found | {"classes": ", ".join(dataset.classes)}


def _training(role: str, setup) -> dict[str, str]:
    config, found = setup.config, {}
    if role == "student" and setup.teacher:
        weights, digest = config.teacher.weights, fingerprint(setup.variables)
        found["teacher"] = f"{setup.teacher.name}, weights `{weights}`, hash of its arrays {digest}"
        for name, options in config.methods.items():
            defaults = api.options(name)
            changed = {key: value for key, value in options.items() if key != "weight" and value != defaults[key]}
            told = ", ".join(f"{key} {value}" for key, value in {"weight": options.weight, **changed}.items())
            found[f"method {name}"] = f"{told}; else its defaults"
    start = f"weights `{config.student.weights}`" if config.student.weights else "random numbers"
    return found | {
        "start": start,
        "training": f"{config.steps} steps of {config.batch_size} images, {config.dtype}, seed {config.seed}",
    }


def _list(facts: dict[str, str]) -> str:
    return "".join(f"- {name}: {' '.join(str(value).split())}\n" for name, value in facts.items())


def _licence(dataset, teacher, config) -> str:
    """What is known; kdjax does not choose a licence for others."""
    sources = ["the images"] + ["the teacher's weights"] * bool(teacher)
    sources += ["the weights it started from"] * bool(config.student.weights)
    text = (
        "kdjax claims no rights in these weights, and gives none. What may be done with them depends on the terms of "
        f"{' and of '.join(sources)}. "
    )
    if config.data.source == "scenes":
        return text + "The images are made by kdjax, which is under Apache-2.0.\n"
    if dataset.licenses:
        return (
            text
            + "The json of the data lists these licences of images:\n\n"
            + "".join(f"- {' '.join(one.split())}\n" for one in dataset.licenses)
        )
    return text + "The data as it was read names no licence: fill it in here before you hand this on.\n"
