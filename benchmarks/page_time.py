"""Seconds of one core that the page of a run takes while it goes on, by the number of lines in its log.

    python benchmarks/page_time.py --lines=80 --lines=5000

The log, 80 classes and four images of 640x480 are made up; each page is written three times, and the least is printed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from kdjax.report import drawing, live, run
from kdjax.structs import Detections
from kdjax.training import log

NAMES = [f"class {k}" for k in range(80)]
MODELS = ("twin", "student")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lines", type=int, action="append", metavar="N", help="lines of the log (80)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.lines or [80]:
            seconds, size = measured(Path(folder), count)
            print(f"{count} lines: {seconds:.2f} s of one core, {size / 1e6:.1f} MB")


def measured(folder: Path, count: int) -> tuple[float, int]:
    """The least CPU seconds of three pages, and the bytes of a page."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines(count)))
    progress = live.Progress(count, 2 * count, 60.0, "now", "later")
    results = {model: dict.fromkeys(METRICS, 0.4) for model in MODELS}
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        rows, _ = log.read(folder / "metrics.jsonl")
        run.write_report(
            folder / "report.html",
            title="page",
            results=results,
            rows=rows,
            per_class={model: dict.fromkeys(NAMES, 0.4) for model in MODELS},
            examples=images(),
            class_names=NAMES,
            config_text="{}",
            notes=[],
            progress=progress,
        )
        seconds.append(time.process_time() - begun)
    return min(seconds), (folder / "report.html").stat().st_size


def lines(count: int) -> list[dict[str, float | str]]:
    """The log of a run with a twin, three terms and an evaluation in every tenth line."""
    noise = np.random.default_rng(0).random((count, 16)).tolist()
    names = [f"{model}/{name}" for model in MODELS for name in ("loss_cls", "loss_box", "total", "grad_norm")]
    names += [f"student/mkd/{term}" for term in ("multiscale", "frequency", "alignment")]
    names += ["share/mkd", "conflict/mkd", "images_per_s", "wait_share", "lr"]
    rows: list[dict[str, float | str]] = []
    for step, values in enumerate(noise, 1):
        rows.append({"step": step, "kind": "train", "seconds": 1.0} | dict(zip(names, values, strict=True)))
        if step % 10 == 0:
            rows.append({"step": step, "kind": "eval"} | {f"{m}/{key}": 0.4 for m in MODELS for key in METRICS})
    return rows


def images() -> list[drawing.Example]:
    """Four images with five objects each."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 400, (5, 2))
    boxes, labels = np.concatenate([corners, corners + 60], axis=1), rng.integers(0, 80, 5)
    found = dict.fromkeys(MODELS, Detections(boxes + 3, np.linspace(0.9, 0.4, 5), labels))
    smooth = np.tile(np.linspace(0, 255, 640).astype(np.uint8)[None, :, None], (480, 1, 3))
    return [drawing.Example(smooth, boxes, labels, found)] * 4


if __name__ == "__main__":
    main()
