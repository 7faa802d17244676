from __future__ import annotations

from fnet_search import Constraints, PolicySampler, load_space, parse_constraints
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.policy.protocol import Policy
from fnet_search.policy.registry import load_policy


class FnetProgressiveSampler(PolicySampler):
    """Progressive depth factorization (Yun and Wong, 2020) as an Optuna sampler.

    Args:
        space: The CNN whose convolutions are factorized: a space of fnet-search by name or path, or one that is loaded.
        policy: What proposes plans: ``"reverse-pyramid"``, ``"progressive-doubling"``, the name of another policy that
            is installed, or an object with ``suggest(history)``.
        budget: The most multiply-accumulates of the convolutions, as ``"120MMAC"`` or ``"45%"`` of the unfactorized
            network. None: no limit.
        seed: Of policies that draw plans at random.
    """

    def __init__(
        self,
        space: Macroarchitecture | str = "factorizenet",
        policy: Policy | str = "reverse-pyramid",
        *,
        budget: str | int | None = None,
        seed: int = 0,
    ) -> None:
        loaded = load_space(space) if isinstance(space, str) else space
        super().__init__(
            load_policy(policy) if isinstance(policy, str) else policy,
            loaded,
            constraints=Constraints() if budget is None else parse_constraints(loaded, budget),
            seed=seed,
        )
