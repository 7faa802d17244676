"""The report of a run: one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from html import escape
from operator import attrgetter
from pathlib import Path

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, label, regular
from fnet_search.base.units import counted, millions, percent
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation
from fnet_search.policy.explanation import Explanation, RateChange
from fnet_search.policy.ranking import ranking
from fnet_search.report.drawing import drawing
from fnet_search.report.figures import caption
from fnet_search.report.html_page import NONE, cells, figure_html, head_row, html_table, picture_html, write_page
from fnet_search.report.outcome import Outcome, interval
from fnet_search.report.style import plan_name

DETAILED = 30
"""The most candidates whose layers the page shows; their folders have those of all."""
LISTED = 8
"""The most rates that are always shown below a plan's label; longer plans unfold on a click."""


# The page

STATES = {"complete": "trained", "pruned": "stopped early", "refused": "refused before training", "failed": "failed"}
"""How states are called on the page."""

GLOSSARY = {
    "plan, rate": "One factorization rate f per layer: 1 is the regular convolution; above 1 a convolution with f "
    "groups, batch norm, ReLU and a pointwise (1x1) convolution stand in its place; f = input channels is depthwise "
    "separable.",
    "conv MMAC": "Millions of multiply-accumulates for one image in the convolutions, stem included, dense layers "
    "not. This is what a budget limits.",
    "fp32, quint8": "Accuracy of the float network, and of the same network with weights and activations in unsigned "
    "8-bit integers, batch norm folded in.",
    "balanced": "Balanced accuracy, of the quint8 network: the mean over the classes of the share of each one's images "
    "that is classified right. Every class counts alike, however few images it has.",
    "95 % interval": "Where the quint8 accuracy may be, seeing how many images it was measured on (Wilson's score "
    "interval; of balanced accuracy, put together from those of the classes).",
    "not distinguishable": "Feasible, and classifies no more of the same images wrong than chance explains (McNemar's "
    "exact test, 5 %; of balanced accuracy the same by class). The winner is the best one all the same.",
    "QMSE": "Mean over images and classes of (fp32 logit - quint8 logit) squared.",
    "QCE": "Cross entropy, in nats, of the quint8 class probabilities under the fp32 ones.",
    "KL": "QCE less the entropy of the fp32 probabilities: 0 when both networks say the same.",
    "relative drop": "(fp32 - quint8) / fp32 accuracy.",
    "folded weights": "Weights after batch norm's scale went into them: those that are quantized.",
    "channel precision": "Mean over output channels of (channel's range / tensor's range).",
    "SQNR": "Signal to quantization noise in dB: local with only this tensor quantized, accumulated with everything "
    "before it too.",
    "probe": "A trained network with one layer's rate changed, made by warm start, not trained, measured on validation "
    "images. Noise: energy of the difference of its logits from those of the network without the change, as a share of "
    "the energy of these.",
    "dead channel": "A channel that never changes. It counts 0 in a precision.",
    "quantized with": "The scheme: range method, a weight scale for each output channel (per-channel) or for each "
    "tensor, and whether biases are corrected. With auto, of several the one whose outputs diverge least (KL) from the "
    "float network's on training images.",
    "range method": "How activation ranges are found on the calibration images: percentile:1 clips the top and bottom "
    "1 %, minmax nothing, mse takes the range with the least squared error.",
    "audit": "Output codes of the exported ONNX file in ONNX Runtime that are not those of the simulator: 0 means that "
    "the quint8 figures here are what the runtime computes.",
    "feasible": "Trained, and within every constraint.",
    "reference": "The regular network where it is above the budget: trained since others start from it. It never wins.",
    "trained on": "The best candidate, trained on with the whole recipe at the end of the search.",
    "training": "Epochs of its own; of a network that started from another, also that one's epochs and its own "
    "accuracy in float before any training (on at most 2,000 images).",
}


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.2f}"


