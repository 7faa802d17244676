"""Processes that train one network for some steps when told to, and say when they began and ended: what `throughput`,
`scaling` and `roofline` share. Ours is `train.train` itself; `plain` is what one writes first."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from fnet_search.candidates.processes import environment
from fnet_search.training.numerics import Numerics
from fnet_search.training.train import Checkpoint, TrainingProgress

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

    def tell(self, what: tuple[str, int] | str) -> None:
        """A plan and a number of steps: build the network, train a step, answer; then ``go``: the others."""
        self._pipe.send(what)

    def answer(self) -> float:
        """The time on the clock that all processes share, in seconds."""
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def together(trainers: Sequence[Trainer], plan: str, steps: int) -> float:
    """Images a second of all of them at the same time: from a common start, when each has a step behind it, to the end
    of the last one."""
    for trainer in trainers:
        trainer.tell((plan, steps))
    for trainer in trainers:
        trainer.answer()
    start = time.monotonic()
    for trainer in trainers:
        trainer.tell("go")
    return len(trainers) * steps * BATCH / (max(trainer.answer() for trainer in trainers) - start)


def _serve(pipe: Connection, threads: int, numerics: Numerics | None) -> None:
    import torch

    torch.set_num_threads(threads)
    images = _images()

    def go() -> None:
        pipe.send(time.monotonic())
        pipe.recv()

    while (asked := pipe.recv()) is not None:
        plan, steps = asked
        pipe.send(_plain(plan, steps, *images, go) if numerics is None else ours(plan, steps, numerics, go)[1])


def _images():
    """scikit-learn's digits as 32x32 colour images, and their labels."""
    from torchvision.transforms.functional import to_pil_image

    from fnet_search.training.datasets import load_dataset

    split = load_dataset("digits", (3, 32, 32)).train
    return [to_pil_image(image) for image in split.images], split.labels


def _plain(plan: str, steps: int, images, labels, go: Callable[[], None]) -> float:
    """float32, torch's default memory format, torchvision's transforms image by image, unfused SGD: when it ended. `go`
    is called after the first step, which allocates."""
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
    for step in range(steps + 1):
        if step == 1:
            go()
        chosen = torch.randint(len(images), (BATCH,))
        batch = torch.stack([change(images[index]) for index in chosen.tolist()])
        loss = F.cross_entropy(network(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.monotonic()


def ours(plan: str, steps: int, numerics: Numerics, go: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """`train.train` on as many images as the steps take: when it began the second step, and ended the last one. `go` as
    in `_plain`."""
    import torch

    from fnet_search.training.datasets import load_dataset
    from fnet_search.training.train import train

    network, recipe = _network(plan)
    data = load_dataset("digits", (3, 32, 32))
    chosen = torch.arange((steps + 1) * BATCH) % len(data.train)
    data = replace(data, train=data.train.take(chosen))
    times: list[float] = []

    def report(progress: TrainingProgress) -> None:
        if not progress.ended:
            if not times:
                go()
            times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        train(network, data, recipe, numerics, 0, report, Checkpoint(Path(folder) / "checkpoint", ""))
    return times[0], times[-1]


def _network(plan: str):
    from fnet_search.arch.factorize import factorize
    from fnet_search.arch.plan import parse_plan
    from fnet_search.importing.spaces import load_space
    from fnet_search.training.network import build
    from fnet_search.training.recipe import load_recipe

    space = load_space(SPACE)
    recipe = replace(load_recipe("paper").with_epochs(1), batch_size=BATCH)
    return build(factorize(space, parse_plan(space, plan)), recipe.initializer, 0), recipe
