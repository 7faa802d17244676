"""Which layer costs the accuracy: partly quantized networks, measured on the same images.

The unit that is quantized or left in float is a *part* of a folded network: one quantized tensor, and the weights that
produce it. A convolution or dense layer is a part: its weights, its bias and its output (after a fused ReLU, see
`ranges.carriers`). Every other quantized tensor (the input; the output of an add, a concat, an average pool or an
activation) is a part without weights. The parts partition everything that is quantized, so "only" and "all but" a part
are well defined.

A quantized part takes the values that its codes stand for: weights s_w (q_w - z_w), biases s_x s_w q_b, outputs
s_y (q_y - z_y). All of it is computed in float32, since integers and floats cannot be mixed within the integer network;
the result is that of the integer network except for rare roundings by one step in a layer.
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
"""Images in a batch: few, since the activations of all nodes are held."""


@dataclass(frozen=True)
class PartSensitivity:
    """One part, named after the layer (or ``input``) that produces its tensor. Accuracies and their differences are
    fractions of 1; errors are standard errors of the paired differences."""

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
    """The sensitivity of one network, on `images` images. Accuracies, `drop` and its standard error are fractions of
    1."""

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
        """The part that costs most when only it is quantized; ties go by `gain`, then by `only_kl`."""
        return max(self.parts, key=lambda part: (part.cost, part.gain, part.only_kl))

    @property
    def most_gained(self) -> PartSensitivity:
        """The part that regains most when only it is left in float; ties go by `cost`, then by `only_kl`."""
        return max(self.parts, key=lambda part: (part.gain, part.cost, part.only_kl))


@dataclass(frozen=True)
class PartlyQuantized:
    """A folded network of which any parts can be quantized. A part is named by its carrier, a key of
    `quantized.params`."""

    folded: FoldedNetwork
    quantized: QuantizedNetwork

    @cached_property
    def dequantized(self) -> FoldedNetwork:
        """The float network with the weights and biases that the codes stand for."""
        layers = self.quantized.layers
        bias = {}
        for node in self.folded.network.order:
            if node.name in layers:
                scale = layers[node.name].bias_scale(self.quantized.params[self.quantized.carrier[node.inputs[0]]])
                bias[node.name] = (layers[node.name].bias.double() * scale.double()).float()
        return FoldedNetwork(self.folded.network, {name: layer.weight for name, layer in layers.items()}, bias)

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """For each part, in network order, the node (or the input) that produces its tensor."""
        sources: dict[str, str] = {}
        for name in (INPUT, *(node.name for node in self.folded.network.order)):
            sources.setdefault(self.quantized.carrier[name], name)
        return sources

    def input(self, x: Tensor, parts: Set[str]) -> Tensor:
        """The input images, quantized if the input is one of `parts`."""
        return self._rounded(x, INPUT) if INPUT in parts else x

    def apply(self, node: Node, inputs: list[Tensor], parts: Set[str]) -> Tensor:
        """The output of one node for float tensors, with `parts` quantized."""
        carrier = self.quantized.carrier[node.name]
        if carrier not in parts:
            return self.folded.apply_node(node, inputs)
        output = self.dequantized.apply_node(node, inputs)
        return self._rounded(output, carrier) if node.name == carrier else output

    def _rounded(self, x: Tensor, carrier: str) -> Tensor:
        """Equals ``dequantize(quantize(x))``, in half the passes over memory."""
        params = self.quantized.params[carrier]
        scale = float32(params.scale, x)
        return (x / scale).round_().clamp_(-params.zero, 255 - params.zero).mul_(scale)

    def values(self, x: Tensor, parts: Set[str]) -> dict[str, Tensor]:
        """The outputs of all nodes, and the input, for normalised images [N, C, H, W], with `parts` quantized."""
        values = {INPUT: self.input(x, parts)}
        for node in self.folded.network.order:
            values[node.name] = self.apply(node, [values[source] for source in node.inputs], parts)
        return values

    def logits(self, x: Tensor, parts: Set[str], values: Mapping[str, Tensor], changed: str) -> Tensor:
        """[N, classes] logits with `parts` quantized. `values` are those with the same parts but `changed`: only the
        nodes that depend on `changed` are computed again."""
        network, source = self.folded.network, self.sources[changed]
        after = {source, *nx.descendants(network.graph, source)}
        fresh = {INPUT: self.input(x, parts)} if source == INPUT else {}
        for node in network.order:
            if node.name in after:
                inputs = [fresh[name] if name in fresh else values[name] for name in node.inputs]
                fresh[node.name] = self.apply(node, inputs, parts)
        return fresh[network.output]


class _Tally:
    """The results of one of the compared networks: which images it classifies right, its divergence from the float
    one."""

    def __init__(self) -> None:
        self.hits: list[Tensor] = []
        self.divergence = 0.0

    def add(self, logits: Tensor, labels: Tensor, reference: Tensor) -> None:
        """`reference` holds the log probabilities of the float network, float64 [N, classes]."""
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
        """Accuracy less that of `other` on the same images, and the standard error of the difference."""
        difference = self.right - other.right
        return float(difference.mean()), float(difference.std(correction=0)) / math.sqrt(len(difference))


@torch.no_grad()
def sensitivity(
    folded: FoldedNetwork,
    quantized: QuantizedNetwork,
    data: DataSet,
    split: Split,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Accuracies with only each part quantized, and with all but each part.

    Only the nodes after a changed part are computed again, so a batch costs about as many passes as there are parts.

    Args:
        split: images of `data`.
        on_images: called after each batch with the number of images that are done, and their total.
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
        on_images(done, len(split))
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


def stratified_sample(split: Split, images: int) -> Split:
    """At most `images` images of a split in the proportions of its classes: every k-th one, ordered by class."""
    if images >= len(split):
        return split
    ordered = torch.argsort(split.labels, stable=True)
    return split.take(ordered[torch.arange(images, device=ordered.device) * len(split) // images])
