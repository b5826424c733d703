"""What the benchmarks share: runs of train.py, means with their standard errors, Markdown tables, the log."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # kdjax of this checkout, installed or not


class Failed(Exception):
    """A run of train.py that ended with an error; the message is its last sentence."""


def train(flags: list[str], workdir: Path) -> dict:
    """The results of a run: of a finished one as they are; otherwise it is trained, from its last checkpoint on.

    Raises:
      Failed: train.py refused or broke off.
      SystemExit: the run was stopped, and so is the benchmark; or the folder holds a run with other flags.
    """
    results = workdir / "results.json"
    if not results.exists():
        run([sys.executable, "train.py", *flags, f"--workdir={workdir}"])
    elif flags_of(workdir) != flags:
        raise SystemExit(
            f"{workdir} holds a run with other flags ({' '.join(flags_of(workdir))}): choose another folder"
        )
    return json.loads(results.read_text())


def run(command: list[str]) -> None:
    """Runs train.py, shows what it writes to stderr, and hands on a stop in both directions."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    written = b""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            while chunk := process.stderr.read1(65536):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                written = (written + chunk)[-65536:]
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves its state
            process.communicate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in (143, -signal.SIGTERM, -signal.SIGINT):
        print("stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(143)
    if code:
        raise Failed(f"killed by signal {-code}" if code < 0 else last_sentence(written.decode(errors="replace")))


def last_sentence(text: str) -> str:
    """What train.py said when it gave up: its own line, or else the last one."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    own = [line.removeprefix("train.py: ") for line in lines if line.startswith("train.py: ")]
    return (own or lines or ["no message"])[-1]


def flags_of(workdir: Path) -> list[str]:
    """The flags that a run was started with, without its folder."""
    command = json.loads((workdir / "config.json").read_text())["runs"][0]["command"]
    return [flag for flag in command if not flag.startswith("--workdir=")]


def facts_of(workdir: Path) -> dict:
    """Versions, commit and devices of a run."""
    return facts(json.loads((workdir / "config.json").read_text())["runs"][0])


def facts(environment: dict) -> dict:
    return {name: environment[name] for name in ("commit", "python", "jax", "flax", "devices")}


def minutes_of(workdir: Path) -> float:
    """Time spent in training steps, of all sittings."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return sum({row["step"]: row["seconds"] for row in rows if row["kind"] == "train"}.values()) / 60


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error; one value alone has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return round(statistics.mean(values), 3), None if error is None else round(error, 3)


def with_error(values: list[float], sign: str = "") -> str:
    """ "1.20 ± 0.15"."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def publish(command: str, parts: list[str], summary: dict, log: Path | None) -> None:
    """Prints the parts and one line of JSON, and appends both under the command to the log, if there is one."""
    parts = [*parts[:-1], f"{time.strftime('%Y-%m-%d')}; {parts[-1]}"]
    print("\n" + "\n\n".join(parts))
    print(json.dumps(summary))
    if log:
        with log.open("a") as file:
            file.write("\n" + "\n\n".join([f"`{command}`", *parts, f"    {json.dumps(summary)}"]) + "\n")
