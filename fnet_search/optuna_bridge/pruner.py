"""Which candidates are hopeless: successive halving among those that are comparable."""

import math
from typing import Any, cast

from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fnet_search.optuna_bridge.trials import EPOCHS, ROLE, START

STARTUP = 4
"""So many comparable trainings must have ended before one is stopped: a rank among fewer means nothing."""


class EqualStart(BasePruner):
    """``optuna.pruners.SuccessiveHalvingPruner`` over validation accuracies after equal epochs, among candidates with
    the same kind of start and as many epochs planned.

    After a quarter of the epochs, and again after a half, a candidate goes on if it is in the better half of those that
    came as far.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        kind = _kind(trial)
        rung = max(1, math.ceil(trial.user_attrs[EPOCHS] / 4))
        peers = _Peers(study, kind)
        # Asked always, since it notes what a candidate reached at a rung.
        behind = SuccessiveHalvingPruner(min_resource=rung, reduction_factor=2).prune(cast(Study, peers), trial)
        return behind and len(peers.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) >= STARTUP


def _kind(trial: FrozenTrial) -> tuple[Any, ...]:
    return tuple(trial.user_attrs.get(name) for name in (ROLE, START, EPOCHS))


class _Peers:
    """What a pruner sees of a study: its trials of one kind, as Optuna's HyperbandPruner shows parts of a study."""

    def __init__(self, study: Study, kind: tuple[Any, ...]) -> None:
        self._study, self._kind = study, kind
        self._storage, self.direction = study._storage, study.direction

    def get_trials(self, deepcopy: bool = False, states: Any = None) -> list[FrozenTrial]:
        # Failed ones are what runs that were cut off left: their candidates were issued again.
        wanted = states or (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return [trial for trial in self._study.get_trials(deepcopy, wanted) if _kind(trial) == self._kind]
