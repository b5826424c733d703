"""What produced the numbers of a run: versions, devices, commit and config."""

import contextlib
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax

import kdjax
from kdjax import files
from kdjax.training.config import Config


def environment() -> dict[str, str]:
    """Versions of packages, devices, and the commit of kdjax ("" if it is not a git checkout)."""
    commit, root = "", Path(kdjax.__file__).parents[1]
    if (root / ".git").exists():  # an installed kdjax may lie inside the checkout of another project
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # git is missing or does not answer
            describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            commit = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "faster-coco-eval")
    return {
        "kdjax": kdjax.__version__,
        "commit": commit,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.process_count()} hosts)",
    }


def write_config(config: Config, workdir: Path, data: str) -> None:
    """Writes config.json: the config, and of each process that worked on the run the environment, command and data.

    Args:
      config: the settings of the run.
      workdir: the folder of the run.
      data: the fingerprint of the data set.
    """
    if jax.process_index():
        return
    path = workdir / "config.json"
    runs = json.loads(path.read_text()).get("runs") if path.exists() else None
    this = environment() | {"data": data, "command": sys.argv[1:], "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    runs = [*(runs if isinstance(runs, list) else []), this]
    files.write_json(path, files.sealed({"config": json.loads(config.to_json()), "runs": runs}), indent=1)
