"""The number of workers that fit into cores and memory."""

import math
import os

import psutil
import torch

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.factorize import factorize
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import regular
from fnet_search.base.errors import FnetError
from fnet_search.training.datasets import DataSet
from fnet_search.training.recipe import Recipe

ON_CUDA = 2
"""Workers that share a CUDA device: one small network does not keep it busy."""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(space: Macroarchitecture, recipe: Recipe, data: DataSet) -> int:
    """An estimate of the bytes that a worker needs on its device to train the regular network.

    The sum of 600 MiB for torch itself; the data set, a byte for each value; 24 bytes for each parameter, six float32
    numbers (value, gradient, momentum, and as many copies during a step); 8 bytes for each activation of a batch, value
    and gradient.
    """
    plan = regular(space)
    network = factorize(space, plan)
    activations = sum(math.prod(network.shapes[node.name]) for node in network.order)
    images = sum(split.images.numel() for split in (data.train, data.evaluation, data.test))
    return 600 * 2**20 + images + 24 * plan_cost(space, plan).params + 8 * activations * max(recipe.batch_size, 250)


def how_many(
    wanted: int | None, device: str, threads: int, space: Macroarchitecture, recipe: Recipe, data: DataSet
) -> int:
    """The number of workers: `wanted`, or by default as many as fit: one for each `threads` cores, ON_CUDA on a CUDA
    device, fewer if memory is short. 0 means one worker in this process.

    Raises FnetError if `wanted` workers need more memory than is free now, on the CUDA device if there is one.
    """
    if wanted == 0:
        return 1
    on_cuda = device.startswith("cuda")
    free: int = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
    each = memory_of(space, recipe, data)
    fitting = max(1, free // each)
    if wanted is None:
        return min(fitting, ON_CUDA if on_cuda else max(1, cores() // threads))
    if wanted > fitting:
        raise FnetError(
            f"{wanted} workers need about {wanted * each / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free; use "
            f"`workers` {fitting} or a smaller batch"
        )
    return wanted
