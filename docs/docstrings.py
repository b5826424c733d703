"""Brings the docstrings of kdjax into the form that griffe reads, for the reference of the site (mkdocs.yml).

- `Example:` is griffe's section `Examples:`.
- `a, b: text` under `Args:` is one entry for each name.
- `Scope:`, `Peers:` and `Reference:`, one line each, become paragraphs.
- The comment after a field of a dataclass is its description.
"""

import re
from typing import Any

import griffe

PARAGRAPHS = "Scope|Peers|Reference|Reduction|Warns"
ENTRY = re.compile(r"^  ((?:\*{0,2}\w+, )+\*{0,2}\w+):(.*(?:\n    .*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring after it was read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        field = isinstance(obj, griffe.Attribute) and obj.lineno and obj.parent and obj.parent.is_class
        if field and not obj.docstring:
            comment = obj.lines[0].partition("  # ")[2]
            obj.docstring = griffe.Docstring(comment, parent=obj) if comment else None
        elif obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """The text of a docstring in the form that griffe reads."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = ENTRY.sub(lambda entry: "\n".join(f"  {name}:{entry[2]}" for name in entry[1].split(", ")), text)
    return re.sub(rf"^({PARAGRAPHS}): (.*(?:\n +\S.*)*)", paragraph, text, flags=re.MULTILINE)


def paragraph(section: re.Match) -> str:
    """A section of one sentence as a paragraph of its own."""
    return f"\n**{section[1]}:** {' '.join(section[2].split())}\n"
