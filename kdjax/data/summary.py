"""The dry run: what would be trained, in words."""

from collections.abc import Mapping

from kdjax.data.dataset import Dataset


def summary(dataset: Dataset, cfg: Mapping) -> str:
    """To come."""
    return dataset.name
