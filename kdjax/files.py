"""Writing files atomically, and the folder of everything that kdjax caches; imports nothing of kdjax."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part.

    The content goes to a temporary file in the same folder, which then replaces the old one.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of text in UTF-8; a lone surrogate, which json allows in a string, becomes "?"."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: str | Path, value: Mapping[str, Any] | Sequence[Any], *, indent: int | None = None) -> None:
    """`write_bytes` of a value as json, with a newline at the end."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def cache_root() -> Path:
    """The folder of prepared data and compiled programs: $KDJAX_CACHE, else ~/.cache/kdjax."""
    return Path(os.environ.get("KDJAX_CACHE") or Path.home() / ".cache" / "kdjax").expanduser()
