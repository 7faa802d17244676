"""Processes that train one network for some steps when told to, and say how fast: what `throughput`, `scaling` and
`roofline` share. Ours is `train.train` itself; `plain` is what one writes first."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from fnet_search.numerics import Numerics
from fnet_search.train import TrainingProgress
from fnet_search.workers import environment

SPACE = "factorizenet-gap"
BATCH = 128
PLANS = ("regular", "f2", "f4", "f16", "dws")


class Trainer:
    """A process with `threads` threads; ours with `numerics`, else the plain way."""

    def __init__(self, threads: int, numerics: Numerics | None) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, numerics), daemon=True)
        if numerics is None:
            self._process.start()
        else:
            with environment(threads):
                self._process.start()

    def ask(self, plan: str, steps: int) -> None:
        """Begins to train."""
        self._pipe.send((plan, steps))

    def rate(self) -> float:
        """Images a second of what was asked for."""
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def together(trainers: Sequence[Trainer], plan: str, steps: int) -> float:
    """Images a second of all of them, at the same time."""
    for trainer in trainers:
        trainer.ask(plan, steps)
    return sum(trainer.rate() for trainer in trainers)


def _serve(pipe: Connection, threads: int, numerics: Numerics | None) -> None:
    import torch

    torch.set_num_threads(threads)
    images = _images()
    while (asked := pipe.recv()) is not None:
        plan, steps = asked
        pipe.send(_plain(plan, steps, *images) if numerics is None else _ours(plan, steps, numerics))


def _images():
    """scikit-learn's digits as 32x32 colour images, and their labels."""
    from torchvision.transforms.functional import to_pil_image

    from fnet_search.data import load_dataset

    split = load_dataset("digits", (3, 32, 32)).train
    return [to_pil_image(image) for image in split.images], split.labels


def _plain(plan: str, steps: int, images, labels) -> float:
    """float32, torch's default memory format, torchvision's transforms image by image, unfused SGD: steps a second
    times the batch."""
    import torch
    import torch.nn.functional as F  # noqa: N812 (its usual name)
    from torchvision import transforms

    network, recipe = _network(plan)
    optimizer = torch.optim.SGD(network.parameters(), recipe.learning_rate, recipe.momentum)
    how = recipe.augmentation
    change = transforms.Compose(
        [
            transforms.RandomAffine(how.rotation, (how.shift, how.shift), (1 - how.zoom, 1 + how.zoom)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    network.train()
    start = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one allocates
            start = time.perf_counter()
        chosen = torch.randint(len(images), (BATCH,))
        batch = torch.stack([change(images[index]) for index in chosen.tolist()])
        loss = F.cross_entropy(network(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * BATCH / (time.perf_counter() - start)


def _ours(plan: str, steps: int, numerics: Numerics) -> float:
    """`train.train` on as many images as the steps take, timed from the end of the first step on."""
    import torch

    from fnet_search.data import load_dataset
    from fnet_search.train import train

    network, recipe = _network(plan)
    data = load_dataset("digits", (3, 32, 32))
    chosen = torch.arange((steps + 1) * BATCH) % len(data.train)
    data = replace(data, train=data.train.take(chosen))
    times: list[float] = []

    def report(progress: TrainingProgress) -> None:
        if not progress.ended:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        train(network, data, recipe, numerics, 0, report, Path(folder) / "checkpoint", "", None)
    return steps * BATCH / (times[-1] - times[0])


def _network(plan: str):
    from fnet_search.macro import load_space
    from fnet_search.network import build
    from fnet_search.plan import factorize, parse_plan
    from fnet_search.recipe import load_recipe

    space = load_space(SPACE)
    recipe = replace(load_recipe("paper").with_epochs(1), batch_size=BATCH)
    return build(factorize(space, parse_plan(space, plan)), recipe.initializer, 0), recipe
