"""Claim: candidates train several times faster than the plain way (float32, torchvision's transforms image by image,
one process): at least 4 times in the geometric mean over five networks, whole machine against whole machine.

    python benchmarks/throughput.py [--rounds 5] [--steps 7]

Space factorizenet-gap, batch 128, the paper's augmentation on both sides. Each round measures, one after the other, the
plain way and ours with one single-thread worker each, then with the whole machine: one process with a thread a core
against one single-thread worker a core. Images a second; ratios are medians over rounds, with quartiles.
"""

import argparse
from math import prod

from machine import machine, ratio, spread
from trainers import PLANS, Trainer, together

from fnet_search.candidates.worker_count import cores
from fnet_search.training.numerics import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    numerics = resolve("cpu")
    print(f"{machine('torchvision')}\nours: {numerics}; images/s\n", flush=True)
    plain, plain_all = Trainer(1, None), Trainer(cores(), None)
    workers = [Trainer(1, numerics) for _ in range(cores())]
    sides = {
        "plain, 1 thread": lambda plan, steps: together([plain], plan, steps),
        "ours, 1 thread": lambda plan, steps: together(workers[:1], plan, steps),
        "plain, machine": lambda plan, steps: together([plain_all], plan, steps),
        "ours, machine": lambda plan, steps: together(workers, plan, steps),
    }
    print(f"{'network':9}" + "".join(f"{name:>18}" for name in sides) + f"{'1 thread':>24}{'machine':>24}", flush=True)
    medians: dict[str, list[float]] = {"1 thread": [], "machine": []}
    for plan in PLANS:
        together(workers, plan, 1)  # kernels are compiled
        rounds = [{name: side(plan, options.steps) for name, side in sides.items()} for _ in range(options.rounds)]
        columns = {name: [one[name] for one in rounds] for name in sides}
        line = f"{plan:9}" + "".join(f"{spread(values).median:18.0f}" for values in columns.values())
        for name, found in medians.items():
            one = ratio(columns[f"ours, {name}"], columns[f"plain, {name}"])
            found.append(one.median)
            line += f"{one!s:>24}"
        print(line, flush=True)
    means = {name: prod(found) ** (1 / len(found)) for name, found in medians.items()}
    print("\ngeometric mean: " + ", ".join(f"{name} {value:.2f} times" for name, value in means.items()))
    for trainer in (plain, plain_all, *workers):
        trainer.close()


if __name__ == "__main__":
    main()
