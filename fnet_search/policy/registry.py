"""Policies by name: installed plug-ins, and classes of a user's own files."""

from importlib.metadata import entry_points

from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.plugins import fault, importable, load_object
from fnet_search.policy.protocol import Policy


def policy_names() -> list[str]:
    """Names of the installed policies: entry points of the group ``fnet_search.policies``."""
    return sorted(entry_points(group="fnet_search.policies").names)


def load_policy(name: str) -> Policy:
    """The installed policy of that name, ours or a third party's; or one of a file or module, as in
    ``halving.py:Halving``: a class, or an object.

    Raises FnetError for an unknown name or a plug-in that cannot be loaded.
    """
    where, colon, what = name.rpartition(":")
    if colon:
        try:
            with importable(where):
                made = load_object(where, what)
                own: Policy = made() if isinstance(made, type) else made
        except FnetError as error:
            raise FnetError(f"policy {name}: {error}") from None
        except Exception as error:  # a user's code raises what it likes
            raise FnetError(f"policy {name} cannot be loaded: {fault(error, where)}") from error
        return check_policy(own, name)
    found = entry_points(group="fnet_search.policies", name=name)
    if not found:
        raise unknown("policy", name, policy_names())
    entry = next(iter(found))
    try:
        policy: Policy = entry.load()()
    except Exception as error:
        raise FnetError(f"policy {name!r} cannot be loaded: {fault(error, entry.module)}") from error
    return check_policy(policy, name)


def check_policy(policy: Policy, name: str) -> Policy:
    """The policy, if it is one. Raises FnetError for a class, and for what suggests nothing."""
    if isinstance(policy, type):
        raise FnetError(f"{policy.__name__} is a class; give a policy, as in {policy.__name__}()")
    if not callable(getattr(policy, "suggest", None)):
        raise FnetError(f"policy {name!r} has no method suggest(history)")
    return policy
