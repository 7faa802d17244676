"""A pytest suite that checks the policy protocol, to be subclassed by a policy's author, and synthetic measurements.

from fnet_search import PolicyConformance

class TestHalving(PolicyConformance):
    policy = Halving
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, TypeVar

import numpy as np

from fnet_search.arch.costs import layer_cost, plan_cost, smallest_conv_macs
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Conv, Weighted
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, check_plan, indices, legal_rates, make_plan, regular
from fnet_search.arch.space_file import read_space
from fnet_search.policy.asktell import AskTell
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats, Probe, Probes
from fnet_search.policy.metric import ClassResult
from fnet_search.policy.protocol import History, Policy


class PolicyConformance:
    """Subclass it, set `policy`, and let pytest collect it.

    A policy is a function of the past (docs/policy-protocol.md). `AskTell`, a real host, asks it on shipped spaces;
    only the measurements of trainings are made up, as a function of the plan.
    """

    policy: ClassVar[Callable[[], Policy]]
    """Called without arguments, like a plug-in: a class that can be imported by its name."""
    space: ClassVar[str] = "tiny"
    """A shipped space with few plans: one test searches until none is left."""
    trials: ClassVar[int] = 12
    """Number of suggestions checked per test."""

    def test_every_suggestion_is_a_plan_of_the_space(self) -> None:
        for name in (self.space, "factorizenet"):
            loop = self._loop(read_space(name))
            for plan in _asked(loop, self.trials):
                check_plan(loop.space, plan)
                loop.tell(made_up_evaluation(loop.space, plan))
            assert loop.evaluations, "it suggests no plan at all"

    def test_it_is_a_function_of_the_history(self) -> None:
        """The same history gives the same plan, from a new object too, and global random generators stay untouched."""
        for history, plan in self._steps():
            asked = type(self).policy()
            random.seed(0)
            np.random.seed(0)
            before = random.getstate(), np.random.random(3).tolist()
            random.seed(0)
            np.random.seed(0)
            assert asked.suggest(history) == asked.suggest(history) == plan, f"suggestion {history.number}"
            after = random.getstate(), np.random.random(3).tolist()
            assert before == after, "take random numbers from history.rng, not from global generators"

    def test_it_keeps_no_state(self) -> None:
        """The order of the histories that it is asked about changes no answer."""
        steps, asked = self._steps(), type(self).policy()
        for history, plan in [*steps[::-1], *steps]:
            assert asked.suggest(history) == plan, f"suggestion {history.number}"

    def test_it_resumes_in_another_process(self) -> None:
        """A new process, with other string hashes, suggests the same from the recorded evaluations."""
        steps = self._steps()
        elsewhere = self._elsewhere([history for history, _ in steps])
        for (history, plan), other in zip(steps, elsewhere, strict=True):
            assert other == str(plan), f"suggestion {history.number}: {plan} here, {other} in another process"

    def test_workers_get_different_plans(self) -> None:
        """Three plans are out at a time; None means that it waits for one of them."""
        loop = self._loop()
        out, begun = list[FactorizationPlan](), list[FactorizationPlan]()
        while len(begun) < self.trials:
            plan = loop.ask()
            if plan is not None:
                out.append(plan)
                begun.append(plan)
            elif not out:
                break
            if plan is None or len(out) == 3:
                loop.tell(made_up_evaluation(loop.space, out.pop(0)))
        assert len(set(begun)) == len(begun)
        repeats = [evaluation for evaluation in loop.evaluations if evaluation.reason.startswith("repeats")]
        assert not repeats, f"{len(repeats)} repeated plans; skip the plans in history.seen"

    def test_nothing_above_the_ceilings_is_trained(self) -> None:
        """It may suggest such plans, which are refused, but not for ever."""
        space = read_space(self.space)
        smallest = smallest_conv_macs(space)
        for budget in (smallest, (smallest + plan_cost(space, regular(space)).conv_macs) // 2):
            loop = self._loop(constraints=Constraints(conv_macs=budget))
            for plan in _asked(loop, self.trials):
                assert plan_cost(space, plan).conv_macs <= budget
                loop.tell(made_up_evaluation(space, plan))

    def test_it_ends(self) -> None:
        """It ends after every plan of the space at the latest, and stays at its end."""
        loop = self._loop()
        every = prod(map(len, legal_rates(loop.space).values()))
        for plan in _asked(loop, every + 1):
            loop.tell(made_up_evaluation(loop.space, plan))
        assert loop.ask() is None
        assert loop.ask() is None
        assert len(loop.evaluations) <= every

    def test_a_seed_is_a_search(self) -> None:
        """One seed always gives the same search."""
        for seed in (0, 1):
            first, second = (self._steps(seed) for _ in range(2))
            assert [plan for _, plan in first] == [plan for _, plan in second], f"seed {seed}"

    def test_it_can_do_with_what_went_wrong(self) -> None:
        """Failed, pruned, infeasible and incomplete evaluations do no harm."""
        space = read_space(self.space)
        limits = Constraints(plan_cost(space, regular(space)).conv_macs, min_quint8=0.99, max_drop=0.01)
        loop = self._loop(constraints=limits)
        for number, plan in enumerate(_asked(loop, self.trials)):
            good = made_up_evaluation(space, plan)
            bad = (
                replace(good, state="failed", reason="it cannot be quantized", quint8_accuracy=None),
                replace(
                    good, state="failed", reason="loss is NaN", fp32_accuracy=None, quint8_accuracy=None, layers=()
                ),
                replace(good, state="pruned", reason="behind", quint8_accuracy=None, accuracies=(0.5,), layers=()),
                replace(good, fp32_accuracy=None, layers=()),
                replace(good, quint8_accuracy=0.0),
                good,
            )
            loop.tell(bad[number % len(bad)])
            assert type(self).policy().suggest(loop.history()) == loop.policy.suggest(loop.history())

    def test_it_searches_by_the_metric(self) -> None:
        """It reads `Evaluation.scores`: equal scores under another metric, beside misleading accuracies, change
        nothing."""
        for history, _ in self._steps():
            by_class = _with(history, _by_class)
            limits = replace(history.constraints, metric="balanced-accuracy")
            balanced = replace(_with(by_class, _misleading), constraints=limits)
            asked = type(self).policy()
            assert asked.suggest(balanced) == asked.suggest(by_class), f"suggestion {history.number}"

    def _loop(
        self, space: Macroarchitecture | None = None, constraints: Constraints | None = None, seed: int = 0
    ) -> AskTell:
        space = space or read_space(self.space)
        return AskTell(type(self).policy(), space, constraints or Constraints(), seed, made_up_probes(space))

    def _steps(self, seed: int = 0) -> list[tuple[History, FactorizationPlan | None]]:
        """A search under a budget: the history at each suggestion, and the suggested plan."""
        space = read_space(self.space)
        half = Constraints(conv_macs=(smallest_conv_macs(space) + plan_cost(space, regular(space)).conv_macs) // 2)
        loop, steps = self._loop(constraints=half, seed=seed), list[tuple[History, FactorizationPlan | None]]()
        while len(steps) < self.trials and (plan := loop.ask()) is not None:
            asked_with = replace(loop.history(), running=(), number=loop.history().number - 1)
            steps.append((asked_with, plan))
            loop.tell(made_up_evaluation(space, plan))
        return [*steps, (loop.history(), None)] if plan is None else steps

    def _elsewhere(self, histories: list[History]) -> list[str]:
        """The suggestions that a new policy in a new process makes for these histories, as text."""
        made, last = type(self).policy, histories[-1]
        name = getattr(made, "__name__", "")
        imported = getattr(sys.modules.get(made.__module__), name, None)
        assert imported is made, f"{made} must be a class that can be imported from {made.__module__}, as a plug-in is"
        code = (
            f"import json, sys; from {made.__module__} import {name}\n"
            "from fnet_search.arch.space_file import read_space\n"
            "from fnet_search.policy.conformance import made_up_probes\n"
            "from fnet_search import Constraints, Evaluation, History\n"
            f"space, past = read_space({self.space!r}), tuple(map(Evaluation.from_json, json.load(sys.stdin)))\n"
            f"for known, number in {[(len(history.evaluations), history.number) for history in histories]}:\n"
            f"    print({name}().suggest(History(space, {last.constraints!r}, past[:known], number=number, "
            f"seed={last.seed}, probes=made_up_probes(space))))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps([evaluation.to_json() for evaluation in last.evaluations]),
            env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


Measured = TypeVar("Measured", Evaluation, Probe)


def _with(history: History, changed: Callable[[Any], Any]) -> History:
    """The history with every measurement changed."""
    assert history.probes is not None
    changes = tuple(map(changed, history.probes.changes))
    probes = replace(history.probes, unchanged=changed(history.probes.unchanged), changes=changes)
    return replace(history, evaluations=tuple(map(changed, history.evaluations)), probes=probes)


def _by_class(measured: Measured) -> Measured:
    """With results for two equally large classes with the same accuracy."""
    accuracies = measured.fp32_accuracy, measured.quint8_accuracy
    fp32, quint8 = (round(1000 * (accuracy or 0.0)) for accuracy in accuracies)
    classes = (ClassResult(1000, fp32, quint8),) * 2
    return replace(measured, images=2000, fp32_accuracy=fp32 / 1000, quint8_accuracy=quint8 / 1000, classes=classes)


def _misleading(measured: Measured) -> Measured:
    """With accuracies that contradict the results by class."""
    return replace(measured, fp32_accuracy=0.0, quint8_accuracy=1 - (measured.quint8_accuracy or 0.0))


def _asked(loop: AskTell, trials: int) -> Iterable[FactorizationPlan]:
    """Up to `trials` plans, until the policy returns None."""
    for _ in range(trials):
        plan = loop.ask()
        if plan is None:
            return
        yield plan


def made_up_evaluation(space: Macroarchitecture, plan: FactorizationPlan) -> Evaluation:
    """A plausible evaluation: factorizing a layer costs accuracy, in the middle layers most."""
    deepest = np.array([len(rates) - 1 for rates in legal_rates(space).values()])
    weights = np.hanning(len(deepest) + 2)[1:-1]
    loss = float((weights * np.array(indices(space, plan)) / np.maximum(deepest, 1)).sum() / weights.sum())
    return Evaluation.of(
        space,
        plan,
        scheme="percentile:1",
        epochs=1,
        trained_images=1_000,
        images=500,
        fp32_accuracy=0.95 - 0.1 * loss,
        quint8_accuracy=0.9 - 0.2 * loss,
        layers=made_up_layers(space, plan),
    )


def made_up_layers(space: Macroarchitecture, plan: FactorizationPlan, seed: int = 0) -> tuple[LayerStats, ...]:
    """Plausible statistics of every convolution and dense layer of a plan's network."""
    rng = np.random.default_rng((seed, *[rate for _, rate in plan.rates]))
    network = factorize(space, plan)
    layers = []
    for node in network.order:
        if not isinstance(node.layer, Weighted):
            continue
        cost = layer_cost(node, network.input_shapes(node))
        width = rng.lognormal(0, 0.4) * (3 if isinstance(node.layer, Conv) and node.layer.groups > 1 else 1)
        linear = node.name == network.output
        layers.append(
            LayerStats(
                layer=node.name,
                kind=node.layer.kind,
                macs=cost.total_macs,
                params=cost.params,
                weight_min=-0.3 * width,
                weight_max=0.35 * width,
                weight_precision=float(rng.uniform(0.4, 0.9)),
                folded_min=-0.8 * width**2,
                folded_max=0.9 * width**2,
                folded_precision=float(rng.uniform(0.1, 0.7)),
                activation_min=-9.5 if linear else 0.0,
                activation_max=float(rng.uniform(1.5, 9)),
                activation_precision=float(rng.uniform(0.3, 0.8)),
                weight_sqnr_db=float(rng.uniform(28, 42)),
                activation_sqnr_db=float(rng.uniform(20, 38)),
                accumulated_sqnr_db=float(rng.uniform(8, 20)),
                sparsity=0.0 if linear else float(rng.uniform(0.3, 0.8)),
                dead_weight_channels=0,
                dead_activation_channels=int(rng.integers(0, 3)),
            )
        )
    return tuple(layers)


