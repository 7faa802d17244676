"""The report of a run: its tables as CSV, and one HTML page that needs nothing but itself."""

from collections.abc import Mapping, Sequence
from html import escape
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
from fnet_search.report.html_page import NONE, cells, heads, picture, png, table, write_page
from fnet_search.report.outcome import Outcome, span
from fnet_search.report.style import plan_name

DETAILED = 30  # candidates whose layers the page shows; those of all are in their folders
LISTED = 8  # rates that stand below a plan's short name; those of longer plans are shown on a click


# The page

STATES = {"complete": "trained", "pruned": "stopped early", "refused": "refused before training", "failed": "failed"}
"""What a state is called."""

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


def _of(constraints: Constraints) -> str:
    """The metric, where it is not what everybody expects."""
    return "" if constraints.metric == "accuracy" else f" {constraints.measured}"


def _headline(outcome: Outcome) -> str:
    space, constraints, best, split = outcome.space, outcome.constraints, outcome.winner, outcome.split
    states = [str(one.state) for one in outcome.evaluations if one.role == "candidate"]
    counts = [(state, states.count(state)) for state in STATES]
    summary = ", ".join(f"{count} {STATES[state]}" for state, count in counts if count) or "none yet"
    images = sum(one.trained_images for one in outcome.evaluations)
    candidates = f'<p class="soft">Candidates: {summary}. Images trained on in all: {images:,}.</p>'
    notes = "".join(f'<p class="caution">{escape(text[0].upper() + text[1:])}.</p>' for text in outcome.cautions)
    if best is None:
        trained = any(one.state == "complete" and one.role != "reference" for one in outcome.evaluations)
        given = f"Given plans, each measured on the {split} split: none of them is a winner."
        return f'<p class="verdict">{given if trained else "No candidate was trained."}</p>{notes}{candidates}'
    name = f"<strong>{escape(label(space, best.plan))}</strong>"
    if outcome.feasible:
        score = percent(best.scores(constraints.metric).quint8)
        verdict = f"{name} won: {score}{_of(constraints)} in quint8 at {millions(best.cost.conv_macs)} MMAC."
        checked = f" (checked on {outcome.measured_on})" if constraints.on_images else ""
        verdict += f" It meets every constraint{escape(checked)}." if constraints.described() else ""
        verdict += _alike(outcome)
    else:
        missed = "; ".join(constraints.misses(best, outcome.measured_on))
        verdict = f"No candidate met the constraints; nearest is {name}: {escape(missed)}."
    for one in (best, outcome.test):
        if one is not None and one.constant:
            verdict += f" <strong>On the {one.split} split {escape(one.constant)}.</strong>"
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
    for one, where in ((best, split), (outcome.test, "test")):
        if one is not None and (one is best or split != "test"):
            cards += [
                (
                    f"quint8 accuracy, {where}",
                    percent(one.quint8_accuracy) or NONE,
                    f"95 % interval {span(one, constraints.metric)}" if one.images else "",
                ),
                (
                    f"fp32 accuracy, {where}",
                    percent(one.fp32_accuracy) or NONE,
                    f"drop {percent(one.relative_drop)}",
                ),
            ]
            if one.uneven or constraints.metric != "accuracy":
                fp32, quint8 = one.scores("balanced-accuracy")
                cards.append((f"quint8 balanced accuracy, {where}", percent(quint8), f"fp32 {percent(fp32)}"))
    shown = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for term, value, note in cards
    )
    plan = f'<p class="plan">{_breakable(str(best.plan))}</p>'
    return f'<p class="verdict">{verdict}</p>{notes}{plan}<dl class="cards">{shown}</dl>{candidates}'


def _alike(outcome: Outcome) -> str:
    """Which candidates are as good, as far as the images tell."""
    numbers = [one.number for one in outcome.undecided]
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
    """Trained candidates by rank, then the others by number; balanced accuracy where it counts or classes are
    uneven."""
    space, constraints, alike = outcome.space, outcome.constraints, {one.number for one in outcome.undecided}
    balanced = constraints.metric != "accuracy" or any(one.uneven for one in ranked)
    shown = ("quint8 %", "balanced %") if balanced else ("quint8 %",)
    names = ("fp32 %", *shown, "95 % interval", "drop %", "QMSE", "QCE", "KL", "audit", "feasible")
    rows = []
    for rank, one in [*enumerate(ranked, 1), *((None, one) for one in others)]:
        feasible = "yes" if constraints.feasible(one) else "no" if one.state == "complete" else NONE
        reason = "; ".join(filter(None, (one.remark, "not distinguishable from the winner" * (one.number in alike))))
        number = f'<a href="#layers-{one.number}">{one.number}</a>' if rank and rank <= DETAILED else str(one.number)
        state = _ROLES.get(one.role, "trained") if one.state == "complete" else one.state
        rows.append(
            f'<tr id="candidate-{one.number}"{" class=best" if rank == 1 else ""}>'
            f'<td class="number">{rank or NONE}</td><td class="number">{number}</td>'
            f"<td>{_plan(space, one.plan)}</td>"
            f'<td>{escape(state)}<span class="reason">{escape(reason)}</span></td><td>{_training(one)}</td>'
            f"<td>{escape(one.scheme if one.state == 'complete' else NONE)}</td>"
            f'<td class="number" title="{one.cost.conv_macs:,}">{millions(one.cost.conv_macs)}</td>'
            + cells(
                [
                    f"{one.cost.params:,}",
                    *map(_percent, (one.fp32_accuracy, one.quint8_accuracy)),
                    *([_percent(one.quint8_balanced_accuracy)] if balanced else []),
                    span(one, constraints.metric).partition(",")[0] if one.images else NONE,
                    _percent(one.relative_drop),
                    *map(_number, (one.qmse, one.qce, one.kl)),
                    f"{one.audit.differing:,} of {one.audit.codes:,}" if one.audit else NONE,
                    feasible,
                ]
            )
            + "</tr>"
        )
    return table(
        heads(("rank", "no.", "plan", "state", "training", "quantized with"), ("conv MMAC", "parameters", *names)), rows
    )


