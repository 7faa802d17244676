"""Puts together what was measured in several folders of the paper's study, as on several machines.

    python studies/paper/collect.py [FOLDER ...]

takes over the rows of networks.csv and layers.csv of each folder into the files beside this script (a network that is
measured again replaces the old rows), then draws the figures from them and prints the table of RESULTS.md, both with
the paper's ranges; `claims.py` sets the others beside them.
"""

import sys
from pathlib import Path

import pandas as pd
from PIL import Image

from fnet_search.arch.plan import parse_plan
from fnet_search.comparison.definition import Comparison, Part, load_comparison
from fnet_search.comparison.result_figures import result_figures
from fnet_search.comparison.results import ComparedNetwork, markdown, result_rows, result_table
from fnet_search.policy.evaluation import Audit, Evaluation, LayerStats
from fnet_search.report.style import save_png

HERE = Path(__file__).parent
KEY = ["plan", "seed", "scheme"]


def collect(name: str, comparison: Comparison, folders: list[Path]) -> pd.DataFrame:
    """The rows of all folders, in the order of the comparison; of several with the same key the last one. Also written
    to the file beside this script."""
    kept = pd.DataFrame()
    for folder in [HERE, *folders]:
        new = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, dtype=str)
        if len(kept):
            again = pd.MultiIndex.from_frame(kept[KEY]).isin(pd.MultiIndex.from_frame(new[KEY]))
            kept = kept[~again]
        kept = pd.concat([kept, new])
    schemes = list(load_comparison("clipping").schemes)
    order = {"plan": comparison.plans.index, "scheme": schemes.index, "seed": int}
    kept = kept.sort_values(list(order), key=lambda column: column.map(order[str(column.name)]), kind="stable")
    kept.to_csv(HERE / f"{name}.csv", index=False, lineterminator="\n")
    return pd.read_csv(HERE / f"{name}.csv")


def measured(comparison: Comparison, networks: pd.DataFrame, layers: pd.DataFrame) -> list[ComparedNetwork]:
    """The networks of the rows, as `compared_networks` gives them."""
    variant = comparison.variants[0]
    measured_networks = []
    for row in networks.itertuples():
        own = layers[(layers[KEY] == [row.plan, row.seed, row.scheme]).all(axis=1)].drop(columns=["variant", *KEY])
        stats = own.astype(object).where(own.notna(), None).to_dict("records")
        evaluation = Evaluation.of(
            variant.space,
            parse_plan(variant.space, row.plan),
            split="test",
            scheme=row.scheme,
            **{name: getattr(row, name) for name in ("fp32_accuracy", "quint8_accuracy", "qmse", "qce", "kl")},
            audit=Audit(codes=row.audited_codes, differing=row.differing_codes),
            layers=tuple(LayerStats(**{str(key): value for key, value in layer.items()}) for layer in stats),
        )
        measured_networks.append(ComparedNetwork(Part(variant, row.seed), row.plan, row.scheme, evaluation))
    return measured_networks


def main(folders: list[Path]) -> None:
    comparison = load_comparison("paper")
    networks, layers = (collect(name, comparison, folders) for name in ("networks", "layers"))
    listed = result_rows(comparison, measured(comparison, networks, layers))
    for name, figure in result_figures(comparison, listed).items():
        save_png(figure, HERE / name)
        Image.open(HERE / name).convert("RGB").quantize(128).save(HERE / name, optimize=True)
    print(markdown(result_table(comparison, listed)))


if __name__ == "__main__":
    main(list(map(Path, sys.argv[1:])))
