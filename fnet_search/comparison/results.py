"""The results of a comparison over all its parts: the table, and every network and layer as data frames."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from statistics import fmean, stdev

import pandas as pd

from fnet_search.arch.costs import Cost
from fnet_search.arch.plan import label, parse_plan
from fnet_search.base.units import millions
from fnet_search.candidates.network_files import WEIGHTS
from fnet_search.comparison.definition import Comparison, Part, PublishedResult, Variant
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.report.style import (
    shorten,
)
from fnet_search.rundir.recorded_run import RecordedRun

WINNER = "winner"
"""Stands in place of a plan for the winners of a variant's searches, one for each seed."""


@dataclass(frozen=True)
class ComparedNetwork:
    """A trained network of a comparison, quantized with one scheme."""

    part: Part
    plan: str
    """The plan as the comparison spells it; WINNER for a search."""
    scheme: str
    """The scheme as the comparison spells it: ``auto``, or the scheme of the evaluation."""
    evaluation: Evaluation
    missed: tuple[str, ...] = ()
    """The constraints that a search's winner misses; not empty if nothing was feasible and it is only the nearest."""

    @property
    def label(self) -> str:
        return label(self.part.variant.space, self.evaluation.plan)


@dataclass(frozen=True)
class ResultRow:
    """Networks that differ only in their seeds (winners of searches also in their plans), with the published result."""

    variant: Variant
    plan: str
    scheme: str
    networks: tuple[ComparedNetwork, ...]
    published: PublishedResult

    @property
    def network(self) -> str:
        """The name of the network in figures."""
        return shorten(self.networks[0].label if "=" in self.plan else self.plan)

    @property
    def name(self) -> str:
        """The name in legends: variant and network."""
        return shorten(f"{self.variant.name} {self.network}".strip())

    @property
    def conv_mmac(self) -> float:
        """Conv MACs in millions, the mean over the seeds, whose winners may differ."""
        return fmean(network.evaluation.cost.conv_macs for network in self.networks) / 1e6

    def values(self, value: Callable[[Evaluation], float | None], scale: float = 1.0) -> list[float]:
        """``scale * value(evaluation)`` for each seed; seeds without this measure are left out."""
        measured = (value(network.evaluation) for network in self.networks)
        return [scale * number for number in measured if number is not None]


def compared_networks(comparison: Comparison, runs: Mapping[Part, RecordedRun]) -> list[ComparedNetwork]:
    """All networks of given plans, or the winners of searches, with their evaluations on the test split."""
    networks = []
    for part, run in runs.items():
        if comparison.search is not None:
            if (winner := run.winner) is not None and (test := run.test(winner)) is not None:
                networks.append(
                    ComparedNetwork(
                        part, WINNER, comparison.schemes[0], test, run.constraints.missed(winner.evaluation)
                    )
                )
            continue
        plans = {plan: parse_plan(part.variant.space, plan) for plan in comparison.plans}  # some may be the same
        networks += [
            ComparedNetwork(part, name, scheme, network.evaluation)
            for network in run.networks
            for name, plan in plans.items()
            for scheme in comparison.schemes
            if network.evaluation.plan == plan
            if scheme == network.evaluation.scheme
            or (scheme == comparison.schemes[0] and network.folder == network.candidate)
        ]
    return networks


def result_remarks(comparison: Comparison, runs: Mapping[Part, RecordedRun]) -> list[str]:
    """Remarks below the table: networks missing from it, with the reason, and winners that miss constraints."""
    networks = compared_networks(comparison, runs)
    present = {(network.part, network.plan, network.scheme) for network in networks}
    lines = [
        f"{network.part.name}: no candidate met the constraints; the nearest, {network.label}, misses "
        f"{', '.join(network.missed)}"
        for network in networks
        if network.missed
    ]
    for part in comparison.parts:
        if comparison.search is not None:
            if (part, WINNER, comparison.schemes[0]) not in present:
                untested = part in runs and runs[part].winner and not runs[part].config["data"]["has_test"]
                reason = "no results, since the data set has no test images" if untested else "not finished yet"
                lines.append(f"{part.name}: {reason}")
            continue
        states = _states(runs[part]) if part in runs else {}
        for plan, scheme in product(comparison.plans, comparison.schemes):
            if (part, plan, scheme) not in present:
                reason = states.get(str(parse_plan(part.variant.space, plan)), "not trained yet")
                lines.append(f"{part.name}: {plan}, {scheme}: {reason}")
    return lines


def _states(run: RecordedRun) -> dict[str, str]:
    """By the text of each trained plan: why a quantized network of it may be missing."""
    path = run.run.path / "candidates.csv"
    if not path.is_file():  # killed before the first candidate was recorded
        return {}
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    states = {str(row.plan): f"{row.state}: {row.reason}" for row in table.itertuples()}
    for network in run.networks:
        has_weights = (network.candidate / WEIGHTS).is_file()
        states[str(network.evaluation.plan)] = (
            "not quantized yet" if has_weights else "not quantized: its weights are gone"
        )
    return states


def result_rows(comparison: Comparison, networks: Sequence[ComparedNetwork]) -> list[ResultRow]:
    """The rows of the table, ordered by variants, plans and schemes as the comparison lists them."""
    listed = []
    for variant in comparison.variants:
        for plan in comparison.plans or (WINNER,):
            for scheme in comparison.schemes:
                same = tuple(
                    network
                    for network in networks
                    if (network.part.variant, network.plan, network.scheme) == (variant, plan, scheme)
                )
                if same:
                    listed.append(
                        ResultRow(variant, plan, scheme, same, comparison.published.get(plan, PublishedResult()))
                    )
    return listed


