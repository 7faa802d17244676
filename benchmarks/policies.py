"""Claim: under a MAC budget, `layer-guided` finds a plan that is not below the best that any policy found, with at most
a third of the trained images of the next best policy.

    python benchmarks/policies.py imagefolder:PATH --out FOLDER
    python benchmarks/policies.py imagefolder:PATH --out FOLDER --minutes 120    # and again: it goes on

Every policy searches alone, one plan after the other, from the same trained reference and probes of a seed. A plan that
several policies suggest is trained once for a seed. Candidates are compared on validation images; what the best of
them reaches on the test images is only looked at afterwards. Writes evaluations.csv, searches.csv, table.txt and
policies.png to FOLDER.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
from machine import machine
from plans import Measured, Study, arguments, line, measure, open_study, probes_of, read, references

from fnet_policies import NSGA2, TPE, Fisher, Greedy, LayerGuided, ProgressiveDoubling, Random, ReversePyramid
from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import FactorizationPlan, label, regular
from fnet_search.base.units import parse_budget
from fnet_search.candidates.processes import environment
from fnet_search.candidates.worker_count import cores
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.protocol import History, Policy
from fnet_search.report.style import COLOURS, GREY, MARKERS, new_figure, save_png, style

POLICIES: dict[str, Policy] = {
    "layer-guided": LayerGuided(),
    "  no statistics": LayerGuided(statistics=False),
    "  no probes": LayerGuided(by_probes=False),
    "  no learning": LayerGuided(learning=False),
    "greedy": Greedy(),
    "fisher": Fisher(),
    "reverse-pyramid": ReversePyramid(),
    "progressive-doubling": ProgressiveDoubling(),
    "random": Random(),
    "tpe": TPE(),
    "nsga2": NSGA2(),
}
RIVALS = [name for name in POLICIES if name.strip() == name and name != "layer-guided"]


@dataclass(frozen=True)
class Search:
    """One policy, one budget, one seed: a function of what is measured."""

    study: Study
    seed: int
    budget: str
    policy: str
    trials: int

    def walk(self) -> Iterator[FactorizationPlan | Measured]:
        """The trained candidates, in order; a plan that is not trained yet is given again until it is."""
        study, space = self.study, self.study.space
        constraints = Constraints(conv_macs=parse_budget(self.budget, plan_cost(space, regular(space)).conv_macs))
        reference = read(study.start(self.seed).folder)
        assert reference is not None
        past, trained = [reference.evaluation], 0
        probes = probes_of(study, self.seed)
        while trained < self.trials:
            history = History(space, constraints, tuple(past), (), len(past), self.seed, probes)
            plan = POLICIES[self.policy].suggest(history)
            if plan is None:
                return
            if reason := history.refusal(plan):
                past.append(Evaluation(len(past), plan, plan_cost(space, plan), "refused", reason))
                continue
            while (measured := read(study.folder(self.seed, plan, self.seed))) is None:
                yield plan
            past.append(replace(measured.evaluation, number=len(past)))
            trained += 1
            yield measured


def main() -> None:
    options = _options()
    study = open_study(options)
    print(f"{machine()}\n{study.numerics}", flush=True)
    searches = [
        Search(study, seed, budget, policy, options.trials)
        for seed in options.seeds
        for budget in options.budgets
        for policy in options.policies
    ]
    deadline = time.monotonic() + 60 * options.minutes
    with environment(study.numerics.threads), ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        done = references(study, options.seeds, pool, deadline) and _searches(study, searches, pool, deadline)
    if not done:
        print("not done yet: the same command goes on")
        return
    report(study, searches, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--budgets", nargs="+", default=["45%", "25%"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    return parser.parse_args()


def _searches(study: Study, searches: list[Search], pool: ProcessPoolExecutor, deadline: float) -> bool:
    """Trains what the searches ask for, until all are done; whether they are."""
    running: dict[Future[None], tuple[int, FactorizationPlan]] = {}
    began, trained = time.monotonic(), 0
    walks = {search: search.walk() for search in searches}
    wanted: dict[Search, FactorizationPlan] = {}
    while walks or running:
        for search, walk in list(walks.items()):
            if len(running) >= 2 * cores() or time.monotonic() > deadline:
                break
            if search in wanted and (search.seed, wanted[search]) in running.values():
                continue
            plan = next((one for one in walk if isinstance(one, FactorizationPlan)), None)
            if plan is None:
                del walks[search]
                continue
            wanted[search] = plan
            if (search.seed, plan) not in running.values():
                running[pool.submit(measure, study, search.seed, plan, search.seed)] = search.seed, plan
        if not running:
            return not walks
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            done.result()
            seed, plan = running.pop(done)
            trained += 1
            measured = read(study.folder(seed, plan, seed))
            assert measured is not None
            each = (time.monotonic() - began) / trained
            print(f"{line(study, seed, plan, measured)} {each:.0f} s each, {len(walks)} searches left", flush=True)
    return True


@dataclass(frozen=True)
class Curve:
    """A finished search: after each candidate the images that all candidates so far were trained on, and the best of
    them by validation."""

    search: Search
    images: list[int]
    best: list[Measured]

    @staticmethod
    def of(search: Search) -> "Curve":
        found = [one for one in search.walk() if isinstance(one, Measured)]
        images = np.cumsum([one.evaluation.trained_images for one in found]).tolist()
        ranked = [max(found[: end + 1], key=_by_validation) for end in range(len(found))]
        return Curve(search, images, ranked)

    @property
    def needed(self) -> int:
        """Images until the last best one was found."""
        return self.images[next(place for place, one in enumerate(self.best) if one is self.best[-1])]


def _by_validation(one: Measured) -> tuple[float, int]:
    return one.evaluation.quint8_accuracy or 0.0, -one.evaluation.cost.conv_macs


def report(study: Study, searches: list[Search], options: argparse.Namespace) -> None:
    """Tables, CSV files and the picture, from what is measured."""
    curves = {(one.policy, one.budget, one.seed): Curve.of(one) for one in searches}
    lines = [_reference_line(study, options)]
    for budget in options.budgets:
        lines += _table(study, curves, budget, options)
    text = "\n".join(lines)
    print(text)
    (study.out / "table.txt").write_text(f"{machine()}\n{study.numerics}\n{text}\n")
    _write_csv(study, curves)
    save_png(_picture(study, curves, options), study.out / "policies.png")


def _reference_line(study: Study, options: argparse.Namespace) -> str:
    found = [read(study.start(seed).folder) for seed in options.seeds]
    tests = ", ".join(f"{100 * one.test:.2f}" for one in found if one is not None)
    images = found[0].evaluation.trained_images if found[0] is not None else 0
    return f"reference: {images:,} images trained on, quint8 on test images {tests} % (seeds {options.seeds})"


def _table(
    study: Study, curves: dict[tuple[str, str, int], Curve], budget: str, options: argparse.Namespace
) -> list[str]:
    """A line a policy; differences to the best plan that any policy of the table found are paired by test images."""
    policies, seeds = options.policies, options.seeds
    best = {s: max((curves[p, budget, s].best[-1] for p in policies), key=_by_validation) for s in seeds}
    head = f"{'policy':22}{'trained':>9}{'images':>10}{'to best':>10}{'test quint8 %':>15}{'less best (95 %)':>26}"
    lines = [f"\nbudget {budget}, {len(seeds)} seeds; best by validation of all: ", head]
    lines[0] += ", ".join(f"{label(study.space, one.evaluation.plan)} {100 * one.test:.2f} %" for one in best.values())
    for policy in policies:
        own = [curves[policy, budget, seed] for seed in seeds]
        tests = [100 * one.best[-1].test for one in own]
        pairs = np.concatenate(
            [one.best[-1].test_hits.astype(float) - best[seed].test_hits for one, seed in zip(own, seeds, strict=True)]
        )
        mean, half = 100 * pairs.mean(), 196 * pairs.std() / math.sqrt(len(pairs))
        trained, images, needed = (
            np.mean(values)
            for values in ([len(one.best) for one in own], [one.images[-1] for one in own], [one.needed for one in own])
        )
        interval = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
        shown = f"{np.mean(tests):.2f} +-{np.std(tests):.2f}"
        lines.append(f"{policy:22}{trained:9.1f}{images:10,.0f}{needed:10,.0f}{shown:>15}{interval:>26}")
    return lines


def _write_csv(study: Study, curves: dict[tuple[str, str, int], Curve]) -> None:
    with (study.out / "searches.csv").open("w", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        names = ("zero_shot", "fp32", "quint8", "test_quint8")
        table.writerow(["policy", "budget", "seed", "candidate", "plan", "conv_macs", "trained_images", *names])
        for (policy, budget, seed), curve in curves.items():
            for place, one in enumerate((m for m in curve.search.walk() if isinstance(m, Measured)), 1):
                it = one.evaluation
                accuracies = [it.zero_shot_accuracy, it.fp32_accuracy, it.quint8_accuracy, one.test]
                rates = "-".join(str(rate) for _, rate in it.plan.rates)
                shown = ["" if value is None else f"{value:.4f}" for value in accuracies]
                row = [policy.strip(), budget, seed, place, rates, it.cost.conv_macs, it.trained_images, *shown]
                table.writerow(row)


def _picture(study: Study, curves: dict[tuple[str, str, int], Curve], options: argparse.Namespace):
    """Test accuracy of the best so far, mean over seeds, against images. Rivals have colours, ablations are dotted."""
    figure = new_figure(3.3 * len(options.budgets) + 0.7)
    panels = figure.subplots(len(options.budgets), 1, squeeze=False)[:, 0]
    rivals = [policy for policy in options.policies if policy in RIVALS]
    for axes, budget in zip(panels, options.budgets, strict=True):
        style(axes)
        for place, policy in enumerate(options.policies):
            own = [curves[policy, budget, seed] for seed in options.seeds]
            steps = sorted({images for one in own for images in one.images})
            means = []
            for images in steps:
                reached = [one.best[max(0, int(np.searchsorted(one.images, images, "right")) - 1)] for one in own]
                means.append(100 * np.mean([one.test for one in reached]))
            if policy in RIVALS:
                look = {"color": COLOURS[1:][rivals.index(policy)], "linewidth": 1.2}
            elif policy.startswith(" "):
                look = {"color": GREY, "linewidth": 1.2, "linestyle": ":"}
            else:
                look = {"color": COLOURS[0], "linewidth": 3.0}
            thousands, front = np.array(steps) / 1000, 5 if policy == "layer-guided" else 3
            axes.plot(thousands, means, drawstyle="steps-post", zorder=front - 1, **look)
            marker, colour = MARKERS[place % len(MARKERS)], look["color"]
            axes.plot(thousands[-1], means[-1], marker, markersize=5.5, color=colour, zorder=front)
            axes.plot([], [], marker=marker, markersize=5.5, label=policy.strip(), **look)
        axes.set_title(f"budget {budget}", fontsize=9, loc="left")
        axes.set_ylabel("quint8 accuracy of the best so far,\ntest images (%)", fontsize=8)
    axes.set_xlabel("images that candidates were trained on (thousands; the reference is not counted)", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main()
