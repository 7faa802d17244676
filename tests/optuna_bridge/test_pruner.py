from collections.abc import Callable

import optuna
import pytest
from optuna.study import Study
from optuna.trial import Trial, TrialState

from fnet_search.optuna_bridge.pruner import STARTUP, EqualStart
from fnet_search.optuna_bridge.trials import EPOCHS, ROLE, START


@pytest.fixture
def study() -> Study:
    return optuna.create_study(pruner=EqualStart(), direction="maximize")


def begin(study: Study, epochs: int = 8, start: str = "warm", role: str = "candidate") -> Trial:
    trial = study.ask()
    for name, value in ((ROLE, role), (START, start), (EPOCHS, epochs)):
        trial.set_user_attr(name, value)
    return trial


def train(trial: Trial, accuracies: tuple[float, ...]) -> int | None:
    """The epoch after which a training that would have these accuracies is stopped; None: it is not."""
    for epoch, accuracy in enumerate(accuracies, 1):
        trial.report(accuracy, epoch)
        if trial.should_prune() and epoch < len(accuracies):
            trial.study.tell(trial, state=TrialState.PRUNED)
            return epoch
    trial.study.tell(trial, accuracies[-1])
    return None


def flat(accuracy: float, epochs: int = 8) -> tuple[float, ...]:
    return (accuracy,) * epochs


@pytest.fixture
def peers(study: Study) -> Study:
    """Of four that were trained for eight epochs, none of which was stopped."""
    for accuracy in (0.5, 0.6, 0.7, 0.8):
        assert train(begin(study), flat(accuracy)) is None
    return study


@pytest.mark.parametrize(
    ("accuracies", "stopped"),
    [
        (flat(0.65), 2),
        (flat(0.7), None),  # of five, the better half are two; an equal one goes on
        (flat(0.9), None),
        ((0.1, 0.75, *flat(0.75, 6)), None),
        ((0.9, 0.65, *flat(0.9, 6)), 2),
        ((0.1, 0.75, 0.1, 0.65, *flat(0.9, 4)), 4),
        ((0.1, 0.75, 0.1, 0.75, *flat(0.1, 4)), None),
    ],
    ids=str,
)
def test_after_a_quarter_and_a_half_of_the_epochs_the_better_half_goes_on(
    peers: Study, accuracies: tuple[float, ...], stopped: int | None
) -> None:
    """What it had after other epochs does not matter."""
    assert train(begin(peers), accuracies) == stopped


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, []), (2, [1]), (3, [1, 2]), (4, [1, 2]), (6, [2, 4]), (8, [2, 4]), (20, [5, 10])]
)
def test_rungs(study: Study, epochs: int, rungs: list[int]) -> None:
    """It is stopped at each rung where it is behind, and at no other epoch."""
    for _ in range(STARTUP):
        train(begin(study, epochs), flat(0.5, epochs))
    found = []
    for behind in range(1, epochs):
        accuracies = tuple(0.4 if epoch == behind else 0.6 for epoch in range(1, epochs + 1))
        if train(begin(study, epochs), accuracies) == behind:
            found.append(behind)
    assert found == rungs


def test_too_few_say_nothing(study: Study) -> None:
    """Of those that have ended; one that runs is compared with, too."""
    train(begin(study), flat(0.9))
    train(begin(study), flat(0.8))
    running = begin(study)
    running.report(0.95, 1)
    running.report(0.95, 2)
    assert not running.should_prune()
    for accuracies in (flat(0.3), flat(0.2)):
        assert train(begin(study), accuracies) is None, "fewer than four have ended"
    assert train(begin(study), flat(0.1)) == 2
    assert train(begin(study), flat(0.5)) == 2, "behind three of seven, one of which runs"


def test_at_most_half_of_what_came_as_far_goes_on(study: Study) -> None:
    """Also where all get better: ranks count, not levels."""
    accuracies = [0.5, 0.5, 0.5, 0.5, 0.1, 0.6, 0.55, 0.2, 0.7]
    assert [train(begin(study), flat(accuracy)) for accuracy in accuracies] == [
        *(None, None, None, None, 2, None, None, 2, None)
    ]
    assert [trial.state.name for trial in study.get_trials()].count("PRUNED") == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda study: begin(study, start="scratch"),
        lambda study: begin(study, epochs=9),
        lambda study: begin(study, role="final"),
    ],
)
def test_only_equals_are_compared(peers: Study, other: Callable[[Study], Trial]) -> None:
    """With the same kind of start and as many epochs planned."""
    assert train(other(peers), flat(0.01, 9)) is None
    for _ in range(STARTUP - 1):
        train(other(peers), flat(0.01, 9))
    assert train(other(peers), flat(0.005, 9)) is not None, "its own peers have come"
    assert train(begin(peers), flat(0.65)) == 2, "to the others nothing has changed"


def test_what_was_cut_off_is_not_compared_with(study: Study) -> None:
    """Its candidate was issued again: it would count twice."""
    for accuracy in (0.9, 0.9, 0.9, 0.9):
        cut_off = begin(study)
        cut_off.report(accuracy, 2)
        cut_off.should_prune()
        study.tell(cut_off, state=TrialState.FAIL)
    for accuracy in (0.5, 0.5, 0.5, 0.5):
        assert train(begin(study), flat(accuracy)) is None
    assert train(begin(study), flat(0.6)) is None
    assert train(begin(study), flat(0.4)) == 2


def test_trials_of_a_version_before_are_not_compared_with(study: Study) -> None:
    for _ in range(6):
        old = study.ask()
        old.report(0.9, 1)
        study.tell(old, 0.9)
    assert train(begin(study), flat(0.1)) is None
