"""Is the set-up right? Looks at a run for a minute before hours are spent on it; every finding says what to do.

What is measured is measured on the run itself: its detectors with their start weights, its batches, its methods, its
compiled step. What is judged by a rule of thumb says so.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from kdjax import data
from kdjax.doctor import gradients
from kdjax.doctor.data import check_data
from kdjax.doctor.findings import FAULT, Finding
from kdjax.doctor.memory import check_memory
from kdjax.doctor.models import check_class_map, check_frozen, check_sizes, check_taps, check_weights
from kdjax.doctor.schedule import check_schedule
from kdjax.errors import prefix
from kdjax.training import checks, outputs
from kdjax.training.setup import prepare, prepare_process


def examine(config: ConfigDict, *, image_count: int = 64) -> Iterator[Finding]:
    """Everything that can be known before the first step of a run.

    Args:
      config: of the run.
      image_count: of the validation split, on which a detector with weights is tried.

    Yields:
      The findings, as they come; of a run that would be refused that alone, and nothing on its losses if they would not
      fit.
    """
    try:
        checks.check_settings(config)
        checks.check_models(config)
        with prefix("config.data"):
            dataset = data.open_dataset(config.data)
        checks.check_truth(dataset)
        prepare_process(config.compile_cache)
        setup = prepare(config, dataset)
        batch = checks.first_batch_with_objects(setup)
    except (ValueError, OSError) as error:
        yield Finding(FAULT, "start", f"the run would be refused: {error}")
        return
    yield from check_data(setup)
    yield from check_schedule(config, dataset.splits["train"].size)
    if setup.teacher:
        yield check_class_map("teacher", config.teacher, dataset)[0]
        yield from check_weights("teacher", setup.teacher, setup.variables, setup, image_count)
        yield from check_sizes(setup)
        yield from check_taps(setup)
    if config.student.weights:
        finding, kept = check_class_map("student", config.student, dataset)
        yield finding
        if kept:
            yield from check_weights("student", setup.student, outputs.ema(setup.states["student"]), setup, image_count)
    else:
        yield from check_frozen(setup.student)
    program = check_memory(setup, batch)
    yield from program
    if any(finding.level == FAULT for finding in program):
        return  # what follows needs as much memory
    values, pulls, start = gradients.measure_gradients(setup, batch)
    adapted = [name for name, params in setup.states["student"].params["adapters"].items() if params]
    if any(gradients.gradient_shares(setup, pulls)[name] < gradients.NOTHING for name in adapted):
        values, pulls, start = gradients.measure_gradients(setup, batch, gradients.train_adapters(setup, batch))
    yield from gradients.check_initial_scores(values, start)
    yield from gradients.check_terms(setup, values, pulls)
