"""The pruner: successive halving among comparable candidates."""

import math
from typing import Any, cast

from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fnet_search.optuna_bridge.trials import EPOCHS, ROLE, START

STARTUP = 4
"""No training is stopped before this many comparable ones have ended: a rank among fewer says little."""


class EqualStart(BasePruner):
    """``optuna.pruners.SuccessiveHalvingPruner`` on validation accuracies, among comparable candidates: those with the
    same role, the same kind of start and the same number of planned epochs.

    After a quarter of the epochs, and again after a half, a candidate continues if it is in the better half of those
    that have reached that epoch.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        kind = _kind(trial)
        rung = max(1, math.ceil(trial.user_attrs[EPOCHS] / 4))
        peers = _Peers(study, kind)
        # Called before the check on STARTUP, since it also records the candidate's value at the rung.
        behind = SuccessiveHalvingPruner(min_resource=rung, reduction_factor=2).prune(cast(Study, peers), trial)
        return behind and len(peers.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) >= STARTUP


def _kind(trial: FrozenTrial) -> tuple[Any, ...]:
    return tuple(trial.user_attrs.get(name) for name in (ROLE, START, EPOCHS))


class _Peers:
    """A view of a study that shows a pruner the trials of one kind only (as Optuna's HyperbandPruner does)."""

    def __init__(self, study: Study, kind: tuple[Any, ...]) -> None:
        self._study, self._kind = study, kind
        self._storage, self.direction = study._storage, study.direction

    def get_trials(self, deepcopy: bool = False, states: Any = None) -> list[FrozenTrial]:
        # Failed trials belong to interrupted runs; their candidates were trained again in other trials.
        wanted = states or (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return [trial for trial in self._study.get_trials(deepcopy, wanted) if _kind(trial) == self._kind]
