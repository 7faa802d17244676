"""Fixtures of this room."""

import pytest

from fnet_search.training.datasets import DataSet
from tests.support.candidates import Outcome
from tests.support.networks import digits


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits(400)


@pytest.fixture(scope="module")
def outcome(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(data, tmp_path_factory.mktemp("candidate"))
