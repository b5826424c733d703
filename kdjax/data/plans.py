"""Which images make which row of a batch: a pure function of the seed and the step.

Mosaic and MixUp take their partners from the last positions of the same virtual stream: `STREAM` neighbouring rows of
every batch are one stream. Whole streams belong to one worker, which keeps the images of the last positions in memory
(`kdjax/data/build.py`), so that a partner costs nothing. What is in memory never decides which images are chosen.

An entry is the number of a row: one number always stands for the same row, so that what a teacher said about it can be
stored. Without views (`config.data.views`) it is the row's position in the endless stream; with views it numbers stage,
view and image, and does not depend on the run's seed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from kdjax.data.stages import Stage

STREAM = 4  # neighbouring rows of a batch that make a virtual stream: a batch of 256 has 64 streams
VIEWS_SEED = 20_240_229  # of the draws of views, whatever the seed of the run
CENTRE = (0.5, 1.5)  # range of a Mosaic's centre, in sides of the canvas; a Mosaic is twice as large as the canvas


class Row(NamedTuple):
    """The content of one row of a training batch, apart from the random draws of `transforms.augment`."""

    position: int  # in the endless stream of images, or view * images + image; it also seeds those draws
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
        return [self.row(index * self.batch + row) for row in self.rows]

    def row(self, entry: int) -> Row:
        """The row of an entry: of a position."""
        return self._row(entry, stage_at(entry // self.batch, self.starts))

    def entry(self, row: Row) -> int:
        """The entry of a row."""
        return row.position

    def needed(self, steps: int) -> list[range]:
        """The entries of the first steps."""
        return [range(steps * self.batch)]

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
class ViewPlans:
    """As `TrainPlans`, where every image has a fixed number of views: its augmentation is drawn that often.

    Epoch e shows view e mod `views` of each image. A row is a function of image, view and stage alone: its draws have a
    seed of their own, and the partners of Mosaic and MixUp are drawn among all other images. The partner of MixUp is
    shown in the same view as the image.
    """

    order: Order  # the image at every position
    size: int  # images
    views: int
    batch: int  # rows of the global batch
    rows: range  # the rows of this host
    stages: tuple[Stage, ...]
    starts: tuple[int, ...]  # first step of each stage, ascending

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch)

    def __getitem__(self, index: int) -> list[Row]:
        stage = stage_at(index, self.starts)
        positions = [index * self.batch + row for row in self.rows]
        return [self._row(p // self.size % self.views * self.size + int(self.order[p]), stage) for p in positions]

    def row(self, entry: int) -> Row:
        """The row of an entry."""
        stage, place = divmod(entry, self.views * self.size)
        return self._row(place, stage)

    def entry(self, row: Row) -> int:
        """The entry of a row: (stage * views + view) * images + image."""
        return row.stage * self.views * self.size + row.position

    def needed(self, steps: int) -> list[range]:
        """The entries of the first steps: all images of each view that is shown in a stage."""
        shown = set()
        for epoch in range(-(-steps * self.batch // self.size)):
            first, last = epoch * self.size // self.batch, ((epoch + 1) * self.size - 1) // self.batch
            stages = range(stage_at(first, self.starts), stage_at(min(last, steps - 1), self.starts) + 1)
            shown |= {stage * self.views + epoch % self.views for stage in stages}
        return [range(one * self.size, (one + 1) * self.size) for one in sorted(shown)]

    def _row(self, place: int, stage: int) -> Row:
        """The row at a place, view * images + image, with MixUp's partner."""
        row = self._single(place, stage)
        if not self.stages[stage].mixup:
            return row
        rng = np.random.default_rng((VIEWS_SEED, place, 2))  # (seed, place) belongs to transforms.augment
        chosen, mirrored = rng.uniform() < self.stages[stage].mixup, rng.uniform() < 0.5
        view, image = divmod(place, self.size)
        [partner] = self._others(image, rng, 1)
        partner = self._single(view * self.size + partner, stage)
        return row._replace(partner=partner, mirrored=mirrored) if chosen else row

    def _single(self, place: int, stage: int) -> Row:
        """The row at a place without MixUp's partner."""
        image = place % self.size
        if not self.stages[stage].mosaic:
            return Row(place, stage, (image,))
        rng = np.random.default_rng((VIEWS_SEED, place, 1))
        y, x = rng.uniform(*CENTRE, 2).tolist()
        return Row(place, stage, (image, *self._others(image, rng, 3)), (y, x))

    def _others(self, image: int, rng: np.random.Generator, count: int) -> list[int]:
        """Draws `count` of the other images; of a single image, this one itself."""
        if self.size == 1:
            return [image] * count
        return ((image + 1 + rng.integers(0, self.size - 1, count)) % self.size).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryPlans:
    """Given entries in batches: element k lists the rows of batch k. The last batch repeats its last entry."""

    of: TrainPlans | ViewPlans
    batches: Sequence[Sequence[int]]  # entries
    batch: int  # rows

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Row]:
        entries = list(self.batches[index])
        return [self.of.row(entry) for entry in entries + entries[-1:] * (self.batch - len(entries))]


def stage_at(step: int, starts: Sequence[int]) -> int:
    """The stage of a step: the last that has begun."""
    return sum(step >= start for start in starts) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPlans:
    """The images in order: element k lists those of batch k, None for a row that only fills the last batch.

    Of several shards each has successive batches, the first ones at most one more than the others.
    """

    size: int
    batch: int
    shard: tuple[int, int] = (0, 1)  # index, count

    def _start(self, shard: int) -> int:
        """The first batch of a shard."""
        least, more = divmod(-(-self.size // self.batch), self.shard[1])
        return shard * least + min(shard, more)

    def __len__(self) -> int:
        return self._start(self.shard[0] + 1) - self._start(self.shard[0])

    def __getitem__(self, index: int) -> list[int | None]:
        index += self._start(self.shard[0])
        return [p if p < self.size else None for p in range(index * self.batch, (index + 1) * self.batch)]
