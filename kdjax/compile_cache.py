"""The folder in which compiled programs are kept, so that the next process that needs them starts in seconds."""

import re
from pathlib import Path

import jax
import jaxlib.version

from kdjax import files


def enable(folder: str = "") -> Path:
    """Keeps compiled programs on disk from now on, and on GPUs also what XLA finds out by trying (autotuning).

    JAX finds a program under a hash of the program, its options, the versions of jaxlib and of the platform, and the
    kind and number of devices, so that one folder may serve any machine. What XLA has tuned is found under a
    description of the card, whatever the version of XLA, and is shared by all programs and runs; so on a GPU each
    version of jaxlib and each kind of card has a folder of its own. The path of the folder is a part of the hash: a
    folder that is moved, or copied to another path, is of no use.

    Args:
      folder: the folder; "" = `files.cache_root() / "jax"`.

    Returns:
      The folder that JAX uses.
    """
    chosen = location(folder)
    jax.config.update("jax_compilation_cache_dir", str(chosen.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return chosen


def location(folder: str = "") -> Path:
    """The folder that `enable` sets; on a GPU one below the given folder."""
    chosen = Path(folder).expanduser() if folder else files.cache_root() / "jax"
    if jax.default_backend() == "gpu":
        card = re.sub(r"\W+", "-", jax.local_devices()[0].device_kind.lower())
        chosen /= f"{jaxlib.version.__version__}-{card}"
    return chosen
