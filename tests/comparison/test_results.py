from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from fnet_search.comparison.definition import Comparison, Part, SearchOptions, load_comparison
from fnet_search.comparison.result_figures import result_figures, tradeoff_figure
from fnet_search.comparison.results import (
    WINNER,
    ComparedNetwork,
    layers_frame,
    mean_and_spread,
    networks_frame,
    result_rows,
    result_table,
)
from fnet_search.policy.evaluation import Evaluation
from fnet_search.report.style import COLOURS, GREY, MARKERS
from tests.support.evaluations import paper_evaluations
from tests.support.pictures import outside, overlapping, texts

STUDY = load_comparison("paper")
SPACE = STUDY.variants[0].space
MILD = "percentile:0.1"


def measured(study: Comparison) -> list[ComparedNetwork]:
    """The paper's networks with each seed and scheme of a study: quint8 is better by 0.01 with each further scheme, and
    by 0.002 with each further seed."""
    return [
        ComparedNetwork(part, plan, scheme, better(one, scheme, 0.01 * gentler + 0.002 * study.seeds.index(part.seed)))
        for part in study.parts
        for plan, one in zip(STUDY.plans, paper_evaluations(SPACE), strict=True)
        for gentler, scheme in enumerate(study.schemes)
    ]


def better(one: Evaluation, scheme: str, by: float) -> Evaluation:
    assert one.quint8_accuracy is not None
    return replace(one, scheme=scheme, quint8_accuracy=one.quint8_accuracy + by, split="test")


def test_the_made_up_are_the_papers() -> None:
    assert [one.plan for one in paper_evaluations(SPACE)] == [network.evaluation.plan for network in measured(STUDY)], (
        "in the order of the study"
    )


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ([], 2, "-"),
        ([78.469], 2, "78.47"),
        ([1.0, 2.0, 3.0], 1, f"{2:.1f} ± {1:.1f}"),
        ([0.5, 0.5], 3, "0.500 ± 0.000"),
    ],
)
def test_mean_and_spread(values: Sequence[float], digits: int, text: str) -> None:
    assert mean_and_spread(values, digits) == text


def test_the_table_has_published_numbers_beside_ours() -> None:
    study = replace(STUDY, seeds=(0, 1, 2))
    head, *lines = result_table(study, result_rows(study, measured(study)))
    assert "variant" not in head
    assert [line[0] for line in lines] == list(STUDY.plans)
    regular = dict(zip([f"{place}: {name}" for place, name in enumerate(head)], lines[0], strict=True))
    place = head.index("quint8 accuracy (%)")
    quint8 = [85.60, 85.80, 86.00]
    assert regular[f"{place}: quint8 accuracy (%)"] == f"{fmean(quint8):.2f} ± {stdev(quint8):.2f}"
    assert regular[f"{place + 1}: published"] == "85.60"
    assert (regular["1: conv MMAC"], regular["3: seeds"]) == ("266.0", "3")
    f8 = lines[3]
    assert f8[place + 1] == "", "of f8 nothing is published"
    assert head.count("published") == 3, "none of QMSE, QCE and KL"
    elsewhere = load_comparison("paper", "digits")
    assert result_table(elsewhere, result_rows(elsewhere, measured(elsewhere)))[0].count("published, cifar10") == 3


def test_rows_keep_the_order_of_the_study_and_leave_out_what_is_missing() -> None:
    he = replace(STUDY.variants[0], name="he")
    study = replace(STUDY, variants=(he, STUDY.variants[0]), schemes=(MILD, *STUDY.schemes))
    found = [one for one in measured(study) if one.plan in ("dws", "f2")][::-1]
    found.remove(next(one for one in found if (one.plan, one.part.variant) == ("f2", he)))
    listed = [(row.name, row.scheme) for row in result_rows(study, found)]
    whole = [
        (f"{variant}{plan}", str(scheme))
        for variant in ("he ", "")
        for plan in ("f2", "dws")
        for scheme in study.schemes
    ]
    (lost,) = set(whole) - set(listed)
    assert lost[0] == "he f2"
    assert listed == [one for one in whole if one != lost]


