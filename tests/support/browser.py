"""Pages in a real browser: headless Chromium, driven by playwright."""

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

WIDTHS = (400, 1400)  # px
THEMES = ("light", "dark")
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Seen(NamedTuple):
    """A page as a browser shows it."""

    errors: list[str]  # of the console, exceptions, and requests that failed or went out
    overflow: int  # px by which it is wider than the window
    wide: list[str]  # elements that reach out of the window without a box of their own that scrolls
    paper: tuple[int, int, int]  # RGB of the background
    contrast: float  # the lowest of texts on that background


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser; the test is skipped, with the reason, where there is none."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("a test in a browser needs kdjax[browser] (playwright)")
    from playwright.sync_api import Error, sync_playwright

    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    with sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def look(opened: Any, file: Path, width: int, pictures: Path | None = None, *, whole: bool = False) -> dict[str, Seen]:
    """Opens a file at a width, with each of `THEMES`.

    Args:
      opened: of `browser`.
      file: the page.
      width: of the window in px.
      pictures: a folder for screenshots, NAME_WIDTH_THEME.png; None: none are made.
      whole: of the whole page, not only of its first 900 px.

    Returns:
      What is seen, by theme.
    """
    page = opened.new_page(viewport={"width": width, "height": 900})
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: errors.append(request.url) if _is_foreign(request.url) else None)
    page.goto(file.as_uri())
    seen = {}
    for theme in THEMES:
        page.emulate_media(color_scheme=theme)
        found = page.evaluate(_MEASURE)
        if pictures:
            page.screenshot(path=pictures / f"{file.stem}_{width}_{theme}.png", full_page=whole)
        seen[theme] = Seen([*errors], found["overflow"], found["wide"], tuple(found["paper"]), found["contrast"])
    page.close()
    return seen


def _is_foreign(url: str) -> bool:
    return not url.startswith(("file:", "data:"))


_MEASURE = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = element => {
    for (let one = element; one; one = one.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(one).overflowX)) return true;
    return false;
  };
  const wide = [...document.body.querySelectorAll('*')].filter(element => {
    const box = element.getBoundingClientRect();
    return box.width > 0 && box.right > width + 1 && !scrolls(element) && !element.closest('svg');
  }).map(element => element.outerHTML.slice(0, 80));
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = color => {
    const [r, g, b] = color.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = rgb(getComputedStyle(document.body).backgroundColor);
  const contrast = [...document.body.querySelectorAll('p, h1, h2, h3, td, th, small, a, b')]
    .filter(element => element.textContent.trim() && !element.closest('.box'))
    .map(element => [light(rgb(getComputedStyle(element).color)), light(paper)].sort((a, b) => b - a))
    .map(([high, low]) => (high + 0.05) / (low + 0.05));
  return {overflow: document.documentElement.scrollWidth - width, wide, paper, contrast: Math.min(...contrast)};
}"""
