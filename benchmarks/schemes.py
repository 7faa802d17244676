"""What a quantization scheme costs or saves: the networks of runs, quantized in many ways, no training.

    python benchmarks/schemes.py RUN... [--candidate ID] [--ranges minmax] [--per-channel]

Prints, for every candidate with weights, the quint8 accuracy by range method, with and without cross-layer equalization
and bias correction, on the split that the run measures. The integer networks run in ONNX Runtime, which computes what
the simulator does (`fnet-search audit`), several times faster.
"""

import time
from pathlib import Path

import click
import torch

from fnet_search.arch.plan import label
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.quant.bias_correction import correct_biases
from fnet_search.quant.calibration import CALIBRATION_SAMPLES, CORRECTION_SAMPLES, calibration_batches
from fnet_search.quant.equalize import equalize
from fnet_search.quant.fold import fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import parse_ranges
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.rundir.recorded_run import open_run
from fnet_search.training.datasets import DataSet


def accuracy(network: QuantizedNetwork, data: DataSet) -> float:
    """Share of the run's images whose class ONNX Runtime finds."""
    runtime = Runtime(quantized_model(network), torch.get_num_threads())
    batches = data.evaluation.batches(250)
    return sum(int((runtime(data.normalise(x)).argmax(1) == y).sum()) for x, y in batches) / len(data.evaluation)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--candidate", "candidates", multiple=True, help="Only these; else all with weights.")
@click.option("--ranges", multiple=True, default=["percentile:1", "percentile:0.1", "minmax", "mse"], show_default=True)
@click.option("--per-channel", is_flag=True, help="Weights with a scale a channel.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"))
def main(
    folders: tuple[Path, ...], candidates: tuple[str, ...], ranges: tuple[str, ...], per_channel: bool, data_dir: Path
) -> None:
    """Measures the networks of the runs in FOLDERS under every scheme."""
    for folder in folders:
        opened = open_run(folder)
        networks = [one for one in opened.networks if one.has_weights and one.folder == one.candidate]
        if candidates:
            networks = opened.find(candidates)
        seed = opened.config["seed"]
        data = opened.data(data_dir, lambda done, total: None)
        weights = "a weight scale a channel" if per_channel else "a weight scale a tensor"
        click.echo(f"{folder.name}: {len(data.evaluation):,} {opened.split} images, {weights}")
        click.echo("quint8 %; E: equalized, B: bias corrected; s: seconds a scheme")
        columns = "".join(f"{name:>8}" for name in ("plain", "B", "E", "E+B"))
        click.echo(f"{'plan':10} {'fp32 %':>7} {'ranges':15}{columns}{'s':>6}")
        for network in networks:
            trained = network.load_trained(opened.space)
            which = label(opened.space, network.evaluation.plan)[:10]
            for name in ranges:
                start, found = time.monotonic(), []
                for equalized in (False, True):
                    folded = equalize(fold(trained)) if equalized else fold(trained)
                    stats = calibrate(folded, calibration_batches(data, seed, CALIBRATION_SAMPLES), parse_ranges(name))
                    plain = quantize(folded, stats, per_channel)
                    few = calibration_batches(data, seed, CORRECTION_SAMPLES)
                    corrected = correct_biases(folded, plain, few)
                    found += [f"{100 * accuracy(one, data):8.2f}" for one in (plain, corrected)]
                seconds = (time.monotonic() - start) / len(found)
                fp32 = f"{100 * (network.evaluation.fp32_accuracy or 0):7.2f}"
                click.echo(f"{which:10} {fp32} {name:15}" + "".join(found) + f"{seconds:6.0f}")


if __name__ == "__main__":
    main()
