"""fnet-search: factorize a CNN layer by layer under a MAC budget and a quint8 accuracy floor.

The names in `__all__` are the Python API. Each is loaded when it is first used, so that importing the package is fast.
To read the code, start with the search itself, `fnet_search.engine.search_loop`. The policies are in the package
`fnet_policies`.

The rooms, each importing only from those before it:

    base           errors, files, units, TOML tables, plug-ins
    arch           layers, macroarchitectures, plans, costs
    policy         what a policy sees and returns: evaluations, constraints, history; no torch
    training       data, recipes, networks, numerics, training, warm start
    importing      spaces by name, torch modules as macroarchitectures
    quant          quint8: schemes, ranges, folding, the integer simulator, layer statistics
    report         outcome, figures, tables, pages; no torch
    optuna_bridge  trials, samplers, storages, leases; no torch
    deploy         ONNX export, the runtime, audit, latency
    candidates     from a plan to its evaluation; probes; worker processes
    rundir         the run folder
    inspection     analysis, requantization and latency of recorded networks
    engine         the search loop and a whole run
    comparison     comparisons of runs with each other and with the paper
    api            `search` and `evaluate`
    cli            the command line
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fnet_search.base.version import __version__ as __version__

_API = {
    "AskTell": "policy.asktell",
    "ClassResult": "policy.metric",
    "Constraints": "policy.constraints",
    "doublings": "arch.plan",
    "evaluate": "api",
    "Evaluation": "policy.evaluation",
    "FactorizationPlan": "arch.plan",
    "FnetError": "base.errors",
    "from_module": "importing.translation",
    "History": "policy.protocol",
    "load_space": "importing.spaces",
    "Machine": "engine.request",
    "Macroarchitecture": "arch.macroarchitecture",
    "Outcome": "report.outcome",
    "parse_constraints": "policy.constraints",
    "parse_plan": "arch.plan",
    "plan_cost": "arch.costs",
    "PolicyConformance": "policy.conformance",
    "PolicyDone": "optuna_bridge.sampler",
    "PolicySampler": "optuna_bridge.sampler",
    "pretrained": "training.network",
    "probe_network": "candidates.probes",
    "Probes": "policy.evaluation",
    "probes_for": "candidates.probes",
    "Recipe": "training.recipe",
    "report_evaluation": "optuna_bridge.sampler",
    "SamplerPolicy": "optuna_bridge.sampler_policy",
    "Scheme": "quant.scheme",
    "search": "api",
    "suggest_plan": "optuna_bridge.sampler",
    "TimeUp": "training.deadline",
    "uniform": "arch.plan",
}
"""The module that defines each name."""

if TYPE_CHECKING:
    from fnet_search.api import evaluate, search
    from fnet_search.arch.costs import plan_cost
    from fnet_search.arch.macroarchitecture import Macroarchitecture
    from fnet_search.arch.plan import FactorizationPlan, doublings, parse_plan, uniform
    from fnet_search.base.errors import FnetError
    from fnet_search.candidates.probes import probe_network, probes_for
    from fnet_search.engine.request import Machine
    from fnet_search.importing.spaces import load_space
    from fnet_search.importing.translation import from_module
    from fnet_search.optuna_bridge.sampler import PolicyDone, PolicySampler, report_evaluation, suggest_plan
    from fnet_search.optuna_bridge.sampler_policy import SamplerPolicy
    from fnet_search.policy.asktell import AskTell
    from fnet_search.policy.conformance import PolicyConformance
    from fnet_search.policy.constraints import Constraints, parse_constraints
    from fnet_search.policy.evaluation import Evaluation, Probes
    from fnet_search.policy.metric import ClassResult
    from fnet_search.policy.protocol import History
    from fnet_search.quant.scheme import Scheme
    from fnet_search.report.outcome import Outcome
    from fnet_search.training.deadline import TimeUp
    from fnet_search.training.network import pretrained
    from fnet_search.training.recipe import Recipe

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
    "PolicyConformance",
    "PolicyDone",
    "PolicySampler",
    "Probes",
    "Recipe",
    "SamplerPolicy",
    "Scheme",
    "TimeUp",
    "doublings",
    "evaluate",
    "from_module",
    "load_space",
    "parse_constraints",
    "parse_plan",
    "plan_cost",
    "pretrained",
    "probe_network",
    "probes_for",
    "report_evaluation",
    "search",
    "suggest_plan",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(f"fnet_search.{_API[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
