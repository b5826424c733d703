"""`kdjax view`: a page on this machine with what models detect in the images of a folder, side by side.

    kdjax view --model=runs/mkd --model=runs/mkd/twin --data=photos

The page is served to this machine only, until Ctrl-C. The models run when an image is shown for the first time.
"""

import collections
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.commands import arguments
from kdjax.commands.predict import find, is_video
from kdjax.data.images import SUFFIXES
from kdjax.errors import NAME, UserError, prefix, printable
from kdjax.inference.model import Model
from kdjax.inference.predict import read_image
from kdjax.report import drawing
from kdjax.structs import Detections

ADDRESS = "127.0.0.1"  # never another one: the page shows files of this machine
KEPT = 32  # images whose detections are kept
KEPT_FOR = (600, 600)  # s: how often drawn images in gradio's folder are looked through, and how old they may be
WIDTH = (640, 1280)  # px, at least and at most, of a drawn image


class View(NamedTuple):
    """An image as a model sees it."""

    image: np.ndarray | None  # u8[h, w, 3] RGB with boxes; None: it cannot be read
    text: str  # what is in it, or why it cannot be read


def run(*, models: Sequence[str], data: str, threshold: float, port: int, exif: str | None) -> int:
    """Serves the page until Ctrl-C.

    Args:
      models: one or more, see `kdjax.inference.load`.
      data: a folder of images, with those below it.
      threshold: the lowest score of a box that is drawn, 0 .. 1, until it is moved on the page.
      port: of the page on this machine; 0: the first free one from 7860 on.
      exif: "stored" or "upright"; None: as each model was trained.

    Returns:
      Exit code 0.

    Raises:
      UserError: gradio is not installed, there is no such model or folder of images, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("kdjax view needs gradio: pip install 'kdjax[view]'")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold must be a score in 0 .. 1, not {threshold}")
    if not 0 <= port <= 65_535:
        raise UserError(f"--port must be in 0 .. 65535 (0: a free one), not {port}")
    images = images_of(data)
    viewer = Viewer(images, [arguments.load_model(path) for path in models], exif=exif)
    page = build(viewer, threshold)
    try:
        serve(page, port)
    except KeyboardInterrupt:
        if viewer.lock.locked():  # another thread computes: the end of Python would abort it, and this process
            sys.stdout.flush()
            os._exit(130)
        raise
    return 0


def images_of(data: str) -> list[Path]:
    """The images of a folder and those below it, by name.

    Raises:
      UserError: there is no such folder, or it has no images.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data: there is no folder {data}: name a folder of images")
    with prefix("--data"):
        found = [path for path, _ in find([data], Path(os.devnull)) if not is_video(path)]  # nothing is written
    if not found:
        raise UserError(f"--data: {data} has no images ({', '.join(SUFFIXES)})")
    return found


