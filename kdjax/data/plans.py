"""Which images make which row of a batch: a pure function of the seed and the step.

Mosaic and MixUp take their partners from the last positions of the same virtual stream: `STREAM` neighbouring rows of
every batch are one stream. Whole streams belong to one worker, which keeps the images of the last positions in memory
(`kdjax/data/build.py`), so that a partner costs nothing. What is in memory never decides which images are chosen.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from kdjax.data.stages import Stage

STREAM = 4  # neighbouring rows of a batch that make a virtual stream: a batch of 256 has 64 streams
CENTRE = (0.5, 1.5)  # range of a Mosaic's centre, in sides of the canvas; a Mosaic is twice as large as the canvas


class Row(NamedTuple):
    """The content of one row of a training batch, apart from the random draws of `transforms.augment`."""

    position: int  # in the endless stream of images; it also seeds those draws
    stage: int
    images: tuple[int, ...]  # one, or the four of a Mosaic
    centre: tuple[float, float] = (1.0, 1.0)  # y, x of a Mosaic's centre, in sides of the canvas
    partner: "Row | None" = None  # the other image of MixUp, itself without a partner
    mirrored: bool = False  # whether the partner is flipped once more


class Order(Protocol):
    """The image at every position of an endless stream."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 - an integer; Grain declares more


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPlans:
    """An endless sequence: element k lists this host's rows of batch k."""

    order: Order  # the image at every position
    seed: int
    batch: int  # rows of the global batch
    rows: range  # the rows of this host
    stages: tuple[Stage, ...]
    starts: tuple[int, ...]  # first step of each stage, ascending

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch)

    def __getitem__(self, index: int) -> list[Row]:
        stage = sum(index >= start for start in self.starts) - 1
        return [self._row(index * self.batch + row, stage) for row in self.rows]

    def _row(self, position: int, stage: int) -> Row:
        """The row at a position, with MixUp's partner."""
        row = self._single(position, stage)
        if not self.stages[stage].mixup:
            return row
        rng = np.random.default_rng((self.seed, position, 2))  # (seed, position) belongs to transforms.augment
        chosen, mirrored = rng.uniform() < self.stages[stage].mixup, rng.uniform() < 0.5
        [partner] = self._earlier(position, max(self.stages[stage].cache // 2, 1), rng, 1)
        return row._replace(partner=self._single(partner, stage), mirrored=mirrored) if chosen else row

    def _single(self, position: int, stage: int) -> Row:
        """The row at a position without MixUp's partner."""
        images, centre = [int(self.order[position])], (1.0, 1.0)
        if self.stages[stage].mosaic:
            rng = np.random.default_rng((self.seed, position, 1))
            y, x = rng.uniform(*CENTRE, 2).tolist()
            centre = (y, x)
            earlier = self._earlier(position, self.stages[stage].cache, rng, 3)
            images += [int(self.order[p]) for p in earlier]
        return Row(position, stage, tuple(images), centre)

    def _earlier(self, position: int, reach: int, rng: np.random.Generator, count: int) -> list[int]:
        """Draws `count` of the last `reach` positions of the stream before this one; at its start, this one itself."""
        step, row = divmod(position, self.batch)
        first = row - row % STREAM
        width = min(STREAM, self.batch - first)
        place = step * width + row - first  # in the stream
        if place == 0:
            return [position] * count
        places = place - 1 - rng.integers(0, min(reach, place), count)
        return [p // width * self.batch + first + p % width for p in places.tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPlans:
    """The images in order: element k lists those of batch k, None for a row that only fills the last batch."""

    size: int
    batch: int

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __getitem__(self, index: int) -> list[int | None]:
        return [p if p < self.size else None for p in range(index * self.batch, (index + 1) * self.batch)]
