"""What kdjax raises when the user's input cannot be used."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """The input cannot be used; the message is one sentence: where, what is wrong, what would be right.

    The command line prints it without a traceback. A bug of kdjax's own is any other exception and keeps its traceback.
    """


@contextlib.contextmanager
def prefix(where: str) -> Iterator[None]:
    """Puts `where` and a colon in front of the message of a `UserError` that is raised inside.

    Example:
      >>> with prefix("config.data"):
      ...     raise UserError("root: there is no folder x")
      Traceback (most recent call last):
      kdjax.errors.UserError: config.data: root: there is no folder x
    """
    try:
        yield
    except UserError as error:
        error.args = (f"{where}: {error}",)
        raise