class Viewer:
    """Images and models, and what the models detect; a lock lets one image at a time be computed."""

    def __init__(self, images: Sequence[Path], models: Sequence[Model], *, exif: str | None = None) -> None:
        """Computes nothing yet.

        Args:
          images: files, at least one.
          models: at least one.
          exif: as for `run`.
        """
        self.images, self.models, self.exif = list(images), list(models), exif
        self.known: collections.OrderedDict[tuple[int, int], tuple[np.ndarray, Detections]] = collections.OrderedDict()
        self.lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The models as headings, all different."""
        paths = [str(model.path) for model in self.models]
        return [path if paths.count(path) == 1 else f"{path} ({i + 1})" for i, path in enumerate(paths)]

    def title(self, place: int) -> str:
        """The name of an image with its number.

        Args:
          place: from 0.
        """
        return f"{place + 1} of {len(self.images)}: {printable(str(self.images[place]))}"

    def detections(self, place: int, which: int) -> tuple[np.ndarray, Detections]:
        """An image, u8[h, w, 3] RGB, and what a model detects in it.

        Args:
          place: of the image, from 0.
          which: the model, from 0.

        Raises:
          UserError: the image cannot be read.
        """
        with self.lock:
            if (place, which) not in self.known:
                model = self.models[which]
                exif = self.exif or model.exif_orientation
                image = read_image(self.images[place], exif=exif, warn=lambda _: None)  # `kdjax predict` tells notes
                self.known[place, which] = image, model.detect(image)
                while len(self.known) > KEPT * len(self.models):
                    self.known.popitem(last=False)
            self.known.move_to_end((place, which))
            return self.known[place, which]

    def views(self, place: int, thresholds: Sequence[float]) -> list[View]:
        """An image with the boxes of each model.

        Args:
          place: of the image, from 0; one outside of the range becomes the nearest.
          thresholds: for each model the lowest score of a box that is drawn.
        """
        place = min(max(int(place), 0), len(self.images) - 1)
        views = []
        for which, threshold in enumerate(thresholds):
            try:
                image, found = self.detections(place, which)
            except UserError as error:
                views.append(View(None, str(error)))
                continue
            drawn = drawing.draw(
                image,
                found.boxes,
                found.labels,
                found.scores,
                found.class_names,
                masks=found.masks or (),
                threshold=threshold,
                width=WIDTH,
            )
            views.append(View(drawn, counted(found, threshold)))
        return views


def counted(found: Detections, threshold: float) -> str:
    """How many objects there are of each class, the most frequent first.

    Example:
      >>> found = Detections(np.zeros((3, 4)), np.array([0.9, 0.6, 0.2]), np.array([1, 1, 0]), ("cat", "dog"))
      >>> counted(found, 0.5), counted(found, 0.95)
      ('2 objects from score 0.50 on: 2 dog', 'no object from score 0.95 on')
    """
    labels = collections.Counter(found.labels[found.scores >= threshold].tolist())
    total = sum(labels.values())
    if not total:
        return f"no object from score {threshold:.2f} on"
    names = dict(enumerate(found.class_names))
    kinds = ", ".join(f"{n} {printable(names.get(k, f'class {k}'), NAME)}" for k, n in labels.most_common())
    return f"{total} object{'s' * (total > 1)} from score {threshold:.2f} on: {kinds}"


def build(viewer: Viewer, threshold: float) -> Any:  # noqa: ANN401 - gradio is optional
    """The page, as gradio's `Blocks`.

    Args:
      viewer: of the images and models.
      threshold: at the start.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    import gradio  # pyright: ignore[reportMissingImports] - optional

    last = len(viewer.images)

    def show(number: float, *thresholds: float) -> list[Any]:
        views = viewer.views(int(number or 1) - 1, thresholds)
        place = min(max(int(number or 1), 1), last) - 1
        return [viewer.title(place), *(part for view in views for part in view)]

    def step(number: float, by: int) -> int:
        return min(max(int(number or 1) + by, 1), last)

    with gradio.Blocks(analytics_enabled=False, title="kdjax view", fill_width=True, delete_cache=KEPT_FOR) as page:
        name = gradio.Textbox(viewer.title(0), label="image", interactive=False)
        number = gradio.Slider(1, max(last, 2), value=1, step=1, label="number", interactive=last > 1)
        with gradio.Row():
            before = gradio.Button("Previous", min_width=90)
            after = gradio.Button("Next", min_width=90)
        thresholds, outputs = [], [name]
        with gradio.Row():
            for model in viewer.names:
                with gradio.Column(min_width=320):
                    gradio.Textbox(printable(model), label="model", lines=2, interactive=False)
                    label = "lowest score"
                    thresholds.append(gradio.Slider(0, 1, value=threshold, step=0.01, label=label, interactive=True))
                    image = gradio.Image(label="detections", interactive=False, format="jpeg", buttons=["fullscreen"])
                    outputs += [image, gradio.Textbox(label="objects", lines=2, interactive=False)]
        inputs = [number, *thresholds]
        before.click(lambda at: step(at, -1), number, number, api_visibility="private")
        after.click(lambda at: step(at, 1), number, number, api_visibility="private")
        for moved in inputs:
            moved.change(show, inputs, outputs, trigger_mode="always_last", api_visibility="private")
        page.load(show, inputs, outputs, api_visibility="private")
    return page


def serve(page: Any, port: int, *, block: bool = True) -> str:  # noqa: ANN401 - gradio is optional
    """Serves a page to this machine.

    Args:
      page: of `build`.
      port: as for `run`.
      block: until Ctrl-C; otherwise the page is closed with `page.close()`.

    Returns:
      Its address.

    Raises:
      UserError: the port is taken.
    """
    import gradio  # pyright: ignore[reportMissingImports] - optional

    plain = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
    try:
        _, address, _ = page.launch(
            server_name=ADDRESS,
            server_port=port or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=plain,
            ssr_mode=False,
        )
    except OSError:
        raise UserError(f"--port: {port or '7860 .. 7959'} is taken: choose another one") from None
    print(f"{address} shows the models, to this machine only; Ctrl-C ends it")
    if block:
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return address
