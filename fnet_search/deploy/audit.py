"""The audit: compares an exported network in ONNX Runtime with the integer simulator, code by code."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fnet_search.deploy.export import LOGITS, coded, codes_name
from fnet_search.deploy.runtime import Runtime
from fnet_search.policy.evaluation import Audit
from fnet_search.quant.simulator import QuantizedNetwork


def compare_codes(simulated: Tensor, runtime: Tensor) -> Audit:
    """Compares logits [N, classes]: a code differs if the floats do, since both are s (q - z)."""
    simulated = simulated.cpu()
    differing = int((simulated != runtime).sum())
    predictions = int((simulated.argmax(1) != runtime.argmax(1)).sum())
    return Audit(len(simulated), simulated.numel(), differing, predictions)


def audit(quantized: QuantizedNetwork, runtime: Runtime, batches: Iterable[Tensor]) -> Iterator[Audit]:
    """The audit of each batch of normalised images [N, C, H, W]. The sum of all is the audit of the split."""
    for x in batches:
        yield compare_codes(quantized(x), runtime(x))


@dataclass(frozen=True)
class LayerAudit:
    """The comparison of one layer's output codes: how many there are, how many differ, and the largest difference."""

    layer: str
    codes: int
    differing: int
    largest: int

    def __str__(self) -> str:
        return f"{self.layer} ({self.differing:,} of {self.codes:,} codes, by at most {self.largest})"

    def __add__(self, other: "LayerAudit") -> "LayerAudit":
        largest = max(self.largest, other.largest)
        return LayerAudit(self.layer, self.codes + other.codes, self.differing + other.differing, largest)


def audit_layers(
    quantized: QuantizedNetwork, runtime: Runtime, batches: Iterable[Tensor]
) -> Iterator[tuple[Audit, tuple[LayerAudit, ...]]]:
    """As `audit`, also for each layer whose codes are a tensor of the graph (`coded`), in network order: a difference
    starts at the first layer that differs. `runtime` must run the graph `with_outputs` of these tensors."""
    names = [codes_name(name) for name in coded(quantized)]
    for x in batches:
        logits, *runtime_codes = runtime.run(x, [LOGITS, *names])
        layers: list[LayerAudit] = []
        for node, codes in quantized.codes(x):
            if codes_name(node.name) in names:
                difference = (codes.cpu().int() - torch.from_numpy(runtime_codes[len(layers)]).int()).abs()
                differing = int((difference > 0).sum())
                layers.append(LayerAudit(node.name, codes.numel(), differing, int(difference.max())))
        last = quantized.params[quantized.carrier[quantized.network.output]].dequantize(codes)
        yield compare_codes(last, torch.from_numpy(logits)), tuple(layers)
