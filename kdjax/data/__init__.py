"""Images and boxes for the trainer: NumPy arrays only, never jax (see `docs/architecture.md`)."""

from kdjax.data.dataset import Dataset, Split, ground_truth, open_dataset
from kdjax.data.loader import check_settings, eval_batches, train_batches
from kdjax.data.records import Damaged
from kdjax.data.summary import summary

__all__ = [
    "Damaged",
    "Dataset",
    "Split",
    "check_settings",
    "eval_batches",
    "ground_truth",
    "open_dataset",
    "summary",
    "train_batches",
]
