"""Which reverse pyramid of a tiny CNN is best on scikit-learn's digits, under 80 % of its multiply-accumulates."""

from pathlib import Path

import optuna
import optunahub
import torch
from sklearn.datasets import load_digits

from fnet_search import suggest_plan
from fnet_search.arch.factorize import factorize
from fnet_search.training.network import build

here = Path(__file__).resolve()
if (here.parents[2] / "samplers").is_dir():  # a checkout of the registry
    module = optunahub.load_local_module("samplers/fnet_progressive", registry_root=str(here.parents[2]))
else:
    module = optunahub.load_module("samplers/fnet_progressive")
sampler = module.FnetProgressiveSampler("tiny", "reverse-pyramid", budget="80%")

torch.set_num_threads(1)
images, classes = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = torch.nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, scale_factor=4).repeat(1, 3, 1, 1)


def objective(trial: optuna.Trial) -> float:
    plan = suggest_plan(trial, sampler.space)
    torch.manual_seed(0)
    network = build(factorize(sampler.space, plan))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(3):
        for batch in torch.randperm(1440).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[batch]), classes[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((network.eval()(images[1440:]).argmax(1) == classes[1440:]).float().mean())


if __name__ == "__main__":
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective)  # stops by itself when all pyramids are trained
    best = study.best_trial
    print(f"best: {best.user_attrs['label']} ({best.user_attrs['plan']}), accuracy {best.value:.4f}")