def _tenths(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _metric_name(constraints: Constraints) -> str:
    """The name of the metric after a number; empty for accuracy, which readers expect."""
    return "" if constraints.metric == "accuracy" else f" {constraints.measured}"


def _headline(outcome: Outcome) -> str:
    space, constraints, best, split = outcome.space, outcome.constraints, outcome.winner, outcome.split
    states = [str(evaluation.state) for evaluation in outcome.evaluations if evaluation.role == "candidate"]
    counts = [(state, states.count(state)) for state in STATES]
    summary = ", ".join(f"{count} {STATES[state]}" for state, count in counts if count) or "none yet"
    images = sum(evaluation.trained_images for evaluation in outcome.evaluations)
    candidates = f'<p class="soft">Candidates: {summary}. Images trained on in all: {images:,}.</p>'
    notes = "".join(f'<p class="caution">{escape(text[0].upper() + text[1:])}.</p>' for text in outcome.cautions)
    if best is None:
        trained = any(
            evaluation.state == "complete" and evaluation.role != "reference" for evaluation in outcome.evaluations
        )
        given = f"Given plans, each measured on the {split} split: none of them is a winner."
        return f'<p class="verdict">{given if trained else "No candidate was trained."}</p>{notes}{candidates}'
    name = f"<strong>{escape(label(space, best.plan))}</strong>"
    if outcome.feasible:
        score = percent(best.scores(constraints.metric).quint8)
        verdict = f"{name} won: {score}{_metric_name(constraints)} in quint8 at {millions(best.cost.conv_macs)} MMAC."
        checked = f" (checked on {outcome.measured_on})" if constraints.on_images else ""
        verdict += f" It meets every constraint{escape(checked)}." if constraints.described() else ""
        verdict += _undecided(outcome)
    else:
        missed = "; ".join(constraints.misses(best, outcome.measured_on))
        verdict = f"No candidate met the constraints; nearest is {name}: {escape(missed)}."
    for evaluation in (best, outcome.test):
        if evaluation is not None and evaluation.constant:
            verdict += f" <strong>On the {evaluation.split} split {escape(evaluation.constant)}.</strong>"
    whole = plan_cost(space, regular(space))
    cards = [
        (
            "MACs in convolutions",
            f"{millions(best.cost.conv_macs)} MMAC",
            f"{_part(best.cost.conv_macs, whole.conv_macs)}",
        ),
        ("parameters", f"{best.cost.params:,}", f"{_part(best.cost.params, whole.params)}"),
        ("quantized with", best.scheme or NONE, "ranges, weight scales, biases"),
    ]
    for evaluation, where in ((best, split), (outcome.test, "test")):
        if evaluation is not None and (evaluation is best or split != "test"):
            cards += [
                (
                    f"quint8 accuracy, {where}",
                    percent(evaluation.quint8_accuracy) or NONE,
                    f"95 % interval {interval(evaluation, constraints.metric)}" if evaluation.images else "",
                ),
                (
                    f"fp32 accuracy, {where}",
                    percent(evaluation.fp32_accuracy) or NONE,
                    f"drop {percent(evaluation.relative_drop)}",
                ),
            ]
            if evaluation.uneven or constraints.metric != "accuracy":
                fp32, quint8 = evaluation.scores("balanced-accuracy")
                cards.append((f"quint8 balanced accuracy, {where}", percent(quint8), f"fp32 {percent(fp32)}"))
    shown = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for term, value, note in cards
    )
    plan = f'<p class="plan">{_breakable(str(best.plan))}</p>'
    return f'<p class="verdict">{verdict}</p>{notes}{plan}<dl class="cards">{shown}</dl>{candidates}'


def _undecided(outcome: Outcome) -> str:
    """A sentence that names the candidates that cannot be told apart from the winner."""
    numbers = [evaluation.number for evaluation in outcome.undecided]
    if not numbers:
        return ""
    assert outcome.winner is not None
    fewer = 1 - outcome.undecided[0].cost.conv_macs / outcome.winner.cost.conv_macs
    cheaper = f" Candidate {numbers[0]} has {100 * fewer:.0f} % fewer MACs." if fewer > 0 else ""
    names = f"candidate{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"
    return f" On {counted(outcome.winner.images, 'image')} it cannot be told apart from {names}.{cheaper}"


def _part(value: int, whole: int) -> str:
    return f"{100 * value / whole:.1f} % of the unfactorized network"


def _breakable(text: str, after: str = ",") -> str:
    return escape(text).replace(after, f"{after}<wbr>")


def _plan(space: Macroarchitecture, plan: FactorizationPlan) -> str:
    rates = f'<span class="plan">{_breakable(str(plan))}</span>'
    if len(plan.rates) > LISTED:
        rates = f"<details><summary>rates</summary>{rates}</details>"
    return f"{escape(label(space, plan))}{rates}"


