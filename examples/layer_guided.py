"""The policy that looks at single layers, in a loop of one's own: one call measures the probes that it needs.

python examples/layer_guided.py
"""

from bare_loop import SPACE, digits, train, trained

from fnet_policies import LayerGuided
from fnet_search import AskTell, Evaluation, parse_constraints, probes_for
from fnet_search.arch.plan import label, regular


def main() -> None:
    reference = trained(regular(SPACE))
    images, classes = (part[:1440] for part in digits())  # those it was trained on: a part of them is held out
    probes = probes_for(SPACE, reference.state_dict(), (images, classes))
    print(f"{len(probes.changes)} probes, each on {probes.unchanged.images} images", flush=True)
    loop = AskTell(LayerGuided(), SPACE, parse_constraints(SPACE, "60%"), probes=probes)
    while len(loop.evaluations) < 3 and (plan := loop.ask()) is not None:
        told = loop.tell(Evaluation.of(SPACE, plan, quint8_accuracy=train(plan)))
        print(f"{label(SPACE, plan):8} {told.cost.conv_macs:9,} MACs {100 * told.quint8_accuracy:6.2f} %", flush=True)
    print(f"best: {label(SPACE, loop.best.plan)}")


if __name__ == "__main__":
    main()
