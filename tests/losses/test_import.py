"""`import kdjax.losses` needs jax and numpy alone, and is quick."""

import json
import subprocess
import sys

CODE = """
import json, sys, time
import jax, jax.numpy, numpy
before, start = set(sys.modules), time.perf_counter()
import kdjax.losses
seconds = time.perf_counter() - start
packages = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps([seconds, sorted(packages)]))
"""


def test_import_needs_jax_and_numpy_alone_and_is_quick():
    """The least of three processes: a busy machine may slow one of them."""
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
        assert not done.returncode, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for _, packages in found:
        assert set(packages) - {"jax", "jaxlib", "numpy"} == {"kdjax"}
    assert min(seconds for seconds, _ in found) < 0.2
