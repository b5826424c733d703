"""Which programs does a run compile, and how long does each take? With an empty compile cache, if none is set.

    python benchmarks/programs.py --config=quickstart:cwd --config.steps=2 --config.batch_size=4

The run is that of `kdjax train` with the same flags, in this process; JAX's own events say how long each program is
traced, lowered and compiled by XLA (or read from the cache). Programs that take less than SMALL in all, such as
single operations outside of any program, are one line. Programs that are compiled side by side add up to more than the
wall clock shows. `--log FILE` appends the tables, with the versions, to a Markdown file.
"""

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from kdjax.commands import settings
from kdjax.report import study
from kdjax.training import provenance
from kdjax.training.run import run

SMALL = 0.2  # s
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "XLA",
}


class Programs:
    """Counts the programs that this process compiles from now on, and their seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.times: collections.Counter[str] = collections.Counter()
        self.events: collections.Counter[str] = collections.Counter()  # of the persistent cache
        jax.monitoring.register_event_duration_secs_listener(self._spent)
        jax.monitoring.register_event_listener(self._happened)

    def _spent(self, event: str, seconds: float, **about: object) -> None:
        if event not in STAGES:
            return
        name = str(about.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
        self.seconds[name][STAGES[event]] += seconds
        self.times[name] += STAGES[event] == "XLA"

    def _happened(self, event: str, **_: object) -> None:
        self.events[event.rpartition("/")[2]] += 1

    def rows(self) -> list[list[str]]:
        """The table: program, how often, seconds by stage; the dearest first, small ones in one line."""
        total = {name: sum(spent.values()) for name, spent in self.seconds.items()}
        large = sorted((name for name in total if total[name] >= SMALL), key=lambda name: -total[name])
        small = [name for name in total if total[name] < SMALL and self.times[name]]
        rows = [[name, str(self.times[name]), *self._cells([name])] for name in large]
        rows.append(["all smaller ones", str(sum(self.times[name] for name in small)), *self._cells(small)])
        return [*rows, ["all", str(sum(self.times.values())), *self._cells(list(total))]]

    def _cells(self, names: Sequence[str]) -> list[str]:
        return [f"{sum(self.seconds[name][stage] for name in names):.1f}" for stage in STAGES.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart:cwd")
    parser.add_argument("--log", type=Path)
    args, flags = parser.parse_known_args(arguments)
    config = settings.read(args.config, flags)
    with tempfile.TemporaryDirectory() as folder:
        config.compile_cache = config.compile_cache or f"{folder}/compiled"
        programs, since = Programs(), time.perf_counter()
        run(config, f"{folder}/run")
        wall = time.perf_counter() - since
    title = " ".join(["python benchmarks/programs.py", *(sys.argv[1:] if arguments is None else arguments)])
    header = ["program", "times", *(f"{stage}, s" for stage in STAGES.values())]
    found = {name: dict(spent) | {"times": programs.times[name]} for name, spent in programs.seconds.items()}
    study.publish(
        title,
        [
            study.table(header, programs.rows()),
            f"The whole run took {wall:.1f} s; of the programs that JAX's cache was asked for, "
            f"{programs.events['cache_hits']} of {programs.events['compile_requests_use_cache']} were there.",
            study.facts(provenance.environment()),
        ],
        {"programs": found, "seconds": wall, "cache": dict(programs.events)},
        args.log,
    )


if __name__ == "__main__":
    main()
