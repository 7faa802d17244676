from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fnet_search.arch.factorize import factorize
from fnet_search.arch.layers import Activation, Add, Conv, Dense, Flatten
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import named_plans
from fnet_search.base.errors import FnetError
from fnet_search.deploy.export import float_model, quantized_model
from fnet_search.deploy.latency import OTHER, SETTLE, TimedGraph, interleaved, layer_latencies, layer_of, machine
from fnet_search.importing.spaces import load_space
from fnet_search.quant.fold import fold
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import MINMAX
from tests.support.evaluations import residual_space
from tests.support.networks import MIXED, REUSED, batches_of, normal, randomized, sequence

TINY = load_space("tiny")
SPACES = {
    "factorized": factorize(TINY, named_plans(TINY)["f4"]),
    "depthwise": factorize(TINY, named_plans(TINY)["dws"]),
    "residual": factorize(residual_space(2), named_plans(residual_space(2))["f4"]),
    "mixed": MIXED,
    "reused": REUSED,
    "odd names": sequence(
        (4, 8, 8), **{'a"b\\c/d': Conv(8), "é <x>.quantize": Activation(), "flat": Flatten(), "a b_token_1": Dense(3)}
    ),
    "odd channels": sequence(
        (3, 12, 12),
        a=Conv(8),
        b=Conv(7),
        c=Activation(),
        d=Conv(16, groups=1, padding=(1, 1)),
        e=Activation("relu6"),
        f=Conv(16, (1, 1)),
        g=Activation("silu"),
        h=Flatten(),
        i=Dense(5),
        j=Activation("relu6"),
        k=Dense(9),
        l=Activation("sigmoid"),
        m=Dense(4),
    ),
}
WITHIN = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}


def graphs(space: Macroarchitecture, folder: Path, batch: int = 1) -> tuple[Macroarchitecture, list[TimedGraph]]:
    """The folded network, and its graph in quint8 and in fp32."""
    folded = fold(randomized(space))
    quantized = quantize(folded, calibrate(folded, batches_of(normal(2, *space.input_shape)), MINMAX))
    models = (quantized_model(quantized), float_model(folded))
    return folded.network, [TimedGraph(model, batch, folder / str(index)) for index, model in enumerate(models)]


def kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["cat"] == "Node"]


# Layers


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPACES)
def test_every_layer_gets_its_kernels_and_nothing_is_lost(name: str, batch: int, tmp_path: Path) -> None:
    network, both = graphs(SPACES[name], tmp_path, batch)
    weighted = [node.name for node in network.order if isinstance(node.layer, Conv | Dense)]
    for graph in both:
        events = graph.events()
        layers = layer_latencies(network, events, slice(0, 1))
        names = [layer.layer for layer in layers]
        assert [one for one in names if one in weighted] == weighted
        assert [layer.layer for layer in layers if layer.macs] == weighted
        position = {node.name: index for index, node in enumerate([*network.order])} | {OTHER: len(network.order)}
        assert names == sorted(set(names), key=position.__getitem__)
        fused = [node.layer for node in network.order if node.name not in names]
        assert all(isinstance(layer, Activation | Add) for layer in fused)
        runs = len(kernels(events)) // SETTLE
        first = {(event["name"], event["args"]["node_index"]): event["dur"] for event in reversed(kernels(events))}
        assert len(first) == runs
        assert sum(layer.median_ms for layer in layers) == pytest.approx(sum(first.values()) / 1e3)
        assert all(layer.median_ms >= 0 for layer in layers)
        kinds = {node.name: node.layer.kind for node in network.order}
        for layer in layers:
            if layer.layer == OTHER:
                assert set(layer.kind.split(", ")) <= WITHIN
            else:
                assert layer.kind == kinds[layer.layer]


def test_grouped_and_pointwise_convolutions_are_apart_with_their_relu(tmp_path: Path) -> None:
    network, (quint8, fp32) = graphs(SPACES["factorized"], tmp_path)
    for graph in (quint8, fp32):
        names = [layer.layer for layer in layer_latencies(network, graph.events(), slice(None))]
        assert names == [
            "conv_in",
            "pool_1",
            "conv_8.grouped",
            "conv_8.pointwise",
            "pool_2",
            "conv_16_1.grouped",
            "conv_16_1.pointwise",
            "conv_16_2.grouped",
            "conv_16_2.pointwise",
            "gap",
            "flatten",
            "dense_out",
            OTHER,
        ]


CHAIN = sequence(
    (4, 8, 8),
    conv=Conv(8, bias=True),
    act=Activation(),
    gate=Activation("silu"),
    Transpose=Conv(8, (1, 1), bias=True),
    flat=Flatten(),
    out=Dense(3),
    end=Activation("relu6"),
)