def test_a_study_in_which_nothing_is_trained_has_tables_and_no_figures() -> None:
    assert (len(networks_frame([])), len(layers_frame([]))) == (0, 0)
    assert list(layers_frame([]).columns) == list(layers_frame(measured(STUDY)[:1]).columns)
    assert result_figures(STUDY, result_rows(STUDY, [])) == {}


def test_figure_4_has_means_spreads_and_what_was_published() -> None:
    study = replace(STUDY, seeds=(0, 1))
    figure = tradeoff_figure(study, result_rows(study, measured(study)))
    accuracy, _, _, drop = figure.axes
    fp32, quint8 = (one for one in accuracy.containers if isinstance(one, ErrorbarContainer))
    ones = paper_evaluations(SPACE)
    assert list(quint8.lines[0].get_xdata()) == [one.cost.conv_macs / 1e6 for one in ones]
    assert list(quint8.lines[0].get_ydata()) == pytest.approx([100 * (one.quint8_accuracy or 0) + 0.1 for one in ones])
    lengths = [path[1][1] - path[0][1] for path in quint8.lines[2][0].get_segments()]
    assert lengths == pytest.approx([2 * stdev([0.0, 0.2])] * 8)
    assert list(fp32.lines[0].get_ydata()) == pytest.approx([100 * (one.fp32_accuracy or 0) for one in ones])
    hollow = [line for axes in (accuracy, drop) for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_ydata()) for line in hollow] == [
        pytest.approx([88.37, 86.54, 86.01]),
        pytest.approx([85.60, 80.05, 80.31]),
        pytest.approx([3.13, 14.8, 4.21]),
    ]
    assert list(hollow[2].get_xdata()) == pytest.approx([266.010624, 46.465024, 33.415168])


def test_networks_are_named_once_where_several_schemes_share_their_floats() -> None:
    study = replace(STUDY, schemes=(*STUDY.schemes, MILD))
    accuracy, *others = tradeoff_figure(study, result_rows(study, measured(study))).axes
    for axes in (accuracy, *others):
        named = [text.get_text() for text in axes.texts]
        assert len(set(named)) == len(named)
        assert set(named) <= set(STUDY.plans)
    assert {"regular", "dws"} <= {text.get_text() for text in accuracy.texts}
    drawn = [one for one in accuracy.containers if isinstance(one, ErrorbarContainer)]
    assert [to_hex(one.lines[0].get_color()) for one in drawn] == [GREY, COLOURS[0], GREY, COLOURS[1]]
    both = replace(study, variants=tuple(replace(STUDY.variants[0], name=name) for name in ("one", "two")))
    accuracy, *_ = tradeoff_figure(both, result_rows(both, measured(both))).axes
    drawn = [one for one in accuracy.containers if isinstance(one, ErrorbarContainer)]
    assert {to_hex(one.lines[0].get_color()) for one in drawn} == set(COLOURS[:4]), "floats of variants differ"


def readable(figure: Figure) -> None:
    boxes = texts(figure)
    assert overlapping(boxes) == []
    assert outside(figure, boxes) == []


@pytest.mark.parametrize("schemes", [STUDY.schemes, (*STUDY.schemes, MILD)])
@pytest.mark.parametrize("variants", [("",), ("glorot", "he", "orthogonal")])
def test_no_text_covers_another_or_sticks_out(schemes: tuple, variants: tuple[str, ...]) -> None:
    study = replace(
        STUDY, schemes=schemes, variants=tuple(replace(STUDY.variants[0], name=name) for name in variants), seeds=(0, 1)
    )
    drawn = result_figures(study, result_rows(study, measured(study)))
    suffixes = [f"-{name}" if name else "" for name in variants]
    assert list(drawn) == ["tradeoff.png", *(f"{kind}{s}.png" for s in suffixes for kind in ("ranges", "compared"))]
    for figure in drawn.values():
        readable(figure)


