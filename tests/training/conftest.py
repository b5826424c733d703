"""What the tests of the trainer share."""

import pytest

from tests.support.runs import one_device, random_teacher


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def teacher_folder(folder):
    return random_teacher(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with one_device():
        yield
