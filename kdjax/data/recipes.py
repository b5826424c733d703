"""Images that are not made yet: how the device is to make them, drawn by the same code that makes them on the host.

`transforms` resizes, crops, flips, pastes, mixes and colours a `Recipe` as it does an image. Nothing is computed but
where each pixel comes from, so that boxes and masks are those of the host's path to the bit. The arithmetic of the
pixels (`kdjax/training/augmentation.py`) is OpenCV's, in integers: a pixel lies between two rows and two columns, with
weights in 2048ths.

A canvas is made of one image, or of the four tiles of a Mosaic. The device first resizes the tiles into the quarters of
a plane, whose middle is the point around which they lie, and then resizes and crops the plane to the canvas.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

GREY, PADDING = -1, -2  # instead of a row or column: grey of a Mosaic, coloured with it; grey around the image
WEIGHTS = 2048  # the weights of two neighbours add up to it


class Form(NamedTuple):
    """The shapes of a run's recipes, which never change."""

    source: tuple[int, int]  # height and width that all images of the split have, px; smaller ones lie at the top left
    canvas: tuple[int, int]  # px
    mosaic: bool  # a canvas may have four tiles
    mixup: bool  # and a partner

    @property
    def quarter(self) -> tuple[int, int]:
        """Height and width of a quarter of the plane, which holds a tile, and in which a single image has room."""
        (height, width), canvas = self.source, self.canvas
        return max(canvas[0], -(-height // 2)), max(canvas[1], -(-width // 2))


class Tile(NamedTuple):
    """The visible part of an image in a Mosaic."""

    image: int  # its position in the split
    rows: np.ndarray  # i32[h, 3], as in `Recipe`
    cols: np.ndarray  # i32[w, 3]

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns."""
        return self.rows, self.cols


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """An image [h, w, 3] that is not made yet."""

    tiles: tuple[Tile, ...]  # one, or the four of a Mosaic
    rows: np.ndarray  # i32[h, 3]: two rows of the image or Mosaic, and the weight of the second one
    cols: np.ndarray  # i32[w, 3]: likewise its columns
    centre: tuple[int, int] = (0, 0)  # y, x of the point around which the tiles of a Mosaic lie
    shifts: tuple[int, int, int] = (0, 0, 0)  # of hue, saturation and value
    partner: "Recipe | None" = None  # what it is mixed with

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, 3)."""
        return len(self.rows), len(self.cols), 3

    def __getitem__(self, window: tuple[slice, slice]) -> "Recipe":
        """A window; a negative step mirrors."""
        return dataclasses.replace(self, rows=self.rows[window[0]], cols=self.cols[window[1]])

    def copy(self) -> "Recipe":
        """Itself: it never changes."""
        return self

    def resized(self, size: tuple[int, int]) -> "Recipe":
        """Resized to (h, w) px, bilinearly. Only a whole image or Mosaic can be."""
        whole = all(np.array_equal(one, _each(len(one))) for one in (self.rows, self.cols))
        assert whole, "an image is resized before it is cropped"
        rows = _between(len(self.rows), size[0], outside=True)
        return dataclasses.replace(self, rows=rows, cols=_between(len(self.cols), size[1], outside=False))

    def padded(self, canvas: tuple[int, int]) -> "Recipe":
        """At the top left of a canvas (h, w) px."""
        rows, cols = (
            np.concatenate([own, np.full((side - len(own), 3), PADDING, np.int32)])
            for own, side in zip((self.rows, self.cols), canvas, strict=True)
        )
        return dataclasses.replace(self, rows=rows, cols=cols)

    def coloured(self, shifts: tuple[int, int, int]) -> "Recipe":
        """With other colours."""
        return dataclasses.replace(self, shifts=shifts)

    def mixed(self, other: "Recipe") -> "Recipe":
        """The mean with another one of the same size."""
        return dataclasses.replace(self, partner=other)


def source(image: int, size: tuple[int, int]) -> Recipe:
    """The image at a position of the split, of (h, w) px, as it is."""
    rows, cols = _each(size[0]), _each(size[1])
    return Recipe((Tile(image, rows, cols),), rows, cols)


def pasted(parts: Sequence[Recipe], corners: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> Recipe:
    """Four images on a canvas (h, w) px, with their top left corners at (y, x), around the corner of the last one."""
    tiles = tuple(Tile(part.tiles[0].image, part.rows, part.cols) for part in parts)
    return Recipe(tiles, _each(canvas[0]), _each(canvas[1]), centre=corners[3])


def images_of(recipe: Recipe) -> list[list[int]]:
    """The positions of the images that it is made of, and of those of its partner."""
    return [[tile.image for tile in one.tiles] for one in (recipe, recipe.partner) if one is not None]


def encoded(recipe: Recipe, form: Form) -> dict[str, Any]:
    """A recipe of a whole canvas as arrays, for `kdjax/training/augmentation.py`.

    Args:
      recipe: padded to the canvas.
      form: of the run.

    Returns:
      With k = 2 with MixUp, else 1, and n = 4 with Mosaic, else 1: image i32[k, n], the place of each tile in a list of
      `images_of`, rows i32[k, H, 3], cols i32[k, W, 3] and shifts i32[k, 3]; with Mosaic also tile_rows i32[k, 4, h, 3]
      and tile_cols i32[k, 4, w, 3] of a quarter; with MixUp mixed bool[], False where the second half means nothing.
    """
    parts = [_part(one, form) for one in (recipe, recipe.partner) if one is not None]
    alone = len(parts) == 1
    if form.mixup and alone:
        parts.append({name: np.zeros_like(value) for name, value in parts[0].items()})
    out = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return out | ({"mixed": np.array(not alone)} if form.mixup else {})


def _part(recipe: Recipe, form: Form) -> dict[str, np.ndarray]:
    """The arrays of an image before MixUp."""
    single, tiles, tables = len(recipe.tiles) == 1, recipe.tiles, [recipe.rows, recipe.cols]
    numbers = list(range(len(tiles)))
    out: dict[str, np.ndarray] = {}
    if form.mosaic:
        numbers *= 4 if single else 1
        for axis, (name, side) in enumerate(zip(("tile_rows", "tile_cols"), form.quarter, strict=True)):
            if single:  # the plane begins with it
                whole = tiles[0].tables[axis]
                halves = [_filled(half, side, at_end=False) for half in (whole[:side], whole[side:])]
                out[name] = np.stack([halves[_after(place)[axis]] for place in range(4)])
            else:  # what lies before the middle ends there
                out[name] = np.stack(
                    [_filled(tile.tables[axis], side, not _after(place)[axis]) for place, tile in enumerate(tiles)]
                )
                tables[axis] = _moved(tables[axis], side - recipe.centre[axis], 2 * side)
    out |= {"image": np.array(numbers, np.int32), "rows": tables[0], "cols": tables[1]}
    return out | {"shifts": np.array(recipe.shifts, np.int32)}


def _after(place: int) -> tuple[int, int]:
    """Whether a tile of a Mosaic lies below its point, and right of it."""
    return divmod(place, 2)


def _each(count: int) -> np.ndarray:
    """i32[count, 3]: every row or column as it is."""
    at = np.arange(count, dtype=np.int32)
    return np.stack([at, at, np.zeros_like(at)], axis=1)


def _between(before: int, after: int, *, outside: bool) -> np.ndarray:
    """i32[after, 3]: between which of `before` pixels each new one lies, as OpenCV's INTER_LINEAR of 8 bits.

    Args:
      before: pixels along the axis.
      after: pixels after the resize.
      outside: whether weights are kept beyond the first and last pixel, as OpenCV does with rows alone: the sum of two
        equal neighbours is then rounded twice.
    """
    if before == after:
        return _each(before)
    at = ((np.arange(after) + 0.5) * (1.0 / (after / before)) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int32)
    share = at - first
    if not outside:
        share[(first < 0) | (first >= before - 1)] = 0
    weight = np.rint(share * np.float32(WEIGHTS)).astype(np.int32)
    return np.stack([np.clip(first, 0, before - 1), np.clip(first + 1, 0, before - 1), weight], axis=1)


def _moved(table: np.ndarray, offset: int, length: int) -> np.ndarray:
    """The rows or columns of a Mosaic on the plane, grey beyond it."""
    ends = table[:, :2]
    moved = np.where((ends + offset >= 0) & (ends + offset < length), ends + offset, GREY)
    return np.concatenate([np.where(ends < 0, ends, moved), table[:, 2:]], axis=1)


def _filled(table: np.ndarray, length: int, at_end: bool) -> np.ndarray:
    """A table as a part of a longer one that is grey elsewhere."""
    out = np.full((length, 3), GREY, np.int32)
    if len(table):
        out[slice(length - len(table), None) if at_end else slice(len(table))] = table
    return out
