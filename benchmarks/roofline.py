"""How far a training is from what the processor can multiply: three times the MACs of a network (forward, and twice
backward) a second, against a large matrix product in the same dtype, in the same process.

    python benchmarks/roofline.py [--rounds 5] [--steps 7]

One thread, in an environment like a worker's, space factorizenet-gap, batch 128. The products are of 4096 x 4096
matrices. Where the rest goes: shares of the time of a few steps by kind of operation, from torch's profiler.
"""

import argparse
import time
from multiprocessing import get_context

import torch
from machine import machine, ratio, spread
from torch.profiler import ProfilerActivity, profile
from trainers import BATCH, PLANS, SPACE, ours

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.plan import parse_plan
from fnet_search.candidates.processes import environment
from fnet_search.importing.spaces import load_space
from fnet_search.training.numerics import Numerics, resolve

SIZE = 4096
KINDS = {
    "convolution": ("convolution",),
    "norm + ReLU": ("CompiledFxGraph", "batch_norm", "threshold_backward", "clamp_min"),
    "pooling": ("pool",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    process = get_context("spawn").Process(target=_measure, args=(options.rounds, options.steps))
    with environment(1):
        process.start()
    process.join()


def _measure(rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    numerics = resolve("cpu", threads=1)
    print(f"{machine()}\n{numerics}\n", flush=True)
    dtype = torch.bfloat16 if numerics.dtype == "bfloat16" else torch.float32
    factors = [torch.randn(SIZE, SIZE).to(dtype) for _ in range(2)]
    space = load_space(SPACE)
    head = f"{'network':9}{'images/s':>10}{'GMAC/s':>9}{'GEMM GMAC/s':>13}{'share of GEMM, %':>24}"
    print(head + "".join(f"{kind + ', %':>16}" for kind in (*KINDS, "other")), flush=True)
    _gemm(factors)
    for plan in PLANS:
        macs = 3 * plan_cost(space, parse_plan(space, plan)).total_macs / 1e9
        ours(plan, 1, numerics)
        rates, limits = [], []
        for _ in range(rounds):
            limits.append(_gemm(factors))
            start, end = ours(plan, steps, numerics)
            rates.append(steps * BATCH / (end - start))
        reached = [macs * rate for rate in rates]
        share = ratio([100 * value for value in reached], limits)
        values = f"{spread(rates).median:10.0f}{spread(reached).median:9.0f}{spread(limits).median:13.0f}{share!s:>24}"
        print(f"{plan:9}{values}" + "".join(f"{part:16.0f}" for part in _shares(plan, numerics)), flush=True)


def _gemm(factors: list[torch.Tensor]) -> float:
    """GMAC/s of one product."""
    start = time.perf_counter()
    factors[0] @ factors[1]
    return SIZE**3 / 1e9 / (time.perf_counter() - start)


def _shares(plan: str, numerics: Numerics) -> list[float]:
    """Of the time of a few steps, in %."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        ours(plan, 3, numerics)
    own = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    whole = sum(own.values())
    parts = [sum(time for name, time in own.items() if any(word in name for word in words)) for words in KINDS.values()]
    return [100 * part / whole for part in (*parts, whole - sum(parts))]


if __name__ == "__main__":
    main()
