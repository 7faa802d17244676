"""Claim: the prediction of `layer-guided` ranks mixed plans of one MAC budget by their trained quint8 accuracy with at
least 0.8 of the rank correlation that the same plans, trained with another seed, have with them.

    python benchmarks/ranking.py imagefolder:PATH --out FOLDER --minutes 120    # and again: it goes on

In the folder of policies.py, from the same reference and probes. Plans are drawn uniformly from those within 10 % below
the budget. Spearman correlations with the quint8 accuracy on test images, with 95 % bootstrap intervals over plans.
"""

import argparse
import csv
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
from machine import machine
from plans import Measured, Study, arguments, line, measure, open_study, probes_of, read, references
from scipy.stats import spearmanr

from fnet_policies import LayerGuided
from fnet_policies.layer_guided import Model
from fnet_search.arch.costs import all_conv_macs, plan_cost
from fnet_search.arch.plan import FactorizationPlan, from_indices, legal_rates, regular
from fnet_search.base.units import parse_budget
from fnet_search.candidates.processes import environment
from fnet_search.candidates.worker_count import cores
from fnet_search.policy.protocol import History

LEARNT_FROM = (3, 6, 12)
"""Evaluations of other plans that predictions are learnt from, beside none and all but the plan itself."""
DRAWS = 20
"""Of such evaluations, for each of these numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    study, deadline = open_study(options), time.monotonic() + 60 * options.minutes
    plans = drawn(study, options)
    seeds = (options.seed, options.seed + 100)
    jobs = [(seed, plan) for plan in plans for seed in seeds]
    with environment(study.numerics.threads), ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        if not references(study, [options.seed], pool, deadline):
            return
        waiting = [job for job in jobs if read(study.folder(*job, options.seed)) is None]
        for start in range(0, len(waiting), cores()):
            if time.monotonic() > deadline:
                print("not done yet: the same command goes on")
                return
            part = waiting[start : start + cores()]
            running = [pool.submit(measure, study, *job, options.seed) for job in part]
            for (seed, plan), done in zip(part, running, strict=True):
                done.result()
                print(line(study, seed, plan, _known(study, seed, plan, options.seed)), flush=True)
    first, second = ([_known(study, seed, plan, options.seed) for plan in plans] for seed in seeds)
    report(study, first, second, options)


def _known(study: Study, seed: int, plan: FactorizationPlan, parent: int) -> Measured:
    measured = read(study.folder(seed, plan, parent))
    assert measured is not None
    return measured


def drawn(study: Study, options: argparse.Namespace) -> list[FactorizationPlan]:
    """Different ones, each as likely as any other."""
    budget = parse_budget(options.budget, plan_cost(study.space, regular(study.space)).conv_macs)
    macs = all_conv_macs(study.space)
    near = np.argwhere((macs <= budget) & (macs >= 0.9 * budget))
    chosen = np.random.default_rng(0).choice(len(near), options.plans, replace=False)
    return [from_indices(study.space, tuple(map(int, near[place]))) for place in chosen]


def report(study: Study, first: list[Measured], second: list[Measured], options: argparse.Namespace) -> None:
    """The table, and ranking.csv."""
    reference = read(study.start(options.seed).folder)
    assert reference is not None
    probes = probes_of(study, options.seed)
    evaluations = [replace(one.evaluation, number=place) for place, one in enumerate(first, 1)]
    plans = [one.plan for one in evaluations]

    def predicted(policy: LayerGuided, known: list[int], asked: list[int]) -> np.ndarray:
        """Of the plans at these places, with what those at `known` say."""
        past = (reference.evaluation, *(evaluations[place] for place in known))
        history = History(study.space, evaluations=past, number=len(past), seed=options.seed, probes=probes)
        return Model.of(policy, history).predict([plans[place] for place in asked])[0][:, 0]

    every, legal = list(range(len(plans))), legal_rates(study.space)
    truth, again = (np.array([one.test for one in part]) for part in (first, second))

    def left_out(policy: LayerGuided) -> np.ndarray:
        return np.array([predicted(policy, [p for p in every if p != place], [place])[0] for place in every])

    fisher = probes.increase(study.space, lambda one: one.fisher or 0.0)
    model = Model.of(LayerGuided(), History(study.space, evaluations=(reference.evaluation,), probes=probes))
    scores = {
        "another seed (the ceiling)": again,
        "layer-guided, probes only": predicted(LayerGuided(), [], every),
        "layer-guided, all other plans": left_out(LayerGuided()),
        "  no statistics": left_out(LayerGuided(statistics=False)),
        "  no probes": left_out(LayerGuided(by_probes=False)),
        "quint8 noise of the probes": -model.inputs(plans)[:, 1],
        "fisher": np.array([sum(fisher[layer][legal[layer].index(rate)] for layer, rate in p.rates) for p in plans]),
        "MACs": np.array([float(one.cost.conv_macs) for one in evaluations]),
    }
    lines = [
        f"{len(plans)} plans within 10 % below {options.budget}, seed {options.seed}: Spearman correlation with the"
    ]
    lines[0] += f" quint8 accuracy on test images ({100 * truth.min():.2f} to {100 * truth.max():.2f} %)"
    for name, score in scores.items():
        lines.append(f"{name:32}{spearmanr(score, truth).statistic:6.2f}  ({_interval(score, truth)})")
    rng = np.random.default_rng(0)
    for count in [count for count in LEARNT_FROM if count < len(plans) - 2]:
        found = []
        for _ in range(DRAWS):
            known = rng.choice(len(plans), count, replace=False).tolist()
            asked = [place for place in every if place not in known]
            found.append(spearmanr(predicted(LayerGuided(), known, asked), truth[asked]).statistic)
        spread = f"{np.quantile(found, 0.25):.2f} to {np.quantile(found, 0.75):.2f}, {DRAWS} draws"
        lines.append(f"{f'layer-guided, {count} other plans':32}{np.mean(found):6.2f}  ({spread})")
    text = "\n".join(lines)
    print(text)
    (study.out / "ranking.txt").write_text(f"{machine()}\n{study.numerics}\n{text}\n")
    with (study.out / "ranking.csv").open("w", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(
            ["plan", "conv_macs", "test_quint8", "other_seed_test_quint8", *(name.strip() for name in scores)]
        )
        for place, plan in enumerate(plans):
            rates = "-".join(str(rate) for _, rate in plan.rates)
            row = [f"{score[place]:.6g}" for score in scores.values()]
            table.writerow([rates, evaluations[place].cost.conv_macs, truth[place], again[place], *row])


def _interval(score: np.ndarray, truth: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    picks = rng.integers(len(truth), size=(2000, len(truth)))
    found = [spearmanr(score[pick], truth[pick]).statistic for pick in picks]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
