"""How long exported graphs take in ONNX Runtime, one thread, per network and per layer.

Every network is timed twice, as its quint8 and as its fp32 graph, all of them in interleaved rounds: what disturbs the
machine for a while disturbs them alike. Layers are timed by the runtime's own profiler, in the same rounds but in
sessions of their own, since it slows what it watches. Times are milliseconds for one run of a batch.
"""

import json
import math
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from fnet_search.arch.costs import layer_cost
from fnet_search.arch.layers import Activation
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture
from fnet_search.base.errors import FnetError, first_line
from fnet_search.deploy.runtime import Runtime

QUINT8, FP32 = "quint8", "fp32"
OTHER = "(layout, quantization)"
"""Stands for a layer where the runtime works between layers: it quantizes, dequantizes, and changes the layout."""
THREADS, ROUNDS = 1, 30
SAMPLE, SETTLE = 0.02, 4
"""Seconds that a sample's runs last together, and the runs before them that do not count: when other networks ran, the
first few are slower by up to a half, until weights and code are back in the caches."""


@dataclass(frozen=True)
class LayerLatency:
    """The kernels that compute a layer, with what the runtime fused into them; of OTHER, `kind` names the operators.
    `macs` are those of one image."""

    layer: str
    kind: str
    macs: int
    median_ms: float


@dataclass(frozen=True)
class Latency:
    """One network in one precision: median and quartiles over `rounds` samples. MACs are those of one image.

    The layers' times add up to the network's only nearly: the profiler adds a microsecond or two to each kernel, and
    what the runtime does from one kernel to the next is in none of them.
    """

    network: str
    """`RecordedNetwork.id`."""
    label: str
    precision: str
    conv_macs: int
    total_macs: int
    batch: int
    threads: int
    rounds: int
    lower_ms: float
    median_ms: float
    upper_ms: float
    cpu_share: float
    """Of the time of all samples, the fraction in which the thread ran; less where others wanted the processor too."""
    machine: str
    onnxruntime: str
    layers: tuple[LayerLatency, ...] = ()

    @property
    def macs_per_second(self) -> float:
        return self.total_macs * self.batch / self.median_ms * 1e3


def interleaved(
    tasks: Sequence[Callable[[], float]], rounds: int, seen: Callable[[int, int], None]
) -> list[list[float]]:
    """What every task gives in each round. The order is another one in every round, so that none of them always comes
    after the same one; it is the same whenever this is called."""
    samples: list[list[float]] = [[] for _ in tasks]
    for number in range(rounds):
        for done, index in enumerate(random.Random(number).sample(range(len(tasks)), len(tasks)), 1):
            samples[index].append(tasks[index]())
            seen(number * len(tasks) + done, rounds * len(tasks))
    return samples


class TimedGraph:
    """An exported network in two sessions: one that is timed, one that is profiled."""

    COUNTED = slice(2 * SETTLE, None, SETTLE + 1)
    """Of the profiled runs, those that count."""

    def __init__(self, model: ModelProto, batch: int, profile: Path) -> None:
        timed = Runtime(model, THREADS)
        profiled = Runtime(model, THREADS, {"enable_profiling": True, "profile_file_prefix": str(profile)})
        self.timed, self.profiled, self.version = timed.session, profiled.session, timed.version
        shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:]]
        try:
            self.feed = {INPUT: np.random.default_rng(0).standard_normal((batch, *shape), np.float32)}
            for session in (self.timed, self.profiled):
                self._seconds(session, SETTLE)
        except Exception as error:  # the runtime's exceptions have no common base
            subject = f"{model.graph.name} on a batch of {batch}"
            raise FnetError(f"ONNX Runtime cannot run {subject}: {first_line(error)}") from None
        self.runs = max(3, math.ceil(SAMPLE / min(self._seconds(self.timed, SETTLE))))
        self.wall = self.cpu = 0.0

    def _seconds(self, session: Any, runs: int) -> list[float]:
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, self.feed)
            seconds.append(time.perf_counter() - start)
        return seconds

    def sample(self) -> float:
        """Milliseconds a run, the median of some. Then profiles one more run, settled in the same way."""
        self._seconds(self.timed, SETTLE)
        cpu = time.thread_time()
        seconds = self._seconds(self.timed, self.runs)
        self.cpu += time.thread_time() - cpu
        self.wall += sum(seconds)
        self._seconds(self.profiled, SETTLE + 1)
        return 1e3 * median(seconds)

    def events(self) -> Any:
        """What the profiler saw of all runs; ends it."""
        return json.loads(Path(self.profiled.end_profiling()).read_text(encoding="utf-8"))


_INSERTED = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
_MULTIPLYING = {"Conv", "FusedConv", "QLinearConv", "Gemm", "FusedGemm", "QGemm"}
_ADDED = (r"_token_\d+$", r"\.output_nchwc$", r"/\w+/$", r"\.(step\d|cast|place|take)$", r"^fused ")
"""What the runtime's optimizers and our export add to the name of a layer, outermost first."""


def layer_of(network: Macroarchitecture, kernel: str, operator: str) -> str:
    """The layer that a node of the runtime's optimized graph computes, by its name; else OTHER.

    A convolution in NCHWc is called after its output, which is that of the ReLU that was fused into it.
    """
    for added in ("", *_ADDED):
        kernel = re.sub(added, "", kernel)
        if kernel in network.by_name and operator not in _INSERTED:
            node = network.by_name[kernel]
            while isinstance(node.layer, Activation) and operator in _MULTIPLYING:
                node = network.by_name[node.inputs[0]]
            return node.name
    return OTHER


def layer_latencies(
    network: Macroarchitecture, events: Iterable[Mapping[str, Any]], counted: slice
) -> tuple[LayerLatency, ...]:
    """The layers of a folded network, in its order and OTHER last, from the events of the runtime's profiler.

    `counted` says which of the runs. A layer that was fused into another has no kernel, and is left out.
    """
    kernels: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name, facts = event["name"].removesuffix("_kernel_time"), event["args"]
            kernels.setdefault((name, facts["op_name"], facts["node_index"]), []).append(event["dur"] / 1e3)
    times: dict[str, npt.NDArray[np.float64]] = {}
    between: dict[str, None] = {}
    for (name, operator, _), durations in kernels.items():
        layer = layer_of(network, name, operator)
        times[layer] = times.get(layer, np.zeros(())) + np.array(durations[counted])
        if layer == OTHER:
            between[operator] = None
    latencies = [
        LayerLatency(
            node.name,
            node.layer.kind,
            layer_cost(node, network.input_shapes(node)).total_macs,
            float(np.median(times[node.name])),
        )
        for node in network.order
        if node.name in times
    ]
    if between:
        latencies.append(LayerLatency(OTHER, ", ".join(between), 0, float(np.median(times[OTHER]))))
    return tuple(latencies)


_INTEGER = ("avx2", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def machine(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor, with those of its instruction sets that integer kernels are chosen by, where they are known."""
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    sets = [one for one in _INTEGER if flags and one in flags[1].split()]
    processor = name[1].strip() if name else platform.processor() or platform.machine() or "unknown processor"
    return processor + (f" ({', '.join(sets)})" if sets else "")
