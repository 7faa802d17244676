"""What choosing the scheme takes: quantizing with the paper's one, and with the best of several, side by side.

    python benchmarks/choice.py RUN

Of each network with weights: both once a round, in turn, on one thread as a worker has it; CPU seconds, and the median
of the rounds' ratios. Then what it adds to the time that the candidate took (timings.csv).
"""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from machine import machine, ratio, spread

from fnet_search.arch.plan import label
from fnet_search.quant.calibration import Quantized, calibrate_for, quantize_trained
from fnet_search.quant.scheme import CHOICE, PAPER
from fnet_search.quant.scheme_choice import least_divergent
from fnet_search.rundir.recorded_run import open_run
from fnet_search.training.datasets import DataSet
from fnet_search.training.network import Network


def seconds(work: Callable[[], Quantized]) -> tuple[float, Quantized]:
    """CPU seconds, which a busy machine does not stretch as much, and what came out."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def best(trained: Network, data: DataSet, seed: int) -> Quantized:
    return least_divergent(calibrate_for(trained, CHOICE, data, seed), CHOICE, data, seed)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"))
def main(folder: Path, rounds: int, data_dir: Path) -> None:
    """Quantizes the networks of the run in FOLDER."""
    torch.set_num_threads(1)
    opened = open_run(folder)
    data, seed = opened.data(data_dir, lambda done, total: None), opened.config["seed"]
    with (folder / "timings.csv").open() as lines:
        took = {int(line["number"]): float(line["seconds"]) for line in csv.DictReader(lines)}
    click.echo(f"{machine('torch')}; {folder.name}, {len(data.train):,} training images, one thread, {rounds} rounds")
    for network in opened.networks:
        if network.folder != network.candidate or not network.has_weights:
            continue
        trained = network.load_trained(opened.space)
        ours, papers = [], []
        for _ in range(rounds):
            papers.append(seconds(lambda: quantize_trained(trained, PAPER, data, seed))[0])  # noqa: B023 (called at once)
            took_now, chosen = seconds(lambda: best(trained, data, seed))  # noqa: B023
            ours.append(took_now)
        added = spread(ours).median - spread(papers).median
        share = 100 * added / took[network.evaluation.number]
        click.echo(
            f"{network.id} ({label(opened.space, network.evaluation.plan)}): paper {spread(papers)} s, best of "
            f"{len(CHOICE)} {spread(ours)} s, ratio {ratio(ours, papers)}; {added:+.1f} s, {share:+.1f} % of the "
            f"{took[network.evaluation.number]:.0f} s that the candidate took; chosen: {chosen.scheme}"
        )


if __name__ == "__main__":
    main()
