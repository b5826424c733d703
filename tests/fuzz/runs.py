"""What the fuzzers share: running a command in this process, and what must hold of its end whatever the input was."""

import contextlib
import io
import time
import warnings

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kdjax import cli

LIMIT = 20  # s


def end_of(*arguments: str) -> tuple[int, str]:
    """The exit code of a command and what it wrote to stderr.

    It ends with 0, or with 2 and one sentence, within the limit; an exception that comes through is a failure.
    """
    out, err = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(action="ignore"):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # of argparse
            code = stop.code
    told = err.getvalue().strip()
    assert time.monotonic() - begun < LIMIT, arguments
    assert code in (0, 2), (arguments, code, told)
    if code == 2:
        assert told.startswith("kdjax") and len(told.splitlines()) == 1 and "Traceback" not in told, (arguments, told)
    return code, told


def fuzz(examples: int):
    """Examples that are the same in every run; a failure is not shrunk, which takes minutes."""
    chosen = settings(
        max_examples=examples,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(given(data=st.data())(test))
