"""Claim: two workers train at least 1.85 times as fast as one, on factorized networks.

    python benchmarks/scaling.py [--rounds 5] [--steps 15]

One single-thread worker, then two, and so on up to one a core, one after the other in each round. Images a second of
all workers together; ratios to one worker are medians over rounds, with quartiles.
"""

import argparse

from machine import machine, ratio, spread
from trainers import Trainer, together

from fnet_search.candidates.worker_count import cores
from fnet_search.training.numerics import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    numerics = resolve("cpu")
    print(f"{machine()}\n{numerics}\n\n{'network':9}{'workers':>8}{'images/s':>10}{'ratio to one':>24}", flush=True)
    workers = [Trainer(1, numerics) for _ in range(cores())]
    for plan in ("f2", "f4", "init2", "f16", "dws"):
        together(workers, plan, 1)
        rounds = [
            [together(workers[:count], plan, options.steps) for count in range(1, len(workers) + 1)]
            for _ in range(options.rounds)
        ]
        for count, rates in enumerate(zip(*rounds, strict=True), 1):
            to_one = "" if count == 1 else str(ratio(rates, [one[0] for one in rounds]))
            print(f"{plan:9}{count:8}{spread(rates).median:10.0f}{to_one:>24}", flush=True)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
