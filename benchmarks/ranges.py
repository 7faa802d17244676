"""What clipping costs: the networks of a run, quantized again with other activation ranges, no training.

    python benchmarks/ranges.py RUN [--ranges percentile:1 --ranges percentile:0.1 --ranges minmax]

Prints fp32 and quint8 accuracy and the relative drop of every candidate whose weights the run still has, on the split
that the run measures. For the design's section 3: all of the drop comes from clipping the hidden activations.
"""

from pathlib import Path

import click
import torch

from fnet_search.data import hold_out, load_dataset
from fnet_search.evaluate import CALIBRATION_SAMPLES, WEIGHTS, calibration, load_candidate, measure
from fnet_search.files import read_json
from fnet_search.macro import parse_space
from fnet_search.plan import label
from fnet_search.policy import Evaluation
from fnet_search.quantize import quantize
from fnet_search.ranges import calibrate, parse_ranges
from fnet_search.runfolder import RunFolder


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--ranges", multiple=True, default=["percentile:1", "percentile:0.1", "minmax"], show_default=True)
def main(folder: Path, ranges: tuple[str, ...]) -> None:
    """Measures the networks of the run in FOLDER under several range methods."""
    config = RunFolder(folder).config()
    space = parse_space(config["space"]).with_classes(len(config["data"]["classes"]))
    data = load_dataset(config["dataset"], space.input_shape)
    if config["split"] == "validation":
        data = hold_out(data)
    click.echo(f"{folder.name}: {len(data.evaluation):,} images, {torch.get_num_threads()} threads")
    click.echo(f"{'plan':12} {'ranges':16} {'fp32 %':>8} {'quint8 %':>9} {'drop %':>7} {'QMSE':>9}")
    for path in sorted((folder / "candidates").glob(f"*/{WEIGHTS}")):
        evaluation = Evaluation.from_json(read_json(path.parent / "evaluation.json"))
        folded, _ = load_candidate(space, evaluation.plan, path.parent)
        for name in ranges:
            samples = calibration(data, config["seed"], CALIBRATION_SAMPLES)
            found = measure(
                folded, quantize(folded, calibrate(folded, samples, parse_ranges(name))), data, data.evaluation
            )
            drop = (found.fp32_accuracy - found.quint8_accuracy) / found.fp32_accuracy
            shares = f"{100 * found.fp32_accuracy:8.2f} {100 * found.quint8_accuracy:9.2f} {100 * drop:7.2f}"
            click.echo(f"{label(space, evaluation.plan)[:12]:12} {name:16} {shares} {found.qmse:9.4f}")


if __name__ == "__main__":
    main()
