"""Settings of every test: the CPU, eight fake devices, the persistent compile cache, rare garbage collection.

`KDJAX_TEST_PLATFORM=cuda` runs them on a GPU instead, with products in float32; tests/on_gpu.py lists those that are
meant for it.
"""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = ",".join(dict.fromkeys([os.environ.get("KDJAX_TEST_PLATFORM") or "cpu", "cpu"]))
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

from tests.shared import QUICK

PLATFORM = os.environ["JAX_PLATFORMS"].split(",")[0]
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
if PLATFORM != "cpu":
    from kdjax import compile_cache

    compile_cache.enable(str(CACHE))  # a folder for each card, as runs have it
    jax.config.update("jax_default_matmul_precision", "highest")

# Tracing makes many objects: at Python's default thresholds a fifth of its time is garbage collection.
gc.set_threshold(50_000, 20, 50)

# The slowest files run first, so that no process is left alone with one of them at the end.
FIRST = (
    "test_golden_replay.py",
    "end_to_end/test_quickstart.py",
    "training/test_run.py",
    "test_docs.py",
    "faults/test_faults.py",
    "training/test_blackbox.py",
    "training/test_sharding.py",
)
MEMORY = 4 * 2**30  # bytes of a process, beyond which the programs of earlier files are dropped
MORE = 2 * 2**30  # and by how much it must have grown since they were dropped the last time


def pytest_configure(config):
    """The default suite asks XLA for code that is compiled faster; `make test-all` runs what users get."""
    default = config.option.markexpr == "not slow" and PLATFORM == "cpu"
    jax.config.update("jax_disable_most_optimizations", default)
    if default:
        os.environ["XLA_FLAGS"] += f" {QUICK}"  # which processes of tests inherit


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=rank)


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """The programs that JAX keeps of all files would fill the memory: those that come back are read from the disk."""
    yield
    global _limit
    if _memory() > _limit:
        jax.clear_caches()
        gc.collect()
        _limit = max(MEMORY, _memory() + MORE)  # not all comes back to the system, and the next file is no reason


_limit = MEMORY


def _memory() -> int:
    """Bytes of this process; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


from tests.support.models import cache, exported, finished, made, state  # noqa: E402, F401
