"""All checks of the doctor in their order, before a run starts.

The checks use the detectors with their initial weights, training batches, methods and compiled updates of the run
itself; learning rate, length and moving average are judged by rules of thumb.
"""

from collections.abc import Iterator

from kdjax.detectors.api import Detector
from kdjax.doctor import gradients
from kdjax.doctor.data import check_data
from kdjax.doctor.findings import ERROR, Finding
from kdjax.doctor.league import check_methods
from kdjax.doctor.memory import check_memory
from kdjax.doctor.models import check_class_map, check_frozen, check_sizes, check_taps, check_weights
from kdjax.doctor.schedule import check_schedule
from kdjax.errors import UserError
from kdjax.training import checks
from kdjax.training.config import Config


def examine(config: Config, *, image_count: int = 64) -> Iterator[Finding]:
    """Checks a run before its first step.

    Args:
      config: the settings of the run.
      image_count: number of validation images for detectors with weights.

    Yields:
      The findings, each as soon as it is known. If the run would not start, that is the only finding. If the memory is
      not sufficient, losses and terms are not measured.
    """
    try:
        setup = checks.checked(config)
        batch = checks.first_batch_with_objects(setup)
    except (UserError, OSError) as error:
        yield Finding(ERROR, "start", f"the run does not start: {error}")
        return
    dataset = setup.dataset
    yield from check_data(setup)
    yield from check_schedule(config, dataset.splits["train"].size)
    for teacher in setup.teachers:
        if isinstance(teacher.detector, Detector):
            yield check_class_map(teacher.role, teacher.settings(config), dataset)[0]
            if teacher.detects:
                yield from check_weights(teacher.role, setup, image_count)
            yield from check_sizes(setup, teacher)
        yield from check_taps(setup, teacher)
        yield from check_methods(setup.student.name, teacher.model, dataset.splits["train"].size)
    if config.student.weights:
        finding, kept = check_class_map("student", config.student, dataset)
        yield finding
        if kept:
            yield from check_weights("student", setup, image_count)
    else:
        yield from check_frozen(setup.student)
    memory = check_memory(setup, batch)
    yield from memory
    if any(finding.level == ERROR for finding in memory):
        return  # the measurements need as much memory as a step
    measured = gradients.measure_gradients(setup, batch)
    adapters = setup.states["student"].params["adapters"]
    adapted = [
        f"{one.name}/{name}" if one.name else name
        for one in setup.teachers
        for name in one.methods
        if (adapters[one.name] if one.name else adapters)[name]
    ]
    if any(gradients.gradient_shares(setup, measured.grad_norms)[name] < gradients.NEGLIGIBLE for name in adapted):
        measured = gradients.measure_gradients(setup, batch, gradients.train_adapters(setup, batch))
    yield from gradients.check_initial_scores(measured)
    yield from gradients.check_terms(setup, measured)
