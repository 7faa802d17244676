"""Files of a trained network: float weights, codes, and the checkpoint of a training."""

from pathlib import Path

from fnet_search.arch.factorize import factorize
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan
from fnet_search.base.errors import FnetError
from fnet_search.quant.calibration import Quantized, folded_for
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.scheme import Scheme
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.network import Network
from fnet_search.training.weights import digest, read_tensors, write_tensors

WEIGHTS = "weights.safetensors"
QUANTIZED = "quantized.safetensors"
CHECKPOINT = "checkpoint.safetensors"


def load_trained(space: Macroarchitecture, plan: FactorizationPlan, folder: Path) -> Network:
    """Reads the trained network that `evaluate` wrote into `folder`: on the CPU, in evaluation mode.

    Raises FnetError, naming the file, if weights are missing, broken, or of another plan.
    """
    network = Network(factorize(space, plan))
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise FnetError(f"{folder / WEIGHTS} does not hold the weights of plan {plan}") from None
    return network.eval()


def write_codes(folder: Path, plan: FactorizationPlan, trained: Network, quantized: Quantized) -> None:
    """Writes the codes of a quantized network into `folder`, for `load_quantized`."""
    facts = {"plan": str(plan), "scheme": str(quantized.scheme), "weights": _digest(trained)}
    write_tensors(folder / QUANTIZED, quantized.network.to_tensors(), facts)


def load_quantized(trained: Network, scheme: Scheme, folder: Path) -> tuple[FoldedNetwork, QuantizedNetwork]:
    """The folded (and equalized) network of a trained one, and the quantized network with the codes in `folder`.

    Raises FnetError, naming the file, if codes are missing, broken, or of other weights.
    """
    folded = folded_for(scheme, trained)
    path = folder / QUANTIZED
    codes, facts = read_tensors(path)
    if (facts.get("weights"), facts.get("scheme")) != (_digest(trained), str(scheme)):
        raise FnetError(f"{path} does not hold the codes of {folder / WEIGHTS} quantized with {scheme}")
    try:
        return folded, QuantizedNetwork.from_tensors(folded.network, codes)
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


def _digest(trained: Network) -> str:
    """A digest of the weights, which ties codes to them."""
    return digest(trained.state_dict())
