"""A small reader of xml that keeps lines, and expands and fetches nothing."""

import dataclasses
from collections.abc import Iterator
from typing import NoReturn
from xml.parsers import expat

from kdjax.errors import UserError, printable

DEPTH = 100  # of elements in each other


@dataclasses.dataclass
class Element:
    """An element with its text, its line from 1, and the elements in it."""

    tag: str
    line: int
    text: str = ""
    children: list["Element"] = dataclasses.field(default_factory=list)

    def all(self, tag: str) -> Iterator["Element"]:
        """The elements directly in it that have a tag."""
        return (child for child in self.children if child.tag == tag)

    def get(self, tag: str) -> "Element | None":
        """The first of them, or None."""
        return next(self.all(tag), None)


def parse(content: bytes, path: str) -> Element:
    """The root of an xml.

    Args:
      content: of the file.
      path: for messages.

    Raises:
      UserError: it is not well-formed, nested too deeply, or declares entities; with its line.

    Example:
      >>> parse(b"<a><b> 1 </b></a>", "x.xml").get("b")
      Element(tag='b', line=1, text='1', children=[])
    """
    parser = expat.ParserCreate()
    top = Element("", 0)
    stack = [top]
    parts: list[list[str]] = [[]]

    def begin(tag: str, attributes: dict[str, str]) -> None:
        if len(stack) > DEPTH:
            raise UserError(f"{path}:{parser.CurrentLineNumber}: elements are nested over {DEPTH} deep")
        one = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(one)
        stack.append(one)
        parts.append([])

    def end(tag: str) -> None:
        stack.pop().text = "".join(parts.pop()).strip()

    def refuse(*_: object) -> NoReturn:
        raise UserError(f"{path}:{parser.CurrentLineNumber}: it declares an entity: must be xml without any")

    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.CharacterDataHandler = lambda text: parts[-1].append(text)
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise UserError(f"{path}:{error.lineno}: not valid xml: {expat.ErrorString(error.code)}") from None
    except (LookupError, ValueError) as error:  # of its encoding
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}:1: not valid xml: {printable(str(error), 80)}: must be UTF-8") from None
    return top.children[0]
