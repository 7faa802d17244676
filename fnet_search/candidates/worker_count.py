"""How many workers there is room for."""

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
"""Workers that share a CUDA device: small networks do not fill one."""


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(space: Macroarchitecture, recipe: Recipe, data: DataSet) -> int:
    """Bytes that a worker needs on its device for the regular network, about: torch itself, the data set, three numbers
    a parameter and the copies of one step, and each activation with its gradient for a batch."""
    plan = regular(space)
    network = factorize(space, plan)
    activations = sum(math.prod(network.shapes[node.name]) for node in network.order)
    images = sum(split.images.numel() for split in (data.train, data.evaluation, data.test))
    return 600 * 2**20 + images + 24 * plan_cost(space, plan).params + 8 * activations * max(recipe.batch_size, 250)


def how_many(
    wanted: int | None, device: str, threads: int, space: Macroarchitecture, recipe: Recipe, data: DataSet
) -> int:
    """Workers: those that are wanted, or as many as there is room for: one for `threads` cores, or `ON_CUDA`. 0 is one,
    which works in this process.

    Raises FnetError for more than the memory holds that is free now, of the CUDA device where there is one.
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
