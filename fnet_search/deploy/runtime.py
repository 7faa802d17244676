"""ONNX Runtime: the integer runtime that results are compared with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from fnet_search.arch.macroarchitecture import INPUT
from fnet_search.base.errors import FnetError, first_line
from fnet_search.deploy.export import LOGITS


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
        for name, value in (options or {}).items():
            setattr(settings, name, value)
        try:
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
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