_ROLES = {"reference": "reference", "final": "trained on"}


def _training(one: Evaluation) -> str:
    """Epochs of its own, and what it started from."""
    if not one.epochs:
        return NONE
    epochs = counted(one.epochs, "epoch")
    if one.parent is None:
        return epochs
    zero_shot = f", {percent(one.zero_shot_accuracy)} before" if one.zero_shot_accuracy is not None else ""
    return f'{epochs}<span class="reason">from {one.parent} ({one.inherited_epochs} epochs){zero_shot}</span>'


def _explained(explanation: Explanation | None, constraints: Constraints) -> list[tuple[str, str]]:
    """Heading and HTML of why the winner is what it is; nothing where the policy does not say."""
    if explanation is None:
        return []
    expected = f"{percent(explanation.expected)} ± {100 * explanation.spread:.2f} points"
    drop = f"a relative drop of {percent(explanation.expected_drop)}"
    intro = f"<p>Of this plan the policy expects {expected}{_of(constraints)} in quint8, and {drop}, by all that it "
    intro += "has seen. Steps of one layer, all others unchanged:</p>"
    head = (
        "<tr><th>layer</th>" + "".join(f'<th class="number">{name}</th>' for name in _CHOICE_HEAD) + "<th>why</th></tr>"
    )
    rows = []
    for one in explanation.choices:
        steps = [_step(step) for step in (one.lower, one.higher)]
        numbers = cells([str(one.rate), *steps[0], *steps[1]])
        rows.append(f"<tr>{cells([one.layer], numbers=False)}{numbers}{cells([one.reason], numbers=False)}</tr>")
    shares = sorted(explanation.importances.items(), key=lambda item: -item[1])
    bars = "".join(
        f"<tr>{cells([name], numbers=False)}{cells([f'{100 * share:.0f}'])}"
        f'<td><span class="bar" style="width:{max(1, round(200 * share))}px"></span></td></tr>'
        for name, share in shares
    )
    importances = table('<tr><th>feature</th><th class="number">share %</th><th></th></tr>', [bars])
    between = "<p>What the expectation rests on:</p>"
    return [("Why this plan", intro + table(head, rows) + between + importances)]


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
        + f"<td>{_breakable(one.layer, after='.')}</td>"
        + cells([one.kind], numbers=False)
        + cells(
            (
                millions(one.macs),
                f"{one.params:,}",
                _span(one.weight_min, one.weight_max),
                _tenths(100 * one.weight_precision),
                _span(one.folded_min, one.folded_max),
                _tenths(100 * one.folded_precision),
                _span(one.activation_min, one.activation_max),
                *map(_tenths, (100 * one.activation_precision, 100 * one.sparsity)),
                *map(_tenths, (one.weight_sqnr_db, one.activation_sqnr_db, one.accumulated_sqnr_db)),
                f"{one.dead_weight_channels} / {one.dead_activation_channels}",
            )
        )
        + "</tr>"
        for one in evaluation.layers
    ]
    return table(f"<tr>{head}</tr><tr>{second}</tr>", rows) if rows else '<p class="soft">Not profiled.</p>'


def write_report(
    outcome: Outcome,
    title: str,
    settings: Mapping[str, str],
    pictures: Sequence[Path],
    more: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes ``report.html``: the winner (or nearest); how it was found (`settings`); every candidate; why the winner,
    where its policy says; `more` sections, heading and HTML; the `pictures` that `figures` were saved as."""
    space, best = outcome.space, outcome.winner
    ranked = ranking(outcome.evaluations, outcome.constraints)
    others = sorted((one for one in outcome.evaluations if one not in ranked), key=lambda one: one.number)
    if best is not None and all((one.number, one.scheme) != (best.number, best.scheme) for one in ranked):
        ranked = [best, *ranked]  # it was promoted
    rows = [f"<tr><th>{escape(name)}</th>{cells([value], numbers=False)}</tr>" for name, value in settings.items()]
    shown = [picture(one.read_bytes(), caption(one.stem), one.stem.replace("_", " ")) for one in pictures]
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
        graph = png(drawing(space, best.plan), built, "graph of the network")
        layers.append(f'<div class="layers"><h3>{name}</h3>{_layers(best)}</div>{graph}')
    for one in ranked[:DETAILED]:
        summary = f"{one.number}: {escape(label(space, one.plan))}, {percent(one.quint8_accuracy)} in quint8"
        layers.append(
            f'<details class="layers" id="layers-{one.number}"><summary>{summary}</summary>{_layers(one)}</details>'
        )
    if len(ranked) > DETAILED:
        layers.append(f'<p class="soft">The best {DETAILED} of {len(ranked)}; layers.csv of each has the others.</p>')
    sections.append(("Layers", "".join(layers) or nothing))
    terms = "".join(f"<dt>{term}</dt><dd>{escape(meaning)}</dd>" for term, meaning in GLOSSARY.items())
    sections.append(("Terms", f'<dl class="glossary">{terms}</dl>'))
    write_page(outcome.report, title, sections)