def _candidates(outcome: Outcome, ranked: Sequence[Evaluation], others: Sequence[Evaluation]) -> str:
    """The table of candidates: trained ones by rank, then the others by number. It has balanced accuracies where they
    are the metric or where classes are uneven."""
    space, constraints, alike = (
        outcome.space,
        outcome.constraints,
        {evaluation.number for evaluation in outcome.undecided},
    )
    balanced = constraints.metric != "accuracy" or any(evaluation.uneven for evaluation in ranked)
    shown = ("quint8 %", "balanced %") if balanced else ("quint8 %",)
    names = ("fp32 %", *shown, "95 % interval", "drop %", "QMSE", "QCE", "KL", "audit", "feasible")
    rows = []
    for rank, evaluation in [*enumerate(ranked, 1), *((None, evaluation) for evaluation in others)]:
        feasible = "yes" if constraints.feasible(evaluation) else "no" if evaluation.state == "complete" else NONE
        reason = "; ".join(
            filter(None, (evaluation.remark, "not distinguishable from the winner" * (evaluation.number in alike)))
        )
        number = (
            f'<a href="#layers-{evaluation.number}">{evaluation.number}</a>'
            if rank and rank <= DETAILED
            else str(evaluation.number)
        )
        state = _ROLES.get(evaluation.role, "trained") if evaluation.state == "complete" else evaluation.state
        rows.append(
            f'<tr id="candidate-{evaluation.number}"{" class=best" if rank == 1 else ""}>'
            f'<td class="number">{rank or NONE}</td><td class="number">{number}</td>'
            f"<td>{_plan(space, evaluation.plan)}</td>"
            f'<td>{escape(state)}<span class="reason">{escape(reason)}</span></td><td>{_training(evaluation)}</td>'
            f"<td>{escape(evaluation.scheme if evaluation.state == 'complete' else NONE)}</td>"
            f'<td class="number" title="{evaluation.cost.conv_macs:,}">{millions(evaluation.cost.conv_macs)}</td>'
            + cells(
                [
                    f"{evaluation.cost.params:,}",
                    *map(_percent, (evaluation.fp32_accuracy, evaluation.quint8_accuracy)),
                    *([_percent(evaluation.quint8_balanced_accuracy)] if balanced else []),
                    interval(evaluation, constraints.metric).partition(",")[0] if evaluation.images else NONE,
                    _percent(evaluation.relative_drop),
                    *map(_number, (evaluation.qmse, evaluation.qce, evaluation.kl)),
                    f"{evaluation.audit.differing:,} of {evaluation.audit.codes:,}" if evaluation.audit else NONE,
                    feasible,
                ]
            )
            + "</tr>"
        )
    return html_table(
        head_row(("rank", "no.", "plan", "state", "training", "quantized with"), ("conv MMAC", "parameters", *names)),
        rows,
    )


_ROLES = {"reference": "reference", "final": "trained on"}


def _training(evaluation: Evaluation) -> str:
    """The cell on training: own epochs, and the parent that the network started from."""
    if not evaluation.epochs:
        return NONE
    epochs = counted(evaluation.epochs, "epoch")
    if evaluation.parent is None:
        return epochs
    zero_shot = (
        f", {percent(evaluation.zero_shot_accuracy)} before" if evaluation.zero_shot_accuracy is not None else ""
    )
    parent = f"from {evaluation.parent} ({evaluation.inherited_epochs} epochs)"
    return f'{epochs}<span class="reason">{parent}{zero_shot}</span>'


def _explained(explanation: Explanation | None, constraints: Constraints) -> list[tuple[str, str]]:
    """Heading and HTML of the section that explains the winner's rates; empty where the policy does not explain."""
    if explanation is None:
        return []
    expected = f"{percent(explanation.expected)} ± {100 * explanation.spread:.2f} points"
    drop = f"a relative drop of {percent(explanation.expected_drop)}"
    intro = f"<p>Of this plan the policy expects {expected}{_metric_name(constraints)} in quint8 and {drop}, from "
    intro += "everything measured so far. Changes of one layer, with all others unchanged:</p>"
    head = (
        "<tr><th>layer</th>" + "".join(f'<th class="number">{name}</th>' for name in _CHOICE_HEAD) + "<th>why</th></tr>"
    )
    rows = []
    for choice in explanation.choices:
        steps = [_step(step) for step in (choice.lower, choice.higher)]
        numbers = cells([str(choice.rate), *steps[0], *steps[1]])
        rows.append(f"<tr>{cells([choice.layer], numbers=False)}{numbers}{cells([choice.reason], numbers=False)}</tr>")
    shares = sorted(explanation.importances.items(), key=lambda item: -item[1])
    bars = "".join(
        f"<tr>{cells([name], numbers=False)}{cells([f'{100 * share:.0f}'])}"
        f'<td><span class="bar" style="width:{max(1, round(200 * share))}px"></span></td></tr>'
        for name, share in shares
    )
    importances = html_table('<tr><th>feature</th><th class="number">share %</th><th></th></tr>', [bars])
    between = "<p>Importance of each feature for the expected accuracy:</p>"
    return [("Why this plan", intro + html_table(head, rows) + between + importances)]


_CHOICE_HEAD = ("rate", "next lower", "MMAC", "points", "next higher", "MMAC", "points")


