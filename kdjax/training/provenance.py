"""Where the numbers of a run come from: versions, devices, commit and config."""

import contextlib
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

import kdjax
from kdjax import files


def environment() -> dict:
    """Versions, devices and commit of this run."""
    commit, root = "", Path(kdjax.__file__).parents[1]
    if (root / ".git").exists():  # otherwise kdjax is installed, perhaps inside another project's checkout
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git on this machine, or one that hangs
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


def write_config(config: ConfigDict, workdir: Path) -> None:
    """The resolved config and the environment; a resumed run adds its environment to the list."""
    if jax.process_index():
        return
    path = workdir / "config.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    now = environment() | {"command": sys.argv[1:], "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    files.write_json(path, {"config": json.loads(config.to_json()), "runs": [*runs, now]}, indent=1)
