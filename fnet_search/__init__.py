"""fnet-search: factorize a CNN layer by layer under a MAC budget and a quint8 accuracy floor.

The names of `__all__` are its Python API; each is loaded when it is first used, so that importing the package loads
nothing heavy. The policies are in `fnet_policies`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = {
    "AskTell": "asktell",
    "ClassResult": "metric",
    "Constraints": "policy",
    "Evaluation": "policy",
    "FactorizationPlan": "plan",
    "FnetError": "errors",
    "History": "policy",
    "Machine": "request",
    "Macroarchitecture": "macro",
    "Outcome": "outcome",
    "PolicyDone": "sampler",
    "PolicySampler": "sampler",
    "Probes": "policy",
    "Recipe": "recipe",
    "SamplerPolicy": "sampler_policy",
    "Scheme": "scheme",
    "TimeUp": "deadline",
    "evaluate": "api",
    "load_space": "macro",
    "parse_constraints": "policy",
    "parse_plan": "plan",
    "plan_cost": "plan",
    "probes_for": "probes",
    "report_evaluation": "sampler",
    "search": "api",
    "suggest_plan": "sampler",
}
"""The module that each name is of."""

if TYPE_CHECKING:
    from fnet_search.api import evaluate, search
    from fnet_search.asktell import AskTell
    from fnet_search.deadline import TimeUp
    from fnet_search.errors import FnetError
    from fnet_search.macro import Macroarchitecture, load_space
    from fnet_search.metric import ClassResult
    from fnet_search.outcome import Outcome
    from fnet_search.plan import FactorizationPlan, parse_plan, plan_cost
    from fnet_search.policy import Constraints, Evaluation, History, Probes, parse_constraints
    from fnet_search.probes import probes_for
    from fnet_search.recipe import Recipe
    from fnet_search.request import Machine
    from fnet_search.sampler import PolicyDone, PolicySampler, report_evaluation, suggest_plan
    from fnet_search.sampler_policy import SamplerPolicy
    from fnet_search.scheme import Scheme

__all__ = [
    "AskTell",
    "ClassResult",
    "Constraints",
    "Evaluation",
    "FactorizationPlan",
    "FnetError",
    "History",
    "Machine",
    "Macroarchitecture",
    "Outcome",
    "PolicyDone",
    "PolicySampler",
    "Probes",
    "Recipe",
    "SamplerPolicy",
    "Scheme",
    "TimeUp",
    "evaluate",
    "load_space",
    "parse_constraints",
    "parse_plan",
    "plan_cost",
    "probes_for",
    "report_evaluation",
    "search",
    "suggest_plan",
]


class _Package(ModuleType):
    """`search` and `evaluate` are functions here, also when the modules of these names are loaded: those are found by
    ``from fnet_search.search import ...``."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("search", "evaluate"):
            return getattr(import_module("fnet_search.api"), name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name in _API:
            return getattr(import_module(f"fnet_search.{_API[name]}"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_API})


sys.modules[__name__].__class__ = _Package
