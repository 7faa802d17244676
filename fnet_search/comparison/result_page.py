"""The page of a comparison's results, results.md, with its figures and CSV files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fnet_search.base.files import write_text
from fnet_search.comparison.definition import Comparison, Part
from fnet_search.comparison.result_figures import result_figures
from fnet_search.comparison.results import (
    ResultRow,
    compared_networks,
    layers_frame,
    markdown,
    networks_frame,
    result_remarks,
    result_rows,
    result_table,
)
from fnet_search.report.style import (
    save_png,
)
from fnet_search.rundir.recorded_run import RecordedRun
from fnet_search.rundir.run_folder import versions
from fnet_search.training.numerics import Numerics

RESULTS = "results.md"

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
