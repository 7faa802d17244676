"""Claim: the fast way of training costs no accuracy: after the same epochs it is that of the plain way within noise.

    python benchmarks/same_accuracy.py imagefolder:PATH [--plans f4] [--images 10000] [--epochs 3] [--seeds 0 1 2]

Plain: float32, torchvision's transforms image by image, unfused SGD. Ours: `train.train` with the numerics that this
machine is fast with, or those of another dtype. Both: recipe quick, the same initial weights for a seed, single-thread
processes, accuracies of `evaluate.measure` on 2,000 test images. The interval is Student's, 95 %, of the paired
differences over seeds.
"""

import argparse
import math
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from machine import machine
from scipy.stats import t
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from fnet_search.arch.factorize import factorize
from fnet_search.arch.plan import parse_plan
from fnet_search.candidates.measure import measure_split
from fnet_search.candidates.processes import environment
from fnet_search.candidates.worker_count import cores
from fnet_search.importing.spaces import load_space
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.scheme import Scheme
from fnet_search.training.datasets import DataSet, load_dataset
from fnet_search.training.network import Network, build
from fnet_search.training.numerics import Numerics, resolve
from fnet_search.training.recipe import Recipe, load_recipe
from fnet_search.training.train import Checkpoint, settle, train

SPACE = "factorizenet"


@dataclass(frozen=True)
class Training:
    dataset: str
    images: int
    plan: str
    seed: int
    epochs: int
    numerics: Numerics | None
    """None: the plain way."""

    def __call__(self) -> tuple[float, float]:
        """fp32 and quint8 accuracy in %."""
        torch.set_num_threads(1)
        space = load_space(SPACE)
        data = load_dataset(self.dataset, space.input_shape, Path("data"))
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: self.images]
        data = replace(data, train=data.train.take(chosen))
        space = space.with_classes(len(data.classes))
        recipe = load_recipe("quick").with_epochs(self.epochs)
        network = build(factorize(space, parse_plan(space, self.plan)), recipe.initializer, self.seed)
        if self.numerics is None:
            _plain(network, data, recipe, self.seed)
        else:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Checkpoint(Path(folder) / "checkpoint", "")
                train(network, data, recipe, self.numerics, self.seed, lambda progress: None, checkpoint)
        network.eval().to(memory_format=torch.contiguous_format)
        quantized = quantize_trained(network, Scheme(), data, self.seed)
        part = data.test.take(torch.arange(0, len(data.test), max(1, len(data.test) // 2000)))
        found = measure_split(quantized.folded, quantized.network, data, part)
        return 100 * found.fp32_accuracy, 100 * found.quint8_accuracy


def _plain(network: Network, data: DataSet, recipe: Recipe, seed: int) -> None:
    torch.manual_seed(seed)
    images = [to_pil_image(image) for image in data.train.images]
    pixels = round(recipe.augmentation.shift * data.train.images.shape[-1])
    flip = [transforms.RandomHorizontalFlip()] if data.flips else []
    steps = [transforms.RandomCrop(data.train.images.shape[-2:], pixels, padding_mode="symmetric"), *flip]
    change = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])
    groups = [[one for one in network.parameters() if (one.ndim > 1) is decayed] for decayed in (True, False)]
    optimizer = torch.optim.SGD(
        [{"params": groups[0], "weight_decay": recipe.weight_decay}, {"params": groups[1]}],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
    count = math.ceil(len(images) / recipe.batch_size)
    network.train()
    for epoch in range(recipe.epochs):
        for step, chosen in enumerate(torch.randperm(len(images)).tensor_split(count)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(epoch * count + step, count)
            logits = network(torch.stack([change(images[index]) for index in chosen.tolist()]))
            loss = F.cross_entropy(logits, data.train.labels[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    settle(network, data, Numerics("cpu"), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--plans", nargs="+", default=["f4"])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    numerics = resolve("cpu", options.dtype, threads=1)
    print(f"{machine('torchvision')}\nours: {numerics}")
    print(f"{options.dataset}, {options.images:,} training images, {options.epochs} epochs\n", flush=True)
    sides = {"plain": None, "ours": numerics}
    trainings = {
        (plan, side, seed): Training(options.dataset, options.images, plan, seed, options.epochs, how)
        for plan in options.plans
        for seed in options.seeds
        for side, how in sides.items()
    }
    found = {}
    with environment(1), ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(training): key for key, training in trainings.items()}
        for future in as_completed(running):
            found[running[future]] = future.result()
            plan, side, seed = running[future]
            fp32, quint8 = future.result()
            print(f"  {plan}, {side}, seed {seed}: fp32 {fp32:.2f} %, quint8 {quint8:.2f} %", flush=True)
    print(f"\n{'network':9}{'accuracy':>10}{'plain, %':>10}{'ours, %':>10}{'ours less plain, points':>36}")
    for plan in options.plans:
        for index, name in enumerate(("fp32", "quint8")):
            plain, ours = ([found[plan, side, seed][index] for seed in options.seeds] for side in sides)
            differences = [one - other for one, other in zip(ours, plain, strict=True)]
            spread = "one seed"
            if (count := len(differences)) > 1:
                half = t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count)
                spread = f"{mean(differences) - half:+.2f} to {mean(differences) + half:+.2f}"
            print(f"{plan:9}{name:>10}{mean(plain):10.2f}{mean(ours):10.2f}{mean(differences):+12.2f} ({spread})")


if __name__ == "__main__":
    main()
