"""The figure of probes."""

import numpy as np
from matplotlib.figure import Figure

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import label, legal_rates
from fnet_search.policy.evaluation import Probes
from fnet_search.report.style import (
    heading,
    new_figure,
)


def probes_figure(space: Macroarchitecture, probes: Probes) -> Figure:
    """Heat maps, layers by rates, of the probes: the noise that each change adds to the float and to the quantized
    logits, and its quint8 loss, with the number in each cell. Cells are empty for rates that are not legal or cannot
    start from the probed network."""
    panels = {
        "noise of the fp32 logits (%)": probes.increase(space, lambda probe: 100 * probe.logit_noise),
        "more noise of the quint8 logits (%)": probes.increase(space, lambda probe: 100 * probe.quint8_logit_noise),
        "more quint8 loss (0.001 nats)": probes.increase(space, lambda probe: 1000 * probe.quint8_loss),
    }
    legal = legal_rates(space)
    rates = sorted({rate for of in legal.values() for rate in of})
    figure = new_figure(0.9 + len(panels) * (0.75 + 0.2 * len(legal)), 7.2)
    heading(figure, f"One layer changed, nothing trained: {space.name}, from {label(space, probes.plan)}")
    for axes, (title, increases) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        cells = np.full((len(legal), len(rates)), np.nan)
        for row, (layer, of) in enumerate(legal.items()):
            for rate, value in zip(of, increases[layer], strict=True):
                if rate % probes.plan[layer] == 0:
                    cells[row, rates.index(rate)] = value
        top = max(float(np.nanquantile(np.abs(cells), 0.97)), 1e-12)  # a single outlier leaves the others their colour
        axes.imshow(cells, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
        for row, column in zip(*np.nonzero(np.isfinite(cells)), strict=True):
            value = cells[row, column]
            colour = "white" if abs(value) > 0.65 * top else "black"
            axes.text(column, row, f"{value:.2g}", color=colour, fontsize=6.5, ha="center", va="center")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xticks(range(len(rates)), [str(rate) for rate in rates], fontsize=7.5)
        axes.set_yticks(range(len(legal)), list(legal), fontsize=7.5, parse_math=False)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("rate f", fontsize=9)
    return figure
