"""ONNX Runtime: the integer runtime that results are compared with."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from fnet_search.arch.layers import Dense, Flatten
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.base.errors import FnetError, first_line
from fnet_search.deploy.export import LOGITS, SESSION_CONFIG, quantized_model
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantized_layer import QuantizedLayer
from fnet_search.quant.simulator import QuantizedNetwork

CPU = "CPUExecutionProvider"


class Runtime:
    """An exported network in ONNX Runtime on the CPU, with the default optimizations.

    Called with normalised images [N, C, H, W], it returns logits [N, classes], float32, on the CPU. `options` are
    attributes of ``onnxruntime.SessionOptions``. Raises FnetError for a model that the runtime cannot load.
    """

    def __init__(self, model: ModelProto, threads: int = 1, options: dict[str, Any] | None = None) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3  # errors only
        for key, value in SESSION_CONFIG.items() if saturates() else ():
            settings.add_session_config_entry(key, value)
        for name, value in (options or {}).items():
            setattr(settings, name, value)
        try:
            self.session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=[CPU])
        except Exception as error:  # the runtime's exceptions have no common base
            raise FnetError(f"ONNX Runtime cannot load the exported network: {first_line(error)}") from None

    @property
    def version(self) -> str:
        return str(onnxruntime.__version__)

    def run(self, x: Tensor, outputs: Sequence[str]) -> list["np.ndarray[Any, Any]"]:
        """The named tensors for a batch of images. Raises FnetError if the runtime cannot run the graph."""
        try:
            arrays: list[np.ndarray[Any, Any]] = self.session.run(list(outputs), {INPUT: x.cpu().numpy()})
        except Exception as error:
            raise FnetError(f"ONNX Runtime cannot run the exported network: {first_line(error)}") from None
        return arrays

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x, [LOGITS])[0])


@cache
def saturates() -> bool:
    """Whether ONNX Runtime saturates sums of uint8 times int8 on this processor, as kernels without VNNI do: measured
    on a layer whose pairs of products exceed 16 bits. Then `Runtime` sets SESSION_CONFIG."""
    channels = 32
    space = Macroarchitecture(
        "saturation", (channels, 1, 1), (Node("f", Flatten(), (INPUT,)), Node("d", Dense(8), ("f",)))
    )
    largest = torch.full((8, channels), 255, dtype=torch.uint8)
    layer = QuantizedLayer(largest, (QuantParams(1.0, 128),), torch.zeros(8, dtype=torch.int32))
    total = 255 * 127 * channels  # quantized to 255, half of it to 128
    network = QuantizedNetwork(space, {INPUT: QuantParams(1.0, 0), "d": QuantParams(total / 255, 0)}, {"d": layer})
    session = onnxruntime.InferenceSession(quantized_model(network).SerializeToString(), providers=[CPU])
    x = torch.full((1, channels, 1, 1), 255.0)
    (logits,) = session.run([LOGITS], {INPUT: x.numpy()})
    return not torch.equal(torch.from_numpy(logits), network(x))


def with_outputs(model: ModelProto, codes: Sequence[str]) -> ModelProto:
    """A copy of the model with the named uint8 tensors as further outputs.

    Raises FnetError if the graph lacks one.
    """
    known = {name for node in model.graph.node for name in node.output}
    for name in codes:
        if name not in known:
            raise FnetError(f"the ONNX graph has no tensor {name!r}; it was not exported from this network")
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in codes)
    return copy
