"""Finds policies by name: installed plug-ins, and classes in a user's files."""

import ast
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.plugins import fault, importable, installed, load_installed, load_object
from fnet_search.policy.protocol import Policy

GROUP = "fnet_search.policies"
"""The group of entry points; each names a policy class."""


def policy_names() -> list[str]:
    """Names of the installed policies: entry points of GROUP."""
    return installed(GROUP)


def policy_summary(name: str) -> str:
    """The first line of an installed policy's docstring. Parses the source if there is one, because importing a policy
    may take seconds. Raises FnetError as `load_policy`."""
    matching = entry_points(group=GROUP, name=name)
    spec = None
    with suppress(ImportError):  # `load_policy` then reports it
        spec = find_spec(next(iter(matching)).module) if matching else None
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        attribute = next(iter(matching)).attr
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").partition("\n")[0]
    return (type(load_policy(name)).__doc__ or "").strip().partition("\n")[0]


def check_policy_name(name: str) -> None:
    """Raises FnetError for an unknown policy. Imports nothing for an installed one; loads a ``FILE.py:NAME``."""
    if ":" in name:
        load_policy(name)
    elif name not in policy_names():
        raise unknown("policy", name, policy_names())


def load_policy(name: str) -> Policy:
    """The policy of that name: an installed one, or a class or object in a file or module, as in
    ``halving.py:Halving``.

    Raises FnetError for an unknown name, and for code that cannot be loaded or is no policy.
    """
    where, colon, what = name.rpartition(":")
    if colon:
        try:
            with importable(where):
                made = load_object(where, what)
                own: Policy = made() if isinstance(made, type) else made
        except FnetError as error:
            raise FnetError(f"policy {name}: {error}") from None
        except Exception as error:  # code of users may raise anything
            raise FnetError(f"policy {name} cannot be loaded: {fault(error, where)}") from error
        return check_policy(own, name)
    policy: Policy = load_installed(GROUP, "policy", name, make=lambda kind: kind())
    return check_policy(policy, name)


def check_policy(policy: Policy, name: str) -> Policy:
    """Returns `policy`. Raises FnetError for a class, and for an object without a method `suggest`."""
    if isinstance(policy, type):
        raise FnetError(f"{policy.__name__} is a class; give a policy, as in {policy.__name__}()")
    if not callable(getattr(policy, "suggest", None)):
        raise FnetError(f"policy {name!r} has no method suggest(history)")
    return policy