@dataclass(frozen=True)
class Quantity:
    """A column of the table, and a panel of Figure 4."""

    title: str
    unit: str
    value: Callable[[Evaluation], float | None]
    scale: float = 1.0
    digits: int = 2
    published: Callable[[PublishedResult], float | None] = lambda published: None


QUANTITIES = (
    Quantity(
        "fp32 accuracy",
        "%",
        lambda evaluation: evaluation.fp32_accuracy,
        100,
        published=lambda published: published.fp32_accuracy,
    ),
    Quantity(
        "quint8 accuracy",
        "%",
        lambda evaluation: evaluation.quint8_accuracy,
        100,
        published=lambda published: published.quint8_accuracy,
    ),
    Quantity(
        "relative drop",
        "%",
        lambda evaluation: evaluation.relative_drop,
        100,
        published=lambda published: published.relative_drop,
    ),
    Quantity("QMSE", "", lambda evaluation: evaluation.qmse, digits=3),
    Quantity("QCE", "nats", lambda evaluation: evaluation.qce, digits=3),
    Quantity("KL", "nats", lambda evaluation: evaluation.kl, digits=3),
)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """``78.47 ± 0.21``: mean and sample standard deviation; a single value alone; a dash if there is none."""
    if not values:
        return "-"
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def result_table(comparison: Comparison, listed: Sequence[ResultRow]) -> list[list[str]]:
    """The cells of the result table, headings first; measures as mean ± sample standard deviation over the seeds.

    A measure with published numbers has a column for them beside its own.
    """
    several = len(comparison.variants) > 1
    has_published = [
        any(measure.published(result) is not None for result in comparison.published.values()) for measure in QUANTITIES
    ]
    head = [*(["variant"] if several else []), "network", "conv MMAC", "ranges", "seeds"]
    for measure, with_published in zip(QUANTITIES, has_published, strict=True):
        head += [f"{measure.title} ({measure.unit})" if measure.unit else measure.title]
        head += [published_name(comparison)] if with_published else []
    lines = [[*head, "codes that differ in ONNX Runtime"]]
    for row in listed:
        winners = ", ".join(dict.fromkeys(network.label for network in row.networks))
        line = [*([row.variant.name] if several else []), f"{WINNER}: {winners}" if row.plan == WINNER else row.plan]
        macs = row.values(lambda evaluation: evaluation.cost.conv_macs)
        equal = len(set(macs)) == 1
        line += [millions(int(macs[0])) if equal else mean_and_spread([count / 1e6 for count in macs], 1)]
        line += [row.scheme, str(len(row.networks))]
        for measure, with_published in zip(QUANTITIES, has_published, strict=True):
            line.append(mean_and_spread(row.values(measure.value, measure.scale), measure.digits))
            if with_published:
                published = measure.published(row.published)
                line.append("" if published is None else f"{measure.scale * published:.{measure.digits}f}")
        audits = [network.evaluation.audit for network in row.networks if network.evaluation.audit is not None]
        counted = f"{sum(audit.differing for audit in audits):,} of {sum(audit.codes for audit in audits):,}"
        lines.append([*line, counted if audits else "-"])
    return lines


def published_name(comparison: Comparison) -> str:
    """The title of published numbers in the table and in legends."""
    return f"published, {comparison.published_on}" if comparison.published_on else "published"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these cells, the first line as heading. Text columns are aligned left, the others right."""
    head, *body = lines
    ruler = ["---" if name in ("variant", "network", "ranges") else "---:" for name in head]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *body))


def networks_frame(networks: Sequence[ComparedNetwork]) -> pd.DataFrame:
    """The contents of networks.csv: one row for each network and scheme.

    Accuracies and drop are fractions of 1; an empty cell was not measured. `missed` names the constraints that a
    search's winner does not meet.
    """
    rows = []
    for network in networks:
        evaluation, audit = network.evaluation, network.evaluation.audit
        names = {"label": network.label, "missed": " ".join(network.missed)}
        measured = {name: getattr(evaluation, name) for name in _MEASURED}
        audited = {"audited_codes": audit and audit.codes, "differing_codes": audit and audit.differing}
        rows.append({**_key(network), **names, **vars(evaluation.cost), **measured, **audited})
    frame = pd.DataFrame(
        rows, columns=[*_KEY, "label", "missed", *(field.name for field in fields(Cost)), *_MEASURED, *_AUDITED]
    )
    return frame.astype(dict.fromkeys(_AUDITED, "Int64"))


_KEY = ("variant", "plan", "seed", "scheme")

_MEASURED = (
    "split",
    "epochs",
    "trained_images",
    "fp32_accuracy",
    "quint8_accuracy",
    "fp32_balanced_accuracy",
    "quint8_balanced_accuracy",
    "relative_drop",
    "qmse",
    "qce",
    "kl",
)

_AUDITED = ("audited_codes", "differing_codes")


def layers_frame(networks: Sequence[ComparedNetwork]) -> pd.DataFrame:
    """The contents of layers.csv: a row for each layer of each network and scheme, with the fields of LayerStats."""
    rows = [{**_key(network), **asdict(layer)} for network in networks for layer in network.evaluation.layers]
    return pd.DataFrame(rows, columns=[*_KEY, *(field.name for field in fields(LayerStats))])


def _key(network: ComparedNetwork) -> dict[str, object]:
    values = network.part.variant.name, network.plan, network.part.seed, network.evaluation.scheme
    return dict(zip(_KEY, values, strict=True))
