"""report.html while a run goes on: written anew after each evaluation, in a thread beside the steps."""

import sys
import time
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tqdm import tqdm

from kdjax.errors import fault, printable
from kdjax.evals import complexity
from kdjax.report.live import Progress
from kdjax.training import log, outputs
from kdjax.training.goodput import Clock
from kdjax.training.setup import Setup, model

EXAMPLES = 4  # images on the page


class Live:
    """Keeps report.html up while a run with evaluations during training goes on; only the first host does.

    A context around the training loop: what ends the loop is on the last page. If a page cannot be written, one warning
    says so, and the run goes on; the next page is tried again. If one is still being written at the next evaluation,
    that evaluation has no page of its own, so that steps never wait for pages.
    """

    def __init__(self, setup: Setup, folder: Path, clock: Clock, start: int) -> None:
        """Writes nothing yet.

        Args:
          setup: of the run.
          folder: of the run.
          clock: of the run.
          start: number of updates so far.
        """
        self.setup, self.folder, self.clock, self.start = setup, folder, clock, start
        config = setup.config
        self.writes = bool(config.eval.every) and not jax.process_index() and start < config.steps
        self.params = {role: complexity.parameters(model(setup, role)[1][0]) for role in setup.states}
        self.evaluations: Mapping[str, outputs.Evaluation] = {}
        self.evaluated = 0  # the step that these are of
        self.step, self.begun = start, time.perf_counter()
        self.running: futures.Future[None] | None = None
        self.warned = False
        self.seconds: list[float] = []  # that the pages took, in the thread
        self.thread = futures.ThreadPoolExecutor(1, thread_name_prefix="report")

    def __enter__(self) -> "Live":
        self.write(self.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes the last page before the final report, and waits for it."""
        if error is None:
            self.step, ended = self.setup.config.steps, ""
        elif isinstance(error, KeyboardInterrupt):
            ended = "interrupted: the same command continues from the last checkpoint"
        else:
            ended = printable(str(error) or type(error).__name__)
        self._submit(ended, wait=True)
        self.thread.shutdown()

    def at(self, step: int) -> None:
        """Notes the number of updates so far."""
        self.step = step

    def write(self, step: int, evaluations: Mapping[str, outputs.Evaluation] | None = None) -> None:
        """Has the page written.

        Args:
          step: number of updates so far.
          evaluations: after this step, by role; None: there is none yet.
        """
        self.step = step
        if evaluations is not None:
            self.evaluations = {
                role: one._replace(examples=one.examples[:EXAMPLES], detections={}) for role, one in evaluations.items()
            }
            self.evaluated = step
        self._submit("", wait=False)

    def _submit(self, ended: str, *, wait: bool) -> None:
        if not self.writes or (self.running and not self.running.done() and not wait):
            return
        progress = self._progress(ended)
        self.running = self.thread.submit(self._try, progress, self.evaluations, self.clock.total())

    def _progress(self, ended: str) -> Progress:
        config, now = self.setup.config, time.time()
        left = due = None
        if self.step > self.start:
            rate = (time.perf_counter() - self.begun) / (self.step - self.start)
            left = rate * (config.steps - self.step)
            # The last page before the final report comes after the last step.
            following = min((self.step // config.eval.every + 1) * config.eval.every, config.steps)
            due = now + rate * (following - self.step) if self.step < config.steps else None
        about = ""
        if self.evaluations:
            images = f"the first {config.eval.limit}" if config.eval.limit else "all"
            about = f"Metrics and images: after step {self.evaluated:,}, on {images} validation images."
        return Progress(
            step=self.step,
            steps=config.steps,
            left=left,
            written=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)),
            due="" if due is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(due)),
            ended=ended,
            about=about,
        )

    def _try(
        self, progress: Progress, evaluations: Mapping[str, outputs.Evaluation], seconds: Mapping[str, float]
    ) -> None:
        begun = time.perf_counter()
        try:
            self._write(progress, evaluations, seconds)
        except Exception as error:  # a page must not end a run
            if not self.warned:
                why = fault(error) or f"{type(error).__name__}: {error}"
                text = f"kdjax: the page of the run cannot be written yet: {printable(why)}; the run goes on"
                tqdm.write(text, file=sys.stderr)
            self.warned = True
        self.seconds.append(time.perf_counter() - begun)

    def _write(
        self, progress: Progress, evaluations: Mapping[str, outputs.Evaluation], seconds: Mapping[str, float]
    ) -> None:
        rows, _ = log.read(self.folder / "metrics.jsonl")  # the last line may be half written; the final report counts
        results: dict[str, Any] = {
            role: one.metrics | {"params": self.params[role]} for role, one in evaluations.items()
        }
        notes = outputs.notes(self.setup, rows, damaged=0)
        if self.seconds:
            mean = sum(self.seconds) / len(self.seconds)
            notes.append(f"this page: {len(self.seconds)} before it took {mean:.1f} s each, beside the steps")
        outputs.write_report(
            self.setup,
            self.folder / outputs.REPORT,
            results,
            evaluations,
            rows,
            notes=notes,
            seconds=seconds,
            progress=progress,
        )
