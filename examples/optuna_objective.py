"""A plain Optuna study of one's own objective, with a policy as its sampler.

    python examples/optuna_objective.py [STORAGE]

With a storage, as ``sqlite:///study.db``, the same command goes on where the study was stopped.
"""

import sys

import optuna
from bare_loop import SPACE, train

from fnet_policies import ReversePyramid
from fnet_search import PolicySampler, parse_constraints, suggest_plan


def objective(trial: optuna.Trial) -> float:
    plan = suggest_plan(trial, SPACE)  # prunes the trial where the plan is over the budget
    return train(plan)


def main() -> None:
    sampler = PolicySampler(ReversePyramid(), SPACE, constraints=parse_constraints(SPACE, "80%"))
    study = optuna.create_study(
        study_name="pyramids",
        storage=sys.argv[1] if len(sys.argv) > 1 else None,
        load_if_exists=True,
        direction="maximize",
        sampler=sampler,
    )
    study.optimize(objective)  # stops when the policy is done
    for trial in study.trials:
        plan, reason = trial.user_attrs.get("label", ""), trial.user_attrs.get("reason", "")
        print(reason or f"{trial.number}: {plan:8} {trial.state.name:8} {100 * trial.value:6.2f} %")
    print(f"best: {study.best_trial.user_attrs['label']}")


if __name__ == "__main__":
    main()
