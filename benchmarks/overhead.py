"""What the search loop costs beside Optuna alone: milliseconds a trial, by policy and number of trials so far.

    python benchmarks/overhead.py [--trials 1000] [--policy tpe]

Claim: at most 20 ms a trial at 1,000 trials beyond what Optuna's own `ask` takes, and 1 % of a run's wall time.

The search is the real one, with the real study in a journal and the real run folder; only training is left out: a
stand-in returns an evaluation, with statistics of every layer, at once, and the time for making it up is taken off.
Optuna alone does `ask` and `tell`, with the sampler of the same kind on a journal of its own, in turns with the search.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import optuna
from machine import machine, spread
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from fnet_search.arch.costs import layer_cost, plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Conv, Dense
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, indices, legal_rates
from fnet_search.candidates.job import Job, Setup
from fnet_search.candidates.pool import Finished, Judge
from fnet_search.engine.search_loop import search
from fnet_search.engine.study_record import StudyRecord
from fnet_search.importing.spaces import load_space
from fnet_search.optuna_bridge.storage import open_journal
from fnet_search.optuna_bridge.trials import index_distributions
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.policy.protocol import History
from fnet_search.policy.registry import load_policy
from fnet_search.quant.scheme import Scheme
from fnet_search.rundir.run_folder import RunFolder
from fnet_search.training.numerics import Numerics
from fnet_search.training.recipe import Fidelity, load_recipe
from fnet_search.training.train import TrainingProgress

BLOCK = 25
"""Trials of one side before it is the other's turn."""

SAMPLERS: dict[str, BaseSampler] = {
    "random": RandomSampler(seed=0),
    "tpe": TPESampler(multivariate=False, seed=0),
}
"""By the name of the policy that they are like."""


def evaluation(space: Macroarchitecture, plan: FactorizationPlan, number: int) -> Evaluation:
    """As a training might leave it: each layer costs accuracy as it is factorized, and there is noise."""
    rng = np.random.default_rng(number)
    network, layers = factorize(space, plan), []
    for node in network.order:
        if isinstance(node.layer, Conv | Dense):
            cost, values = layer_cost(node, network.input_shapes(node)), rng.random(13).tolist()
            layers.append(LayerStats(node.name, node.layer.kind, cost.total_macs, cost.params, *values, 0, 1))
    deepest = np.array([len(rates) - 1 for rates in legal_rates(space).values()])
    loss = float((np.array(indices(space, plan)) / deepest).mean() + rng.normal(0, 0.05))
    found = {"qmse": 0.4 + rng.random(), "qce": 0.5 + rng.random(), "kl": rng.random()}
    return Evaluation(
        number,
        plan,
        plan_cost(space, plan),
        scheme="percentile:1",
        epochs=6,
        trained_images=270_000,
        fp32_accuracy=0.9 - 0.1 * loss,
        quint8_accuracy=0.85 - 0.2 * loss,
        layers=tuple(layers),
        **found,
    )


class Untrained:
    """A pool of one worker that is done at once, but for the epochs that it reports. `seconds`: what making up
    evaluations took."""

    count = 1

    def __init__(self, setup: Setup) -> None:
        self.setup, self.jobs, self.seconds = setup, list[Job](), 0.0

    @property
    def busy(self) -> int:
        return len(self.jobs)

    paused = 0

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def events(self, judge: Judge) -> Iterator[Finished]:
        start = perf_counter()
        job = self.jobs.pop()
        made = evaluation(self.setup.space, job.plan, job.number)
        self.seconds += perf_counter() - start
        epochs, reached = self.setup.recipe_of(job).epochs, made.fp32_accuracy
        for epoch in range(1, epochs + 1):
            if judge(job.number, TrainingProgress(epoch, epochs, True, epoch / epochs, 1.0, reached, "validation")):
                made = replace(made, state="pruned", fp32_accuracy=None, quint8_accuracy=None, layers=())
                break
        yield Finished(replace(made, role=job.role, parent=job.start.number if job.start else None), 60.0)


