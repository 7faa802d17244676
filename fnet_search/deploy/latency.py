"""Latency of exported graphs in ONNX Runtime on one thread, by network and by layer.

The quint8 and the fp32 graphs of all networks are timed in interleaved rounds, so that a disturbance of the machine
affects all of them alike. Layers are timed by the runtime's profiler, in the same rounds but in separate sessions,
since profiling slows a session down. Times are milliseconds for one run of a batch.
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
"""Stands for the kernels between layers, which quantize, dequantize or change the layout."""
THREADS, ROUNDS = 1, 30
SAMPLE = 0.02
"""Seconds that the runs of one sample take together."""
SETTLE = 4
"""Runs before a sample that do not count: after other networks have run, the first few are up to 50 % slower, until
weights and code are back in the caches."""


@dataclass(frozen=True)
class LayerLatency:
    """The time of the kernels that compute a layer, including what the runtime fused into them. For OTHER, `kind` lists
    the operators. `macs` are those of one image."""

    layer: str
    kind: str
    macs: int
    median_ms: float


@dataclass(frozen=True)
class Latency:
    """The latency of one network in one precision: median and quartiles over `rounds` samples. MACs are those of one
    image.

    The times of the layers do not add up exactly to that of the network: the profiler adds one or two microseconds to
    each kernel, and the runtime's work between kernels is in none of them.
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
    """The fraction of the samples' wall time in which the thread ran; below 1 where it shared the processor."""
    machine: str
    onnxruntime: str
    layers: tuple[LayerLatency, ...] = ()

    @property
    def macs_per_second(self) -> float:
        return self.total_macs * self.batch / self.median_ms * 1e3


def interleaved(
    tasks: Sequence[Callable[[], float]], rounds: int, seen: Callable[[int, int], None]
) -> list[list[float]]:
    """Runs every task once in each round. Returns the results of each task.

    The order is shuffled anew in each round, so that no task always follows the same one, by a fixed seed. `seen` is
    called with the number of results so far and their total.
    """
    samples: list[list[float]] = [[] for _ in tasks]
    for number in range(rounds):
        for done, index in enumerate(random.Random(number).sample(range(len(tasks)), len(tasks)), 1):
            samples[index].append(tasks[index]())
            seen(number * len(tasks) + done, rounds * len(tasks))
    return samples


class TimedGraph:
    """An exported network in two sessions: one is timed, the other is profiled."""

    COUNTED = slice(2 * SETTLE, None, SETTLE + 1)
    """The profiled runs that count: the one after each sample."""

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
        """Milliseconds for a run: the median over a sample. Then profiles one more run, after the same number of runs
        that do not count."""
        self._seconds(self.timed, SETTLE)
        cpu = time.thread_time()
        seconds = self._seconds(self.timed, self.runs)
        self.cpu += time.thread_time() - cpu
        self.wall += sum(seconds)
        self._seconds(self.profiled, SETTLE + 1)
        return 1e3 * median(seconds)

    def events(self) -> Any:
        """Ends profiling. Returns the profiler's events of all runs."""
        return json.loads(Path(self.profiled.end_profiling()).read_text(encoding="utf-8"))


_INSERTED = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
_MULTIPLYING = {"Conv", "FusedConv", "QLinearConv", "Gemm", "FusedGemm", "QGemm"}
_ADDED = (r"_token_\d+$", r"\.output_nchwc$", r"/\w+/$", r"\.(step\d|cast|place|take)$", r"^fused ")
"""Suffixes and prefixes that the runtime's optimizers and our export add to a layer's name, outermost first."""


def layer_of(network: Macroarchitecture, kernel: str, operator: str) -> str:
    """The layer that a node of the runtime's optimized graph computes, from the node's name, or OTHER.

    A convolution in NCHWc layout is named after its output, which is that of the ReLU fused into it.
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
    """The latency of each layer of a folded network, in its order and OTHER last, from the profiler's events.

    `counted` selects the runs. A layer that was fused into another one has no kernel and is left out.
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
    """The name of the processor and, where known, its instruction sets that matter for integer kernels."""
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    sets = [instructions for instructions in _INTEGER if flags and instructions in flags[1].split()]
    processor = name[1].strip() if name else platform.processor() or platform.machine() or "unknown processor"
    return processor + (f" ({', '.join(sets)})" if sets else "")
