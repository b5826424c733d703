"""Images and boxes for the trainer: NumPy arrays only, never jax (see `docs/architecture.md`)."""

from kdjax.data.dataset import Dataset, Split, ground_truth, open_dataset
from kdjax.data.loader import eval_batches, train_batches
from kdjax.data.records import Damaged
from kdjax.data.stages import check_settings
from kdjax.data.summary import summary
from kdjax.data.workers import Batches

__all__ = [
    "Batches",
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