class Timed:
    """A policy. `seconds`: what its suggestions took."""

    def __init__(self, name: str) -> None:
        self.policy, self.seconds = load_policy(name), 0.0

    def suggest(self, history: History) -> FactorizationPlan | None:
        start = perf_counter()
        plan = self.policy.suggest(history)
        self.seconds += perf_counter() - start
        return plan


def searched(policy: str, setup: Setup, budget: int, folder: Path) -> Iterator[tuple[float, float]]:
    """Seconds of each trial, and those of them that the policy took."""
    run = RunFolder(folder)
    run.path.mkdir()
    constraints = Constraints(conv_macs=budget)
    record = StudyRecord(open_journal(run.journal), run, setup.space, constraints, 0, "validation", setup)
    pool, timed = Untrained(setup), Timed(policy)
    events = search(timed, record, pool, 1_000_000)  # type: ignore[arg-type]
    while True:
        pool.seconds = timed.seconds = 0.0
        start = perf_counter()
        while not isinstance(next(events), Finished):
            pass
        yield perf_counter() - start - pool.seconds, timed.seconds


def asked(policy: str, space: Macroarchitecture, folder: Path) -> Iterator[tuple[float, float]]:
    """Seconds of `ask` and of `tell`, of each trial of Optuna alone."""
    folder.mkdir()
    study = optuna.create_study(
        storage=open_journal(folder / "journal.log"), sampler=SAMPLERS[policy], direction="maximize"
    )
    while True:
        start = perf_counter()
        trial = study.ask(index_distributions(space))
        between = perf_counter()
        study.tell(trial, 1 - float(np.mean(list(trial.params.values()))) / 10)
        yield between - start, perf_counter() - between


@click.command()
@click.option("--trials", default=1000, show_default=True, type=click.IntRange(min=10))
@click.option("--policy", "policies", multiple=True, default=list(SAMPLERS), type=click.Choice(list(SAMPLERS)))
@click.option("--space", default="factorizenet", show_default=True)
@click.option("--budget", default=120.0, show_default=True, help="MMAC in convolutions.")
@click.option("--fast", is_flag=True, help="Children start from parents, and hopeless ones are stopped.")
def main(trials: int, policies: tuple[str, ...], space: str, budget: float, fast: bool) -> None:
    """Measures searches of so many trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    loaded = load_space(space)
    fidelity = Fidelity(warm_start=fast, prune=fast)
    recipe, scheme = load_recipe("quick"), Scheme()
    setup = Setup(loaded, recipe, (scheme,), Numerics("cpu"), 0, "validation", fidelity=fidelity)
    click.echo(machine("optuna"))
    click.echo(f"{space} under {budget:g} MMAC, one worker; in ms a trial: median (quartiles)")
    names = ("search", "of it the policy", "Optuna's ask", "ask and tell", "search - ask")
    click.echo(f"{'policy':8} {'trials':12}" + "".join(f"{name:>24}" for name in names))
    for policy in policies:
        with tempfile.TemporaryDirectory() as folder:
            ours = searched(policy, setup, int(budget * 1e6), Path(folder, "run"))
            theirs = asked(policy, loaded, Path(folder, "optuna"))
            rows = list[tuple[float, ...]]()
            for begun in range(0, trials, BLOCK):
                block = range(begun, min(begun + BLOCK, trials))
                turns = [[next(side) for _ in block] for side in (ours, theirs)]
                rows += [(*our, ask, ask + tell, our[0] - ask) for our, (ask, tell) in zip(*turns, strict=True)]
        tenth = trials // 10
        for first in (0, (trials - tenth) // 2, trials - tenth):
            columns = zip(*rows[first : first + tenth], strict=True)
            shown = [spread([1e3 * seconds for seconds in column]) for column in columns]
            click.echo(f"{policy:8} {f'{first + 1:,}-{first + tenth:,}':12}" + "".join(f"{one!s:>24}" for one in shown))
        beyond, total = shown[-1].median, shown[0].median
        click.echo(
            f"{policy}: {beyond:.1f} ms a trial beyond Optuna's ask at the end; the search is below 1 % of the wall "
            f"time where a candidate takes {total / 10:.1f} s or more"
        )


if __name__ == "__main__":
    main()
