"""Which layer costs the accuracy: partly quantized networks, measured on the same images.

What is quantized or left in float is a *part* of a folded network: one quantized tensor, and the weights that make it.
A convolution or dense layer is a part with its weights, its bias, and its output, which is that after a ReLU that is
fused into it (`ranges.carriers`). Every other quantized tensor (the input, what an add, a concat, an average pool or an
activation gives) is a part of its own, without weights. So the parts are all that is quantized, each once: "only" and
"all but" a part leave nothing open.

A part that is quantized takes the values that its codes stand for: weights s_w (q_w - z_w), biases s_x s_w q_b, outputs
s_y (q_y - z_y). Everything is computed in float32 on these values (integers and floats cannot be mixed within an
integer network), which gives the integer network's codes but for rare roundings by one step in each layer.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.arch.macroarchitecture import INPUT, Node
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.quant_params import float32
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, Split

BATCH = 25
"""Images at a time: few, since the activations of all nodes are held."""


@dataclass(frozen=True)
class PartSensitivity:
    """One part, named after the layer (or ``input``) that makes its tensor. Accuracies and their differences are
    fractions of 1; errors are standard errors of differences of paired images."""

    layer: str
    only_accuracy: float
    """With nothing else quantized."""
    cost: float
    """fp32 accuracy less `only_accuracy`."""
    cost_error: float
    only_kl: float
    """Mean KL divergence of the softmax of that network from the float one's, nats."""
    all_but_accuracy: float
    """With everything else quantized."""
    gain: float
    """`all_but_accuracy` less the accuracy with everything quantized."""
    gain_error: float


@dataclass(frozen=True)
class Sensitivity:
    """Of one network on `images` images. Accuracies, `drop` and its standard error are fractions of 1."""

    images: int
    fp32_accuracy: float
    fake_accuracy: float
    """Everything quantized, computed in float."""
    quint8_accuracy: float
    """The integer network's."""
    drop: float
    """`fp32_accuracy` less `fake_accuracy`."""
    drop_error: float
    parts: tuple[PartSensitivity, ...]
    """In network order."""

    @property
    def costliest(self) -> PartSensitivity:
        """The part that loses most when only it is quantized; of equals the one that gives back most, then by KL."""
        return max(self.parts, key=lambda part: (part.cost, part.gain, part.only_kl))

    @property
    def most_gained(self) -> PartSensitivity:
        """The part that gives back most when only it is left in float; of equals the one that costs most."""
        return max(self.parts, key=lambda part: (part.gain, part.cost, part.only_kl))


@dataclass(frozen=True)
class PartlyQuantized:
    """A folded network any parts of which are quantized; a part is named by its carrier, in `params` of `quantized`."""

    folded: FoldedNetwork
    quantized: QuantizedNetwork

    @cached_property
    def coarse(self) -> FoldedNetwork:
        """The float network of the values that the codes of weights and biases stand for."""
        layers = self.quantized.layers
        bias = {}
        for node in self.folded.network.order:
            if node.name in layers:
                scale = layers[node.name].bias_scale(self.quantized.params[self.quantized.carrier[node.inputs[0]]])
                bias[node.name] = (layers[node.name].bias.double() * scale.double()).float()
        return FoldedNetwork(self.folded.network, {name: layer.weight for name, layer in layers.items()}, bias)

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """For each part, in network order, the node (or the input) that makes its tensor."""
        found: dict[str, str] = {}
        for name in (INPUT, *(node.name for node in self.folded.network.order)):
            found.setdefault(self.quantized.carrier[name], name)
        return found

    def first(self, x: Tensor, parts: Set[str]) -> Tensor:
        """The input, quantized if it is one of these parts."""
        return self._seen(x, INPUT) if INPUT in parts else x

    def apply(self, node: Node, inputs: list[Tensor], parts: Set[str]) -> Tensor:
        """One node on float tensors, with these parts quantized."""
        carrier = self.quantized.carrier[node.name]
        if carrier not in parts:
            return self.folded.apply_node(node, inputs)
        output = self.coarse.apply_node(node, inputs)
        return self._seen(output, carrier) if node.name == carrier else output

    def _seen(self, x: Tensor, carrier: str) -> Tensor:
        """The same values as ``dequantize(quantize(x))``, in half the passes over memory."""
        params = self.quantized.params[carrier]
        scale = float32(params.scale, x)
        return (x / scale).round_().clamp_(-params.zero, 255 - params.zero).mul_(scale)

    def values(self, x: Tensor, parts: Set[str]) -> dict[str, Tensor]:
        """The outputs of all nodes, and the input, for normalised images [N, C, H, W] with these parts quantized."""
        values = {INPUT: self.first(x, parts)}
        for node in self.folded.network.order:
            values[node.name] = self.apply(node, [values[source] for source in node.inputs], parts)
        return values

    def logits(self, x: Tensor, parts: Set[str], values: Mapping[str, Tensor], changed: str) -> Tensor:
        """[N, classes] logits with these parts quantized, given the `values` of parts that differ in `changed` only:
        what does not depend on that one is taken from there."""
        network, source = self.folded.network, self.sources[changed]
        after = {source, *nx.descendants(network.graph, source)}
        fresh = {INPUT: self.first(x, parts)} if source == INPUT else {}
        for node in network.order:
            if node.name in after:
                inputs = [fresh[name] if name in fresh else values[name] for name in node.inputs]
                fresh[node.name] = self.apply(node, inputs, parts)
        return fresh[network.output]


