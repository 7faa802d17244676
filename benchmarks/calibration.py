"""What calibration takes: seconds and peak memory, by range method and number of samples.

    python benchmarks/calibration.py RUN --candidate ID

Each line is a process of its own; memory is all that it ever held, with torch, the data set and the network. It does
not grow with the samples, since histograms are kept and tensors are not.
"""

import multiprocessing
import resource
import time
from pathlib import Path

import click
import torch

from fnet_search.quant.calibration import calibration_batches
from fnet_search.quant.fold import fold
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import parse_ranges
from fnet_search.rundir.recorded_run import open_run


def calibrated(folder: Path, candidate: str, data_dir: Path, ranges: str, samples: int) -> None:
    """Prints a line."""
    opened = open_run(folder)
    (network,) = opened.find([candidate])
    data = opened.data(data_dir, lambda done, total: None)
    folded = fold(network.load_trained(opened.space))
    before = peak()
    start = time.monotonic()
    calibrate(folded, calibration_batches(data, opened.config["seed"], samples), parse_ranges(ranges))
    seconds = time.monotonic() - start
    click.echo(f"{ranges:15} {samples:8,} {seconds:8.1f} {before:10,.0f} {peak():10,.0f}")


def peak() -> float:
    """The most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--candidate", required=True)
@click.option("--ranges", multiple=True, default=["minmax", "percentile:1", "mse"], show_default=True)
@click.option("--samples", multiple=True, type=int, default=[1024, 4096], show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"))
def main(folder: Path, candidate: str, ranges: tuple[str, ...], samples: tuple[int, ...], data_dir: Path) -> None:
    """Calibrates a network of the run in FOLDER."""
    click.echo(f"{folder.name}, network {candidate}, {torch.get_num_threads()} threads")
    click.echo(f"{'ranges':15} {'samples':>8} {'seconds':>8} {'MB before':>10} {'MB peak':>10}")
    context = multiprocessing.get_context("spawn")
    for name in ranges:
        for count in samples:
            process = context.Process(target=calibrated, args=(folder, candidate, data_dir, name, count))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
