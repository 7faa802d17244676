"""The policies that ship with fnet-search, each a plug-in like those of third parties.

One file per policy, registered by name as an entry point of the group ``fnet_search.policies``. A policy is a class
made without arguments, with a method ``suggest(history)`` that is a pure function of the history: start from `random`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fnet_policies.fisher import Fisher
    from fnet_policies.greedy import Greedy
    from fnet_policies.layer_guided import LayerGuided
    from fnet_policies.nsga2 import NSGA2
    from fnet_policies.progressive_doubling import ProgressiveDoubling
    from fnet_policies.random import Random
    from fnet_policies.reverse_pyramid import ReversePyramid
    from fnet_policies.tpe import TPE

__all__ = ["NSGA2", "TPE", "Fisher", "Greedy", "LayerGuided", "ProgressiveDoubling", "Random", "ReversePyramid"]

_MODULES = {
    "NSGA2": "nsga2",
    "TPE": "tpe",
    "Fisher": "fisher",
    "Greedy": "greedy",
    "LayerGuided": "layer_guided",
    "ProgressiveDoubling": "progressive_doubling",
    "Random": "random",
    "ReversePyramid": "reverse_pyramid",
}


def __getattr__(name: str) -> Any:
    """Imports a policy when it is first used: some need Optuna's samplers or scikit-learn."""
    if name in _MODULES:
        return getattr(import_module(f"fnet_policies.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