class _Tally:
    """What one of the compared networks made of the images: which it got right, how far it is from the float one."""

    def __init__(self) -> None:
        self.hits: list[Tensor] = []
        self.divergence = 0.0

    def add(self, logits: Tensor, labels: Tensor, reference: Tensor) -> None:
        """`reference` has the log probabilities of the float network, float64."""
        self.hits.append((logits.argmax(1) == labels).double().cpu())
        log_q = F.log_softmax(logits.double(), 1)
        self.divergence += float((reference.exp() * (reference - log_q)).sum())

    @property
    def right(self) -> Tensor:
        return torch.cat(self.hits)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def kl(self) -> float:
        return max(0.0, self.divergence / len(self.right))

    def above(self, other: "_Tally") -> tuple[float, float]:
        """The difference to the accuracy of another on the same images, and its standard error."""
        difference = self.right - other.right
        return float(difference.mean()), float(difference.std(correction=0)) / math.sqrt(len(difference))


@torch.no_grad()
def sensitivity(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    data: DataSet,
    split: Split,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Accuracies with each part quantized alone, and left in float alone.

    `split` holds images of `data`; `seen` is told after each batch how many of them are done. A batch costs about as
    much as it has parts, in passes of the network, since only what follows a changed part is computed again.
    """
    network = PartlyQuantized(folded, quantized)
    nothing: frozenset[str] = frozenset()
    everything = frozenset(network.sources)
    whole, fake, exact = _Tally(), _Tally(), _Tally()
    only = {part: _Tally() for part in network.sources}
    all_but = {part: _Tally() for part in network.sources}
    done, last = 0, folded.network.output
    for images, labels in split.batches(BATCH):
        x = data.normalise(images).to(memory_format=torch.channels_last)  # a third faster
        values = network.values(x, nothing)
        reference = F.log_softmax(values[last].double(), 1)
        whole.add(values[last], labels, reference)
        exact.add(quantized(x), labels, reference)
        for part, tally in only.items():
            tally.add(network.logits(x, frozenset([part]), values, part), labels, reference)
        values = network.values(x, everything)
        fake.add(values[last], labels, reference)
        for part, tally in all_but.items():
            tally.add(network.logits(x, everything - {part}, values, part), labels, reference)
        done += len(labels)
        seen(done, len(split))
    return Sensitivity(
        len(split),
        whole.accuracy,
        fake.accuracy,
        exact.accuracy,
        *whole.above(fake),
        tuple(
            PartSensitivity(
                network.sources[part],
                only[part].accuracy,
                *whole.above(only[part]),
                only[part].kl,
                all_but[part].accuracy,
                *all_but[part].above(fake),
            )
            for part in network.sources
        ),
    )


def sample(split: Split, images: int) -> Split:
    """At most so many images, in the proportions of the classes: every k-th of them in order of their classes."""
    if images >= len(split):
        return split
    ordered = torch.argsort(split.labels, stable=True)
    return split.take(ordered[torch.arange(images, device=ordered.device) * len(split) // images])