def _step(step: RateChange | None) -> list[str]:
    if step is None:
        return [NONE] * 3
    return [
        str(step.rate),
        f"{'+' if step.conv_macs > 0 else '-'}{millions(abs(step.conv_macs))}" if step.conv_macs else "0",
        f"{round(100 * step.quint8_accuracy, 2) + 0.0:+.2f}",
    ]  # no -0.00


def _span(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def _layers(evaluation: Evaluation) -> str:
    groups = {
        "": ("layer", "kind"),
        "size": ("MMAC", "parameters"),
        "trained weights": ("range", "precision %"),
        "folded weights": ("range", "precision %"),
        "activations, clipped": ("range", "precision %", "zero %"),
        "SQNR, dB": ("weights", "local", "with all before"),
        "dead channels": ("weights / activations",),
    }
    head = "".join(f'<th colspan="{len(names)}">{group}</th>' for group, names in groups.items())
    names = [name for names in groups.values() for name in names]
    second = "".join(f"<th{'' if name in groups[''] else ' class=number'}>{name}</th>" for name in names)
    rows = [
        "<tr>"
        + f"<td>{_breakable(layer.layer, after='.')}</td>"
        + cells([layer.kind], numbers=False)
        + cells(
            (
                millions(layer.macs),
                f"{layer.params:,}",
                _span(layer.weight_min, layer.weight_max),
                _tenths(100 * layer.weight_precision),
                _span(layer.folded_min, layer.folded_max),
                _tenths(100 * layer.folded_precision),
                _span(layer.activation_min, layer.activation_max),
                *map(_tenths, (100 * layer.activation_precision, 100 * layer.sparsity)),
                *map(_tenths, (layer.weight_sqnr_db, layer.activation_sqnr_db, layer.accumulated_sqnr_db)),
                f"{layer.dead_weight_channels} / {layer.dead_activation_channels}",
            )
        )
        + "</tr>"
        for layer in evaluation.layers
    ]
    return html_table(f"<tr>{head}</tr><tr>{second}</tr>", rows) if rows else '<p class="soft">Not profiled.</p>'


def write_report(
    outcome: Outcome,
    title: str,
    settings: Mapping[str, str],
    pictures: Sequence[Path],
    more: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes ``report.html``.

    Args:
        settings: how the run was searched, name and value.
        pictures: the PNG files of the run's figures (`run_figures`).
        more: further sections, heading and HTML.
    """
    space, best = outcome.space, outcome.winner
    ranked = ranking(outcome.evaluations, outcome.constraints)
    others = sorted(
        (evaluation for evaluation in outcome.evaluations if evaluation not in ranked), key=attrgetter("number")
    )
    if best is not None and all(
        (evaluation.number, evaluation.scheme) != (best.number, best.scheme) for evaluation in ranked
    ):
        ranked = [best, *ranked]  # promoted with another scheme, or from outside the ranking
    rows = [f"<tr><th>{escape(name)}</th>{cells([value], numbers=False)}</tr>" for name, value in settings.items()]
    shown = [picture_html(path.read_bytes(), caption(path.stem), path.stem.replace("_", " ")) for path in pictures]
    nothing = '<p class="soft">Nothing was trained yet.</p>'
    sections = [
        ("", _headline(outcome)),
        ("How it was searched", f'<div class="wide"><table><tbody>{"".join(rows)}</tbody></table></div>'),
        ("Candidates", _candidates(outcome, ranked, others)),
        *_explained(outcome.explanation, outcome.constraints),
        *more,
        ("Figures", f'<div class="pair">{"".join(shown)}</div>' if shown else nothing),
    ]
    layers = []
    if best is not None:
        name = escape(plan_name(space, best))
        built = f"The network as built: {space.name}, {label(space, best.plan)}."
        graph = figure_html(drawing(space, best.plan), built, "graph of the network")
        layers.append(f'<div class="layers"><h3>{name}</h3>{_layers(best)}</div>{graph}')
    for evaluation in ranked[:DETAILED]:
        number, accuracy = evaluation.number, percent(evaluation.quint8_accuracy)
        summary = f"<summary>{number}: {escape(label(space, evaluation.plan))}, {accuracy} in quint8</summary>"
        layers.append(f'<details class="layers" id="layers-{number}">{summary}{_layers(evaluation)}</details>')
    if len(ranked) > DETAILED:
        layers.append(f'<p class="soft">The best {DETAILED} of {len(ranked)}; layers.csv of each has the others.</p>')
    sections.append(("Layers", "".join(layers) or nothing))
    terms = "".join(f"<dt>{term}</dt><dd>{escape(meaning)}</dd>" for term, meaning in GLOSSARY.items())
    sections.append(("Terms", f'<dl class="glossary">{terms}</dl>'))
    write_page(outcome.report, title, sections)
