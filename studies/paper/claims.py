"""What the discussion of the paper (section 4) claims, in numbers of a study of its networks.

    python studies/paper/claims.py runs/study-paper-cifar10

reads networks.csv and layers.csv in a study's folder and prints Markdown tables: accuracies and drops a range method,
and what the layers look like. Early layers: the stem, and those of 64 channels.
"""

import sys
from pathlib import Path

import pandas as pd

from fnet_search.comparison.results import markdown

EARLY = ("conv_in", "conv_64")
IMAGES = 10_000
"""Test images of CIFAR-10, for the sampling noise of an accuracy."""


def table(frame: pd.DataFrame, digits: int = 2) -> str:
    """A frame as Markdown, its index first."""
    head = ["network", *map(str, frame.columns)]
    texts = (
        [name, *("-" if pd.isna(one) else f"{one:.{digits}f}" for one in row)] for name, *row in frame.itertuples()
    )
    return markdown([head, *texts])


def by_scheme(networks: pd.DataFrame, value: str) -> pd.DataFrame:
    """In percent, mean over seeds: a row a network, a column a range method; in the order of the file."""
    found = networks.pivot_table(index="plan", columns="scheme", values=value, sort=False)
    return 100 * found[list(dict.fromkeys(networks["scheme"]))]


def noise(accuracy: float) -> float:
    """Half the width of the 95 % interval of an accuracy in percent."""
    share = accuracy / 100
    return 196 * float(share * (1 - share) / IMAGES) ** 0.5


def layer_facts(layers: pd.DataFrame) -> pd.DataFrame:
    """A row a network, of the first range method: mean over seeds, and over layers unless said otherwise."""
    first = layers[layers["scheme"] == layers["scheme"].iloc[0]].copy()
    first["trained"] = first["weight_max"] - first["weight_min"]
    first["folded"] = first["folded_max"] - first["folded_min"]
    first["growth"] = first["folded"] / first["trained"]
    first["activations"] = first["activation_max"] - first["activation_min"]
    stem, early = first["layer"] == "conv_in", first["layer"].str.startswith(EARLY)
    columns = {
        "trained range": (first, "trained", "median"),
        "folded range": (first, "folded", "median"),
        "folded range, early": (first[early], "folded", "median"),
        "folded range, first layer": (first[stem], "folded", "mean"),
        "growth by folding, early": (first[early], "growth", "median"),
        "growth, first layer": (first[stem], "growth", "mean"),
        "growth, other layers": (first[~early], "growth", "median"),
        "folded precision (%)": (first, "folded_precision", "mean"),
        "folded precision, early (%)": (first[early], "folded_precision", "mean"),
        "folded precision, first layer (%)": (first[stem], "folded_precision", "mean"),
        "activation range": (first, "activations", "median"),
    }
    found = {
        name: frame.groupby("plan", sort=False)[column].agg(how) * (100 if "%" in name else 1)
        for name, (frame, column, how) in columns.items()
    }
    return pd.DataFrame(found).loc[list(dict.fromkeys(first["plan"]))]


def main(folder: Path) -> None:
    networks, layers = (pd.read_csv(folder / f"{name}.csv") for name in ("networks", "layers"))
    for title, value in (("quint8 accuracy (%)", "quint8_accuracy"), ("relative drop (%)", "relative_drop")):
        print(f"\n{title}, by range method\n\n{table(by_scheme(networks, value))}")
    fp32 = by_scheme(networks, "fp32_accuracy").iloc[:, 0]
    print(f"\nf2 less init2 in fp32: {fp32['f2'] - fp32['init2']:+.2f} points", end="")
    print(f" (95 % of the difference of two such accuracies: {2**0.5 * noise(fp32['f2']):.2f})")
    for scheme, column in by_scheme(networks, "quint8_accuracy").loc[["f2", "init2"]].dropna(axis=1).items():
        print(f"f2 less init2 in quint8, {scheme}: {column['f2'] - column['init2']:+.2f} points")
    print(f"\nlayers, {layers['scheme'].iloc[0]}\n\n{table(layer_facts(layers))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
