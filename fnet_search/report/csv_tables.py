"""The tables of a run as CSV: candidates, layers, probes, choices, front."""

from collections.abc import Iterable, Mapping
from csv import writer
from dataclasses import asdict, fields
from io import StringIO
from typing import Any

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import label
from fnet_search.policy.constraints import Constraints
from fnet_search.policy.evaluation import Evaluation, LayerStats, Probes
from fnet_search.policy.explanation import Explanation

# The tables: candidates.csv and layers.csv

COLUMNS: dict[str, type] = {
    "number": int,
    "plan": str,
    "label": str,
    "role": str,
    "state": str,
    "reason": str,
    "feasible": bool,
    "split": str,
    "validation": str,
    "scheme": str,
    "epochs": int,
    "trained_images": int,
    "parent": int,
    "inherited_epochs": int,
    "zero_shot_accuracy": float,
    "last_epoch_accuracy": float,
    "conv_macs": int,
    "total_macs": int,
    "params": int,
    "images": int,
    "fp32_accuracy": float,
    "quint8_accuracy": float,
    "fp32_balanced_accuracy": float,
    "quint8_balanced_accuracy": float,
    "fp32_loss": float,
    "quint8_loss": float,
    "common_scheme": str,
    "common_quint8_accuracy": float,
    "qmse": float,
    "qce": float,
    "kl": float,
    "relative_drop": float,
    "audited_codes": int,
    "differing_codes": int,
}


def candidate_line(space: Macroarchitecture, constraints: Constraints, evaluation: Evaluation) -> str:
    """A line of candidates.csv. Accuracies and drops are fractions of 1, losses in nats; values that were not measured
    are empty. The columns ``common_*`` hold what policies learn from: the candidate under the common scheme.
    """
    common = (evaluation.common or evaluation) if evaluation.state == "complete" else None
    derived = {
        "images": evaluation.images or None,
        "common_scheme": common and common.scheme,
        "common_quint8_accuracy": common and common.quint8_accuracy,
        "label": label(space, evaluation.plan),
        "reason": evaluation.remark,
        "feasible": constraints.feasible(evaluation),
        "last_epoch_accuracy": evaluation.accuracies[-1] if evaluation.accuracies else None,
        "audited_codes": evaluation.audit and evaluation.audit.codes,
        "differing_codes": evaluation.audit and evaluation.audit.differing,
        **vars(evaluation.cost),
    }
    return _line(COLUMNS, {name: derived[name] if name in derived else getattr(evaluation, name) for name in COLUMNS})


def candidates_csv(lines: Mapping[int, str]) -> str:
    """candidates.csv from the lines of all candidates, by number."""
    return _head(COLUMNS) + "".join(lines[number] for number in sorted(lines))


def layers_csv(evaluation: Evaluation) -> str:
    """layers.csv: a line for each convolution and dense layer, a column for each field of LayerStats. An SQNR is empty
    where there is no noise or no signal."""
    types = {field.name: field.type if field.type in (str, int) else float for field in fields(LayerStats)}
    return _head(types) + "".join(_line(types, asdict(layer)) for layer in evaluation.layers)


_STEP: dict[str, type] = {"rate": int, "conv_macs": int, "quint8_accuracy": float}

PROBE_COLUMNS: dict[str, type] = {
    "layer": str,
    "rate": int,
    "conv_macs": int,
    "conv_macs_saved": int,
    "images": int,
    **dict.fromkeys(("loss", "quint8_loss", "fp32_accuracy", "quint8_accuracy"), float),
    **dict.fromkeys(("logit_snr_db", "logit_sqnr_db", "folded_range", "folded_precision"), float),
    **dict.fromkeys(("activation_range", "activation_precision", "fisher"), float),
}


def probes_csv(probes: Probes) -> str:
    """probes.csv: a line for the unchanged network, then one for each change of a layer's rate. Losses in nats. Ranges
    and precisions are the widest and the lowest among the convolutions that replace the layer; empty: not measured."""
    lines = [_head(PROBE_COLUMNS)]
    for probe in (probes.unchanged, *probes.changes):
        derived = {
            "conv_macs_saved": probes.unchanged.conv_macs - probe.conv_macs,
            "folded_range": max((part.folded_max - part.folded_min for part in probe.layers), default=None),
            "folded_precision": min((part.folded_precision for part in probe.layers), default=None),
            "activation_range": max((part.activation_max - part.activation_min for part in probe.layers), default=None),
            "activation_precision": min((part.activation_precision for part in probe.layers), default=None),
        }
        lines.append(_line(PROBE_COLUMNS, {**vars(probe), **derived}))
    return "".join(lines)


CHOICE_COLUMNS: dict[str, type] = {
    "layer": str,
    "rate": int,
    **{f"{side}_{name}": kind for side in ("lower", "higher") for name, kind in _STEP.items()},
    "reason": str,
}


def choices_csv(explanation: Explanation) -> str:
    """choices.csv: a line for each layer. Columns of the next lower and higher rate hold the change in conv MACs and in
    expected quint8 accuracy (fraction of 1) against the plan; empty where there is no such rate."""
    lines = [_head(CHOICE_COLUMNS)]
    for choice in explanation.choices:
        steps = {"lower": choice.lower, "higher": choice.higher}
        derived = {f"{side}_{name}": getattr(step, name, None) for side, step in steps.items() for name in _STEP}
        lines.append(_line(CHOICE_COLUMNS, {**vars(choice), **derived, "reason": choice.reason}))
    return "".join(lines)


FRONT_COLUMNS: dict[str, type] = {"conv_macs": int, "expected_quint8_accuracy": float, "plan": str}


def front_csv(explanation: Explanation) -> str:
    """front.csv: a line for each plan on the front of conv MACs and expected quint8 accuracy (fraction of 1), by
    MACs."""
    rows = (dict(zip(FRONT_COLUMNS, (macs, expected, plan), strict=True)) for plan, macs, expected in explanation.front)
    return "".join([_head(FRONT_COLUMNS), *(_line(FRONT_COLUMNS, row) for row in rows)])


def _head(columns: Iterable[str]) -> str:
    return _line(dict.fromkeys(columns, str), {name: name for name in columns})


def _line(columns: Mapping[str, Any], values: Mapping[str, object]) -> str:
    """A line of a CSV file, `columns` being types; None is an empty cell. Without pandas, which takes milliseconds for
    a table: candidates.csv is written after every candidate."""
    text = StringIO()
    cells = ("" if values[name] is None else kind(values[name]) for name, kind in columns.items())
    writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
