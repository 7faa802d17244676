from dataclasses import replace

import pytest

from fnet_search.training import deadline as module
from fnet_search.training.deadline import Deadline
from fnet_search.training.train import TrainingProgress

ENDED = TrainingProgress(1, 4, True, 0.25, 1.5, 0.5, "validation")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in the only element."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_an_epoch_that_would_end_later_is_not_begun(now: list[float]) -> None:
    deadline = Deadline(100)
    deadline.begin(3)
    held = []
    for epoch, seconds in enumerate((40, 30, 15, 15), 1):  # ends 40, 70, 85 and 100 s after the start
        now[0] += seconds
        held.append(deadline.must_pause(3, replace(ENDED, epoch=epoch, epochs=9)))
    assert held == [False, False, False, True], "70 + 30 is not later"


def test_each_training_has_its_own_pace(now: list[float]) -> None:
    deadline = Deadline(100)
    deadline.begin(0)
    now[0] += 20
    deadline.begin(1)
    now[0] += 35
    assert [deadline.must_pause(number, ENDED) for number in (0, 1)] == [True, False], "55 + 55 s, 55 + 35 s"


def test_the_last_epoch_is_followed_by_what_comes_after_it(now: list[float]) -> None:
    deadline = Deadline(10)
    deadline.begin(0)
    now[0] += 20
    assert not deadline.must_pause(0, replace(ENDED, epoch=4))
    assert deadline.over


def test_one_epoch_is_done_in_any_case(now: list[float]) -> None:
    """Also where earlier ones are told again from a checkpoint."""
    deadline = Deadline(10)
    now[0] += 20
    assert not deadline.over
    deadline.begin(0)
    assert not deadline.must_pause(0, replace(ENDED, loss=None))
    assert not deadline.over
    assert deadline.must_pause(0, replace(ENDED, epoch=2))
    assert deadline.over


def test_without_a_limit_nothing_is_held(now: list[float]) -> None:
    deadline = Deadline()
    deadline.begin(0)
    now[0] += 1e9
    assert not deadline.must_pause(0, ENDED)
    assert not deadline.over
