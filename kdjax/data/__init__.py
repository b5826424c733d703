"""Images and boxes for the trainer: NumPy arrays only, never jax (see `docs/architecture.md`)."""

from kdjax.data.coco import same_names
from kdjax.data.counts import Counts, count, counted, counted_in_one_line, reasons
from kdjax.data.data_yaml import SUFFIXES as YAML
from kdjax.data.dataset import Dataset, Split, ground_truth, open_dataset, open_unlabelled, with_found, without_labels
from kdjax.data.folders import recognised
from kdjax.data.found import Found
from kdjax.data.loader import entry_batches, eval_batches, forecast, train_batches, train_plans
from kdjax.data.records import Damaged
from kdjax.data.stages import check_settings
from kdjax.data.summary import kept_line, summary
from kdjax.data.workers import Batches, Beside

__all__ = [
    "YAML",
    "Batches",
    "Beside",
    "Counts",
    "Damaged",
    "Dataset",
    "Found",
    "Split",
    "check_settings",
    "count",
    "counted",
    "counted_in_one_line",
    "entry_batches",
    "eval_batches",
    "forecast",
    "ground_truth",
    "kept_line",
    "open_dataset",
    "open_unlabelled",
    "reasons",
    "recognised",
    "same_names",
    "summary",
    "train_batches",
    "train_plans",
    "with_found",
    "without_labels",
]
