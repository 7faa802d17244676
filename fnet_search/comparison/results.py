"""The results of a comparison over all its parts: a table, figures, and all networks and layers as CSV."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeVar

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fnet_search.arch.costs import Cost
from fnet_search.arch.plan import label, parse_plan
from fnet_search.base.files import write_text
from fnet_search.base.units import millions
from fnet_search.candidates.network_files import WEIGHTS
from fnet_search.comparison.definition import Comparison, Part, PublishedResult, Variant
from fnet_search.policy.evaluation import Evaluation, LayerStats
from fnet_search.report.layer_figures import PRECISIONS, RANGES, layers_figure
from fnet_search.report.plot_labels import PointLabel, place_labels
from fnet_search.report.style import (
    COLOURS,
    GREY,
    heading,
    legend_columns,
    log_if_wide,
    new_figure,
    save_png,
    shorten,
    style,
)
from fnet_search.rundir.recorded_run import RecordedRun
from fnet_search.rundir.run_folder import versions
from fnet_search.training.numerics import Numerics

RESULTS = "results.md"
T = TypeVar("T")


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
        head += [_published_name(comparison)] if with_published else []
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


def _published_name(comparison: Comparison) -> str:
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


# Figures

ACCURACIES, ERROR = {"o": COLOURS[0], "s": COLOURS[1]}, {"D": COLOURS[2]}
"""Markers of the two accuracies, and of a quantity alone in its panel, with their colours if there is one side only.
With several sides, colours stand for the sides."""
Side = tuple[Variant, str]
"""A variant and the text of a scheme; each side has a colour in the tradeoff figure."""


def _sides(listed: Sequence[ResultRow]) -> list[Side]:
    return list(dict.fromkeys((row.variant, row.scheme) for row in listed))


def tradeoff_figure(comparison: Comparison, listed: Sequence[ResultRow]) -> Figure:
    """The paper's Figure 4: panels of accuracies, QMSE, QCE and relative drop against conv MACs.

    Points are means with standard deviations over seeds. Each variant and scheme has its colour, so there may be at
    most as many as COLOURS. Published numbers are hollow. The fp32 accuracy is grey if only the schemes differ, since
    it is the same for all of them.
    """
    figure = new_figure(7.4, 8.4)
    heading(figure, f"Accuracy and quantization error against MACs: {comparison.name}, test split")
    panels: list[Axes] = list(figure.subplots(2, 2, sharex=True).flat)
    fp32, quint8, drop, qmse, qce, _ = QUANTITIES
    sides = _sides(listed)
    same_in_all_sides = (fp32,) if len({variant for variant, _ in sides}) == 1 else ()
    shown = list(zip(panels, ((fp32, quint8), (qmse,), (qce,), (drop,)), strict=True))
    for axes, measures in shown:
        style(axes)
        shapes = ACCURACIES if len(measures) > 1 else ERROR
        drawn: list[float] = []
        for index, side in enumerate(sides):
            side_rows = [row for row in listed if (row.variant, row.scheme) == side]
            for (shape, colour), measure in zip(shapes.items(), measures, strict=True):
                if len(sides) > 1:
                    colour = GREY if measure in same_in_all_sides else COLOURS[index]
                drawn += _points(axes, side_rows, measure, colour, shape)
        for shape, measure in zip(shapes, measures, strict=True):
            drawn += _published(axes, listed, measure, shape)
        unit = f" ({measures[0].unit})" if measures[0].unit else ""
        axes.set_ylabel(("accuracy" if len(measures) > 1 else measures[0].title) + unit, fontsize=9)
        log_if_wide(axes, drawn)
        axes.margins(x=0.1, y=0.12)
    for axes in panels[2:]:
        axes.set_xlabel("conv MACs (MMAC)", fontsize=9)
    _legend(figure, comparison, sides)
    for axes, measures in shown:  # last, since it fixes the layout of the figure
        place_labels(axes, _labels(listed, measures))
    return figure


def _legend(figure: Figure, comparison: Comparison, sides: Sequence[Side]) -> None:
    """Draws the legend below all panels: the markers, then the colours of the sides if there are several."""

    def shape(marker: str, name: str, colour: str, face: str) -> Artist:
        return Line2D(
            [], [], marker=marker, label=name, color=colour, markerfacecolor=face, linestyle="none", markersize=5
        )

    handles = []
    for (marker, marker_colour), name in zip(ACCURACIES.items(), ("fp32 accuracy", "quint8 accuracy"), strict=True):
        colour = GREY if len(sides) > 1 else marker_colour
        handles.append(shape(marker, name, colour, colour))
    if comparison.published:
        handles.append(shape("o", f"hollow: {_published_name(comparison)}", GREY, "none"))
    several_schemes = len({scheme for _, scheme in sides}) > 1
    for index, (variant, scheme) in enumerate(sides if len(sides) > 1 else ()):
        name = " ".join(word for word in (variant.name, scheme if several_schemes else "") if word)
        handles.append(Patch(color=COLOURS[index], label=shorten(name)))
    columns = legend_columns([str(handle.get_label()) for handle in handles], 4)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)


def _points(axes: Axes, listed: Sequence[ResultRow], measure: Quantity, colour: str, marker: str) -> list[float]:
    """Draws mean and standard deviation of each row. Returns the means."""
    points = [(row.conv_mmac, values) for row in listed if (values := row.values(measure.value, measure.scale))]
    means = [fmean(values) for _, values in points]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axes.errorbar(
        [macs for macs, _ in points],
        means,
        spreads,
        color=colour,
        marker=marker,
        markersize=4.5,
        linestyle="none",
        capsize=2,
    )
    return means


def _published(axes: Axes, listed: Sequence[ResultRow], measure: Quantity, marker: str) -> list[float]:
    """Draws the published numbers, hollow. Returns them."""
    published = {row.conv_mmac: value for row in listed if (value := measure.published(row.published)) is not None}
    values = [measure.scale * value for value in published.values()]
    axes.plot(list(published), values, marker, markerfacecolor="none", color=GREY, markersize=6.5)
    return values


def _labels(listed: Sequence[ResultRow], measures: Sequence[Quantity]) -> list[PointLabel]:
    """One label for all points of a network at the same MACs, since colours tell the sides apart."""
    anchors: dict[tuple[str, float], list[float]] = {}
    for row in listed:
        for measure in measures:
            if values := row.values(measure.value, measure.scale):
                published = measure.published(row.published)
                points = [] if published is None else [measure.scale * published]
                anchors.setdefault((row.network, row.conv_mmac), []).extend([*points, fmean(values)])
    return [PointLabel((name,), macs, points, size=4.0) for (name, macs), points in anchors.items()]


def result_figures(comparison: Comparison, listed: Sequence[ResultRow]) -> dict[str, Figure]:
    """The figures by file name.

    More networks or sides than COLOURS are split into several figures: ``tradeoff.png``, ``tradeoff-2.png``. The layer
    figures show the first seed and the first scheme.
    """
    sides = _sides(listed)
    drawn: dict[str, Figure] = {}
    for name, chosen in _in_colours("tradeoff", sides):
        drawn[name] = tradeoff_figure(comparison, [row for row in listed if (row.variant, row.scheme) in chosen])
    for variant in comparison.variants if comparison.search is None else ():
        variant_rows = [row for row in listed if row.variant == variant and row.scheme == comparison.schemes[0]]
        precision = "folded precision (%)"
        compared = [row for row in variant_rows if row.plan in comparison.compare]
        for kind, shown, title, values in (
            ("ranges", variant_rows, "Ranges", RANGES),
            ("compared", compared, "Ranges and precisions", {**RANGES, precision: PRECISIONS[precision]}),
        ):
            for name, chosen_rows in _in_colours(kind, shown, variant.name):
                networks = [(row.name, row.networks[0].evaluation) for row in chosen_rows]
                drawn[name] = layers_figure(variant.space, networks, title, values)
    return drawn


def _in_colours(kind: str, items: Sequence[T], suffix: str = "") -> Iterator[tuple[str, Sequence[T]]]:
    """Splits `items` into groups of at most len(COLOURS); yields the file name of each group's figure and the group."""
    most = len(COLOURS)
    for number, start in enumerate(range(0, len(items), most), 1):
        words = [kind, suffix, str(number) if number > 1 else ""]
        yield f"{'-'.join(word for word in words if word)}.png", items[start : start + most]


