"""A loop that knows nothing of Optuna: ask for a plan, train it as you like, tell what came out.

python examples/bare_loop.py
"""

import torch
from sklearn.datasets import load_digits

from fnet_policies import ReversePyramid
from fnet_search import AskTell, Constraints, Evaluation, FactorizationPlan, load_space
from fnet_search.arch.factorize import factorize
from fnet_search.arch.plan import label
from fnet_search.training.network import build

SPACE = load_space("tiny")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits as float32 images [1797, 3, 32, 32] and their classes; trained on are the first 1,440."""
    images, classes = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = torch.nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, scale_factor=4)
    return images.repeat(1, 3, 1, 1), classes


def trained(plan: FactorizationPlan, epochs: int = 3) -> torch.nn.Module:
    """A training of one's own."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network is no faster with more
    images, classes = digits()
    network = build(factorize(SPACE, plan))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(epochs):
        for batch in torch.randperm(1440).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[batch]), classes[batch]).backward()
            optimizer.step()
    return network.eval()


def train(plan: FactorizationPlan) -> float:
    """The accuracy of a trained network on the other images (fraction of 1)."""
    network, (images, classes) = trained(plan), (part[1440:] for part in digits())
    with torch.no_grad():
        return float((network(images).argmax(1) == classes).float().mean())


def main() -> None:
    loop = AskTell(ReversePyramid(), SPACE, Constraints(conv_macs=600_000))
    while (plan := loop.ask()) is not None:
        # What is to be maximised stands where the quint8 accuracy does; `fnet_search.evaluate` measures a real one.
        told = loop.tell(Evaluation.of(SPACE, plan, quint8_accuracy=train(plan)))
        print(f"{label(SPACE, plan):8} {told.cost.conv_macs:9,} MACs {100 * told.quint8_accuracy:6.2f} %", flush=True)
    refused = [one for one in loop.evaluations if one.state == "refused"]
    print(f"not trained: {', '.join(f'{label(SPACE, one.plan)} ({one.reason})' for one in refused)}")
    print(f"best: {label(SPACE, loop.best.plan)}")


if __name__ == "__main__":
    main()