def made_up_probes(
    space: Macroarchitecture, seed: int = 0, noise: Mapping[str, Sequence[float]] | None = None
) -> Probes:
    """Plausible probes of a regular network: noise grows with the rate.

    `noise` gives, per layer and legal rate, how much more noise the quint8 logits have than without the change; None:
    random. All other numbers follow from it.
    """
    rng, plan, changes = np.random.default_rng(seed), regular(space), []
    unchanged = Probe("", 1, plan_cost(space, plan).conv_macs, 256, 0.6, 0.9, 0.8, 0.75, None, 7.0, (), 1.0)
    for layer, rates in legal_rates(space).items():
        grown = np.cumsum(rng.uniform(0.001, 0.01, len(rates)))
        for index, rate in enumerate(rates[1:], 1):
            more = float(grown[index]) if noise is None else noise[layer][index]
            changed = make_plan(space, {layer: rate})
            stats = [stat for stat in made_up_layers(space, changed, seed) if stat.layer.startswith(f"{layer}.")]
            changes.append(
                Probe(
                    layer,
                    rate,
                    plan_cost(space, changed).conv_macs,
                    256,
                    loss=0.6 + more / 4,
                    quint8_loss=0.9 + more,
                    fp32_accuracy=0.8 - more / 8,
                    quint8_accuracy=0.75 - more / 2,
                    logit_snr_db=-10 * np.log10(0.1 * more + 1e-9),
                    logit_sqnr_db=-10 * np.log10(unchanged.quint8_logit_noise + more),
                    layers=tuple(stats),
                    fisher=float(rng.uniform(0.5, 1.5)),
                )
            )
    return Probes(0, plan, unchanged, tuple(changes))