CAPTIONS = {
    "tradeoff": "The paper's Figure 4. Mean and standard deviation over seeds; hollow: published.",
    "ranges": "The paper's Figure 5: ranges of trained weights, of weights with BatchNorm folded in, of clipped "
    "activations.",
    "compared": "The paper's Figure 6: the same beside average channel precisions of the folded weights.",
}


def write_results(comparison: Comparison, runs: Mapping[Part, RecordedRun], folder: Path) -> Path:
    """Writes the results of all networks trained so far into the comparison's folder.

    Writes results.md with its figures, networks.csv and layers.csv. Returns the path of results.md.
    """
    networks = compared_networks(comparison, runs)
    listed = result_rows(comparison, networks)
    write_text(folder / "networks.csv", networks_frame(networks).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "layers.csv", layers_frame(networks).to_csv(index=False, lineterminator="\n"))
    (folder / "figures").mkdir(exist_ok=True)
    drawn = result_figures(comparison, listed)
    for name, figure in drawn.items():
        save_png(figure, folder / "figures" / name)
    write_text(folder / RESULTS, _page(comparison, runs, listed, list(drawn)))
    return folder / RESULTS


def _page(
    comparison: Comparison, runs: Mapping[Part, RecordedRun], listed: Sequence[ResultRow], drawn: Sequence[str]
) -> str:
    config = next(iter(runs.values())).config
    facts = {
        "data set": f"{config['dataset'].partition(':')[0]}, fingerprint {config['data']['fingerprint']}",
        "trained": "; ".join(map(str, comparison.variants)),
        "seeds": ", ".join(map(str, comparison.seeds)),
        "numerics": str(Numerics.from_json(config["numerics"])),
        "versions": ", ".join(f"{name} {number}" for name, number in config.get("versions", versions()).items()),
    }
    lines = [f"# {comparison.name}", "", comparison.description, ""]
    lines += [f"- {name}: {text}" for name, text in facts.items()]
    split = "On the test split; mean ± standard deviation over seeds, where there are several."
    lines += ["", split, "", markdown(result_table(comparison, listed)) if listed else "Nothing is trained yet.", ""]
    lines += [f"- {remark}" for remark in result_remarks(comparison, runs)] + [""]
    for name in drawn:
        caption = CAPTIONS[name.partition(".")[0].partition("-")[0]]
        lines += [f"![{caption}](figures/{name})", "", caption, ""]
    return "\n".join(lines)
