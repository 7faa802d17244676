"""An evolutionary architecture search whose first generation is what a policy proposes: the reverse pyramids.

python examples/evolution.py
"""

import numpy as np
from bare_loop import SPACE, train

from fnet_policies import ReversePyramid
from fnet_search import AskTell, Evaluation, FactorizationPlan, parse_constraints
from fnet_search.arch.plan import from_indices, indices, label, legal_rates

GENERATIONS, CHILDREN = 2, 3


def child(parents: list[FactorizationPlan], rng: np.random.Generator) -> FactorizationPlan:
    """Each layer from one of two parents; one layer moves to a neighbouring rate."""
    mother, father = (np.array(indices(SPACE, parents[i])) for i in rng.choice(len(parents), 2, replace=False))
    genes = np.where(rng.random(len(mother)) < 0.5, mother, father)
    genes[rng.integers(len(genes))] += rng.choice((-1, 1))
    most = [len(rates) - 1 for rates in legal_rates(SPACE).values()]
    return from_indices(SPACE, tuple(int(gene) for gene in np.clip(genes, 0, most)))


def main() -> None:
    rng = np.random.default_rng(0)
    loop = AskTell(ReversePyramid(), SPACE, parse_constraints(SPACE, "80%"))

    def evaluate(plan: FactorizationPlan, generation: int) -> None:
        told = loop.tell(Evaluation.of(SPACE, plan, quint8_accuracy=train(plan)))
        print(f"generation {generation}: {label(SPACE, plan):8} {100 * told.quint8_accuracy:6.2f} %", flush=True)

    while (plan := loop.ask()) is not None:
        evaluate(plan, 0)
    for generation in range(1, GENERATIONS + 1):
        trained = [one for one in loop.evaluations if one.quint8_accuracy is not None]
        fittest = sorted(trained, key=lambda one: -one.quint8_accuracy)[:4]
        born = 0
        while born < CHILDREN:
            plan = child([one.plan for one in fittest], rng)
            if not loop.history().refusal(plan):  # over the budget, or known
                evaluate(plan, generation)
                born += 1
    print(f"best: {label(SPACE, loop.best.plan)}, {loop.best.cost.conv_macs:,} MACs")


if __name__ == "__main__":
    main()
