"""What is tested on a GPU: `make test-gpu`.

    python -m tests.on_gpu

Prints the errors of TF32 and bfloat16, then runs the golden replay and the contracts of methods and teachers with
products in float32 (`jax_default_matmul_precision=highest`), a shortened quickstart, a run that is stopped and
resumed, and the twin beside a supervised run, both to the bit with deterministic kernels. Other tests run there with
`KDJAX_TEST_PLATFORM=cuda python -m pytest FILE`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SELECTION = (
    "tests/test_golden_replay.py",
    "tests/methods/test_contract.py",
    "tests/distill/test_teachers.py",
    "tests/end_to_end/test_quickstart.py::test_a_shortened_quickstart",
    "tests/training/test_run.py::test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit",
    "tests/training/test_run.py::test_twin_is_a_supervised_run_to_the_bit",
)
MINUTES = 8  # that it should take


def main() -> int:
    """Exit code: 0; 1 if a test failed; 2 without a GPU."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cuda,cpu",
        "KDJAX_TEST_PLATFORM": "cuda",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_exclude_nondeterministic_ops=true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a test starts processes of its own
    }

    def python(*arguments: str) -> int:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode

    probe = "import jax; jax.devices('cuda')"
    if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode:
        what = "install kdjax[cuda12] or kdjax[cuda13] on a machine that has one"
        print(f"make test-gpu: JAX finds no GPU, so nothing was tested: {what}", file=sys.stderr)
        return 2
    since = time.perf_counter()
    failed = [python("benchmarks/precision.py"), python("-m", "pytest", *SELECTION, "-k", "not eight_devices")]
    minutes = (time.perf_counter() - since) / 60
    print(f"test-gpu: {minutes:.1f} min{f', more than {MINUTES}' if minutes > MINUTES else ''}")
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