def test_what_has_no_colour_left_is_drawn_in_another_figure() -> None:
    """Five variants in two ways, and nine plans."""
    plans = (*STUDY.plans, "conv_64_1=2,conv_64_2=4,conv_128_1=8,conv_256_1=2")
    variants = tuple(replace(STUDY.variants[0], name=name) for name in ("a" * 60, "b", "c", "d", "e"))
    study = replace(STUDY, schemes=(*STUDY.schemes, MILD), variants=variants, plans=plans)
    found = [
        one
        for network in measured(study)
        for one in (network, *([replace(network, plan=plans[-1])] if network.plan == "init2" else []))
    ]
    drawn = result_figures(study, result_rows(study, found))
    assert [name for name in drawn if "-b" not in name and "-c" not in name and "-d" not in name] == [
        "tradeoff.png",
        "tradeoff-2.png",
        f"ranges-{'a' * 60}.png",
        f"ranges-{'a' * 60}-2.png",
        f"compared-{'a' * 60}.png",
        "ranges-e.png",
        "ranges-e-2.png",
        "compared-e.png",
    ]
    colours = [
        {patch.get_facecolor() for patch in figure.legends[0].get_patches()} for figure in list(drawn.values())[:2]
    ]
    assert [len(one) for one in colours] == [8, 2 * 5 - 8]
    for figure in drawn.values():
        readable(figure)


def test_a_network_that_gets_nothing_right_leaves_the_others_drawn() -> None:
    """Its relative drop is no number; nor is any where all are like it."""
    found = measured(STUDY)
    collapsed = [
        replace(one, evaluation=replace(one.evaluation, fp32_accuracy=0.0, quint8_accuracy=0.0)) for one in found
    ]
    assert collapsed[0].evaluation.relative_drop is None
    for networks, drops in ((collapsed[:1] + found[1:], 8 - 1), (collapsed, 0)):
        *_, drop = tradeoff_figure(STUDY, result_rows(STUDY, networks)).axes
        assert len(drop.containers[0].lines[0].get_ydata()) == drops
        assert len(drop.texts) == drops
    _, regular, *_ = result_table(STUDY, result_rows(STUDY, collapsed))
    assert "-" in regular


def test_the_winners_of_a_search_are_one_row() -> None:
    """Of each seed another plan: what they reach on average, of how many MACs."""
    study = replace(STUDY, plans=(), compare=(), published={}, seeds=(0, 1), search=SearchOptions("random", "50%"))
    found = [
        ComparedNetwork(part, WINNER, study.schemes[0], one, ("min_quint8",) if one.number else ())
        for part, one in zip(study.parts, paper_evaluations(SPACE)[5:7], strict=True)
    ]
    (row,) = result_rows(study, found)
    head, line = result_table(study, [row])
    cells = dict(zip(head, line, strict=True))
    macs = [104_267_776 / 1e6, 67_698_688 / 1e6]
    assert cells["conv MMAC"] == f"{fmean(macs):.1f} ± {stdev(macs):.1f}"
    assert (cells["network"], cells["seeds"]) == ("winner: init2, init4", "2")
    assert row.conv_mmac == pytest.approx(fmean(macs))
    assert list(networks_frame(found)["label"]) == ["init2", "init4"]
    readable(result_figures(study, [row])["tradeoff.png"])


def test_all_eight_networks_of_figure_5_can_be_told_apart() -> None:
    figure = result_figures(STUDY, result_rows(STUDY, measured(STUDY)))["ranges.png"]
    assert len(COLOURS) == len(MARKERS) == len(STUDY.plans)
    handles, names = figure.axes[0].get_legend_handles_labels()
    assert names == [*STUDY.plans, "hollow: pointwise"]
    looks = {(to_hex(one.get_color()), one.get_marker()) for one in handles[:-1]}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 8


def test_parts_of_a_study_are_named_by_variant_and_seed() -> None:
    he = replace(STUDY.variants[0], name="he")
    assert [Part(STUDY.variants[0], 3).name, Part(he, 0).name] == ["seed3", "he-seed0"]