@pytest.mark.parametrize(
    ("kernel", "operator", "layer"),
    [
        ("conv_token_12", "QLinearConv", "conv"),
        ("act.output_nchwc", "Conv", "conv"),
        ("conv.output_nchwc", "Conv", "conv"),
        ("act", "Relu", "act"),
        ("fused out", "FusedGemm", "out"),
        ("end", "Clip", "end"),
        ("gate/QuickGeluFusion/", "QuickGelu", "gate"),
        ("gate.step1", "Sigmoid", "gate"),
        ("gate.place", "Add", "gate"),
        ("gate.take", "Gather", "gate"),
        ("gate.cast", "Cast", "gate"),
        ("Transpose_token_3", "QLinearConv", "Transpose"),
        ("Transpose", "Transpose", OTHER),
        ("Transpose_token_3", "Transpose", OTHER),
        ("conv.quantize", "QuantizeLinear", OTHER),
        ("ReorderOutput_token_4", "ReorderOutput", OTHER),
        ("somebody's fusion", "Fused", OTHER),
    ],
)
def test_layers_of_kernels(kernel: str, operator: str, layer: str) -> None:
    assert layer_of(CHAIN, kernel, operator) == layer


def event(name: str, duration: int, operator: str = "Conv", index: str = "0", kind: str = "Node") -> dict[str, Any]:
    return {"cat": kind, "name": name, "dur": duration, "args": {"op_name": operator, "node_index": index}}


def test_a_layer_is_the_median_over_runs_of_the_sum_of_its_kernels() -> None:
    runs = [(9000, 9000), (1, 40), (2, 30), (3, 20), (400, 10)]  # microseconds; the first does not count
    events = [
        one
        for cast, gather in runs
        for one in (
            event("model_run", 10**6, kind="Session"),
            event("gate.cast_kernel_time", cast, "Cast", "7"),
            event("gate_kernel_time", gather, "Gather", "8"),
            event("gate_fence_before", 10**6, "Gather", "8"),
        )
    ]
    (layer,) = layer_latencies(CHAIN, events, slice(1, None))
    assert (layer.layer, layer.kind, layer.macs) == ("gate", "activation", 0)
    assert layer.median_ms == pytest.approx(median([41, 32, 23, 410]) / 1e3)


def test_kernels_of_one_name_are_kept_apart() -> None:
    pair = [event("Transpose_kernel_time", 2, "Transpose", "1"), event("Transpose_kernel_time", 5, "Transpose", "2")]
    (layer,) = layer_latencies(CHAIN, [*pair, *pair, *pair], slice(None))
    assert layer.median_ms == pytest.approx(0.007)
    assert (layer.layer, layer.kind) == (OTHER, "Transpose")


# Rounds


def test_rounds_run_every_task_once_and_never_in_one_order() -> None:
    log: list[int] = []

    def task(index: int) -> Callable[[], float]:
        def run() -> float:
            log.append(index)
            return float(len(log))

        return run

    progress: list[tuple[int, int]] = []
    found = interleaved([task(index) for index in range(4)], 12, lambda done, total: progress.append((done, total)))
    rounds = [log[start : start + 4] for start in range(0, 48, 4)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    for index in range(4):
        before = {log[place - 1] for place, one in enumerate(log) if one == index and place}
        assert before >= {0, 1, 2, 3} - {index}
    assert found == [
        [float(4 * number + order.index(index) + 1) for number, order in enumerate(rounds)] for index in range(4)
    ]
    assert progress == [(done, 48) for done in range(1, 49)]


def test_the_profiled_runs_that_count_are_one_a_round_and_settled(tmp_path: Path) -> None:
    _, both = graphs(SPACES["factorized"], tmp_path, 2)
    graph = both[0]
    samples = [graph.sample() for _ in range(3)]
    assert all(sample > 0 for sample in samples)
    assert 0 < graph.cpu <= graph.wall * 1.05
    events = [one for one in kernels(graph.events()) if one["args"]["op_name"] == "QuantizeLinear"]
    assert events[0]["args"]["input_type_shape"][0] == {"float": [2, 3, 32, 32]}
    counted = range(len(events))[TimedGraph.COUNTED]
    assert len(counted) == 3
    assert counted[-1] == len(events) - 1
    assert counted.step == SETTLE + 1


def test_a_batch_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FnetError, match=r"^ONNX Runtime cannot run sequence on a batch of 1000000000000: .+$") as error:
        graphs(replace(CHAIN, nodes=CHAIN.nodes[:-1]), tmp_path, 10**12)
    assert "\n" not in str(error.value)


# The machine


def test_the_machine_is_named_with_what_integers_need(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz \nflags\t\t: fpu avx2 avx512_vnni_not avx512_vnni\n"
    )
    assert machine(info) == "Fast CPU @ 3 GHz (avx2, avx512_vnni)"
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert machine(info).endswith(" (asimddp, i8mm)")
    assert machine(tmp_path / "none")
    assert "(" not in machine(tmp_path / "none")
