from dataclasses import replace

from fnet_policies import NSGA2, Random
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, indices, uniform
from fnet_search.importing.spaces import load_space
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.protocol import History
from tests.support.evaluations import trained

SPACE = load_space("factorizenet")
CEILING = Constraints(conv_macs=120_000_000)


def grown(policy: NSGA2, trials: int, accuracy: float = 0.5) -> History:
    """A history of suggestions; what a plan reaches falls with the index of its first layer's rate."""
    history = History(SPACE, CEILING, seed=3)
    for number in range(trials):
        history = replace(history, number=number)
        plan = policy.suggest(history)
        assert plan is not None
        reached = accuracy + 0.4 - 0.05 * indices(SPACE, plan)[0]
        one = trained(SPACE, plan, number, 0.95, reached, layers=False)
        history = replace(history, evaluations=(*history.evaluations, one))
    return replace(history, number=trials)


def plans(history: History) -> list[FactorizationPlan]:
    return [one.plan for one in history.evaluations]


def test_the_first_generation_is_random_search() -> None:
    history = grown(NSGA2(), 8)
    for number, plan in enumerate(plans(history)):
        before = replace(history, evaluations=history.evaluations[:number], number=number)
        assert plan == Random().suggest(before)


def test_children_are_crossed_from_the_better_parents() -> None:
    history = grown(NSGA2(), 72)
    found = plans(history)
    assert len(set(found)) == 72
    assert all(not CEILING.refusal(plan_cost(SPACE, plan)) for plan in found)
    first, later = ([indices(SPACE, plan)[0] for plan in part] for part in (found[:8], found[-24:]))
    assert sum(later) / len(later) < sum(first) / len(first) - 1
    parents = {indices(SPACE, plan)[layer] for plan in found[:8] for layer in [1]}
    children = [indices(SPACE, plan)[1] for plan in found[8:16]]
    assert sum(child in parents for child in children) >= 6  # the others are mutations


def test_what_misses_a_constraint_is_no_parent() -> None:
    constraints = Constraints(conv_macs=120_000_000, min_quint8=0.6)
    past = [replace(one, number=number) for number, one in enumerate(grown(NSGA2(), 16).evaluations)]
    # The second half meets the floor, whatever it is like; the first is better in nothing but rates.
    reached = [replace(one, quint8_accuracy=0.5 if one.number < 8 else 0.7) for one in past]
    history = History(SPACE, constraints, tuple(reached), number=16)
    good, bad = ({indices(SPACE, one.plan)[4:] for one in part} for part in (reached[8:], reached[:8]))
    children = [NSGA2().suggest(replace(history, seed=seed)) for seed in range(40)]
    ends = [indices(SPACE, plan)[4:] for plan in children if plan is not None]

    def shared(end: tuple[int, ...], parents: set[tuple[int, ...]]) -> int:
        return max(sum(a == b for a, b in zip(end, parent, strict=True)) for parent in parents)

    assert sum(shared(end, good) for end in ends) > sum(shared(end, bad - good) for end in ends)


def test_small_spaces_are_used_up() -> None:
    tiny = load_space("tiny")
    constraints = Constraints(conv_macs=plan_cost(tiny, uniform(tiny, 8)).conv_macs)
    history, seen = History(tiny, constraints), 0
    while (plan := NSGA2(startup=2).suggest(replace(history, number=seen))) is not None:
        one = trained(tiny, plan, seen, 0.9, 0.8, layers=False)
        history, seen = replace(history, evaluations=(*history.evaluations, one)), seen + 1
    assert seen == len(history.seen) > 4
