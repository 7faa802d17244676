"""Probes: what each rate of each layer does to a trained network, all else unchanged and nothing trained
(docs/probes.md).

Only what follows a change is computed again. The network is cut where a single tensor leads to the layer; the part
after the cut, the *tail*, is a network of its own, whose input is the trained network's output at the cut, in float and
in codes. All rates of a layer share this input, and the targets of the warm start.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from fnet_search.arch.costs import plan_cost
from fnet_search.arch.factorize import convolutions, factorize
from fnet_search.arch.layers import Activation, Foldable
from fnet_search.arch.macroarchitecture import INPUT, Macroarchitecture, Node
from fnet_search.arch.plan import FactorizationPlan, legal_rates, make_plan, regular
from fnet_search.base.errors import FnetError
from fnet_search.base.units import size_text
from fnet_search.candidates.evaluate import transform_samples
from fnet_search.candidates.job import Setup, Start
from fnet_search.candidates.measure import class_results
from fnet_search.candidates.network_files import WEIGHTS, load_quantized, load_trained, write_codes
from fnet_search.importing.named_modules import OWN, channels_of, fill
from fnet_search.importing.spaces import load_space
from fnet_search.importing.translation import from_module
from fnet_search.policy.evaluation import Probe, Probes
from fnet_search.policy.metric import MetricName
from fnet_search.quant.bias_correction import ChannelMeans, correct_biases
from fnet_search.quant.calibration import calibration_batches, folded_for, quantize_trained
from fnet_search.quant.fold import FoldedNetwork
from fnet_search.quant.layer_statistics import profile, sqnr_db
from fnet_search.quant.quant_params import QuantParams
from fnet_search.quant.quantize import quantize
from fnet_search.quant.quantized_layer import QuantizedLayer
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import CHOICE, Scheme, parse_scheme
from fnet_search.quant.sensitivity import stratified_sample
from fnet_search.quant.simulator import QuantizedNetwork
from fnet_search.training.datasets import DataSet, Split, hold_out, load_dataset, natural_shape
from fnet_search.training.network import Network, build, load_weights, pretrained, walk
from fnet_search.training.numerics import Numerics, check_device
from fnet_search.training.recipe import load_recipe
from fnet_search.training.warm_start import Target, warm_start
from fnet_search.training.weights import write_tensors

MIN_IMAGES, MAX_IMAGES = 128, 512
"""Probes are measured on a tenth of the validation split, within these bounds."""
CALIBRATED, CORRECTED = 128, 64
"""Training images for the activation ranges after a change, and the first of them, for bias correction."""
PROFILED = 32
"""Training images for the SQNR of the changed layer."""
FISHER_BATCH = 64
"""Training images for a Fisher score."""
BATCH = 64
"""Images in a batch."""


@dataclass(frozen=True)
class ProbeTask:
    """One layer of the trained network `start`, to be probed at `rates`; its own rate means no change.

    `fisher` adds Fisher scores.
    """

    layer: str
    rates: tuple[int, ...]
    start: Start
    fisher: bool = False


def probe_tasks(space: Macroarchitecture, start: Start, fisher: bool = False) -> list[ProbeTask]:
    """A task for each layer, in network order, so that the longest tails come first. The last task also measures the
    unchanged network."""
    tasks = []
    for layer, rates in legal_rates(space).items():
        own = start.plan[layer]
        tasks.append(ProbeTask(layer, tuple(rate for rate in rates if rate % own == 0 and rate > own), start, fisher))
    last = tasks.pop()
    return [*tasks, replace(last, rates=(start.plan[last.layer], *last.rates))]


def probes_from(number: int, plan: FactorizationPlan, measured: Iterable[Probe]) -> Probes:
    """The probes of a network, from those of its tasks."""
    unchanged, *changes = sorted(measured, key=lambda probe: bool(probe.layer))
    return Probes(number, plan, unchanged, tuple(changes))


def probe_network(setup: Setup, data: DataSet, start: Start, fisher: bool = False) -> Probes:
    """All probes of the trained network with files in ``start.folder``, one after the other.

    For other hosts of policies: a search distributes the layers among its workers. Raises FnetError as `probe_layer`.
    """
    tasks = probe_tasks(setup.space, start, fisher)
    return probes_from(start.number, start.plan, (probe for task in tasks for probe in probe_layer(setup, data, task)))


Images = DataSet | tuple[Tensor, Tensor] | str
"""A data set, the name of one, or a pair: images float32 [N, C, H, W] as the network reads them, classes int64 [N]."""


def probes_for(
    network: nn.Module | Macroarchitecture | Path | str,
    weights: Mapping[str, Tensor] | Path | str | None,
    data: Images,
    *,
    scheme: Scheme | str = CHOICE[0],
    fisher: bool = False,
    metric: MetricName = "accuracy",
    device: str = "cpu",
) -> Probes:
    """The probes of a trained network, for a search loop of your own: ``AskTell(LayerGuided(), space, probes=...)``.

    Neither network nor data are changed, and nothing stays on disk.

    Args:
        network: a torch module, a space, or the name of a space as `load_space` takes it.
        weights: a file, or a state dict (of the module, or of the space's `Network`); None: those of the network.
        data: if it is a name or a pair of tensors, or a `DataSet` that is evaluated on its test split, a part of its
            training images is held out and measured on (`hold_out`).
        scheme: how the networks are quantized.
        fisher: adds Fisher scores, which the policy ``fisher`` needs.
        metric: that of the search; ``balanced-accuracy`` adds the results of each class.

    Raises FnetError for a network without weights or without a layer to factorize, for weights that do not fit it, and
    for data of another shape or number of classes.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        space = _weighted(network, weights, data, folder)
        images = _images(data, space)
        chosen = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        setup = Setup(
            space, load_recipe("quick"), (chosen,), Numerics(check_device(device)), 0, "validation", metric=metric
        )
        images = images.to(setup.numerics.device)
        start = Start(0, regular(space), folder, 0, chosen)
        trained = pretrained(space).eval().to(setup.numerics.device)
        write_tensors(folder / WEIGHTS, trained.state_dict(), {"plan": str(start.plan)})
        write_codes(folder, start.plan, trained, quantize_trained(trained, chosen, images, setup.seed))
        return probe_network(setup, images, start, fisher)


def _weighted(
    network: nn.Module | Macroarchitecture | Path | str,
    weights: Mapping[str, Tensor] | Path | str | None,
    data: Images,
    scratch: Path,
) -> Macroarchitecture:
    """The space of the network with its weights, for images of the data's size."""

    def shape(channels: int) -> tuple[int, int, int]:
        if isinstance(data, str):
            return natural_shape(data, channels)
        channels, height, width = (data.train.images if isinstance(data, DataSet) else data[0]).shape[1:]
        return channels, height, width

    file = None if weights is None else str(weights)
    if isinstance(weights, Mapping):
        file = str(scratch / "weights.pt")
        torch.save(dict(weights), file)
    if isinstance(network, nn.Module):
        if file is not None:
            network = deepcopy(network)
            fill(network, file)
        space = from_module(network, torch.zeros(1, *shape(channels_of(network))))
    elif isinstance(network, Macroarchitecture):
        space = network if file is None else load_weights(network, Path(file))
    else:
        own = OWN if ":" in str(network) and not str(network).startswith("torchvision:") else None
        space = load_space(str(network), None, file or own, shape)
    if space.weights is None:
        raise FnetError(f"space {space.name!r} has no weights; give a file or a state dict")
    if not legal_rates(space):
        raise FnetError(f"there is nothing to factorize in {space.name}: no convolution has factorize = true")
    return space


def _images(data: Images, space: Macroarchitecture) -> DataSet:
    """The data set with a validation split and the space's normalisation. Raises FnetError if it does not fit the
    space."""
    if isinstance(data, str):
        loaded = load_dataset(data, space.input_shape, split="validation")
    elif isinstance(data, DataSet):
        loaded = data
    else:
        images, labels = data
        if not images.is_floating_point() or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise FnetError("images must be float32 [N, C, H, W], as the network reads them, and classes int64 [N]")
        whole, ones = Split(255 * images.detach().float(), labels.long()), (1.0,) * images.shape[1]
        names = tuple(map(str, range(space.classes)))
        loaded = DataSet("images", names, whole, whole, whole, tuple(0.0 for _ in ones), ones, flips=False)
    if loaded.evaluation is loaded.test:
        loaded = hold_out(loaded)
    ours, theirs = (space.input_shape, space.classes), (tuple(loaded.train.images.shape[1:]), len(loaded.classes))
    if ours != theirs:
        wanted, given = (f"{size_text(size)}, {classes} classes" for size, classes in (ours, theirs))
        raise FnetError(f"the network is for images of {wanted}; the data are {given}")
    return replace(loaded, mean=space.mean, std=space.std) if space.mean and not isinstance(data, tuple) else loaded


@torch.no_grad()
def probe_layer(
    setup: Setup, data: DataSet, task: ProbeTask, seen: Callable[[int], None] = lambda done: None
) -> tuple[Probe, ...]:
    """Measures the rates of one layer. `seen` is called with the number of rates that are done.

    Raises FnetError, naming the file, if weights or codes of the network are missing or broken.
    """
    trained = load_trained(setup.space, task.start.plan, task.start.folder).to(setup.numerics.device)
    folded, quantized = load_quantized(trained, task.start.scheme, task.start.folder)
    at = cut(setup.space, task.layer)
    space = tail(setup.space, at)
    fed = _feed(setup, data, folded, quantized, _source(trained.network, folded.network, at))
    for layer in quantized.layers.values():
        _ = layer.slices  # cached now, and shared with every layer that is quantized with the same codes
    parent = _network(space, task.start.plan).to(setup.numerics.device)
    weights = trained.state_dict()
    parent.load_state_dict({name: weights[name] for name in parent.state_dict()})
    targets: dict[str, Target] = {}
    probes = []
    for rate in task.rates:
        plan = make_plan(setup.space, {**task.start.plan.by_layer, task.layer: rate})
        child = _network(space, plan).to(setup.numerics.device)
        warm_start(parent, child, fed.training, targets)
        unchanged = plan == task.start.plan
        probes.append(
            replace(
                _measure(setup, task.start.scheme, child, fed, () if unchanged else convolutions(task.layer, rate)),
                layer="" if unchanged else task.layer,
                rate=rate,
                conv_macs=plan_cost(setup.space, plan).conv_macs,
                fisher=fisher_score(setup, data, plan) if task.fisher else None,
            )
        )
        seen(len(probes))
    return tuple(probes)


def cut(space: Macroarchitecture, layer: str) -> str:
    """The node (or the input) whose output [C, H, W] is the last single tensor before a layer: everything after it
    depends on that tensor alone.

    A tensor that a BatchNorm, an affine layer or an activation reads is not taken: these stay with the layer before
    them, so that a tail is folded and quantized exactly as within the whole network.
    """
    position = {name: index for index, name in enumerate((INPUT, *(node.name for node in space.order)))}

    def alone(name: str) -> bool:
        crossing = {a for a, b in space.graph.edges if position[a] <= position[name] < position[b]}
        bound = any(isinstance(reader.layer, Foldable | Activation) for reader in space.consumers(name))
        return crossing == {name} and not bound and len(space.shapes[name]) == 3

    return next(name for name in reversed(list(position)[: position[layer]]) if name == INPUT or alone(name))


def tail(space: Macroarchitecture, at: str) -> Macroarchitecture:
    """The part of a space after a `cut`, as a space whose input is the tensor there."""
    names = [INPUT, *(node.name for node in space.order)]
    nodes = (
        Node(node.name, node.layer, tuple(INPUT if name == at else name for name in node.inputs))
        for node in space.order[names.index(at) :]
    )
    channels, height, width = space.shapes[at]
    return Macroarchitecture(space.name, (channels, height, width), tuple(nodes))


def _network(space: Macroarchitecture, plan: FactorizationPlan) -> Network:
    """The network of a tail under its part of a plan, in evaluation mode."""
    return Network(factorize(space, make_plan(space, {layer: plan[layer] for layer in legal_rates(space)}))).eval()


def _source(network: Macroarchitecture, folded: Macroarchitecture, at: str) -> str:
    """The node that gives the tensor at a cut in the folded network of a plan: for a factorized layer its pointwise
    part, for a BatchNorm or affine layer the layer that it was folded into."""
    name = at if at == INPUT or at in network.by_name else f"{at}.pointwise"
    while name != INPUT and name not in folded.by_name:
        name = network.by_name[name].inputs[0]
    return name


@dataclass(frozen=True)
class _TailInput:
    """The outputs of a trained network at a cut [N, C, H, W]: `samples` for training images; `floats` and `codes` (with
    `params`) for the images that are measured, which have float `logits` [N, classes] and `labels` [N]."""

    samples: Tensor
    floats: Tensor
    codes: Tensor
    params: QuantParams
    logits: Tensor
    labels: Tensor
    folded: FoldedNetwork
    """The whole trained network, folded."""
    layers: Mapping[str, QuantizedLayer]
    """The quantized layers of that network."""

    def known(self, tail: FoldedNetwork) -> dict[str, QuantizedLayer]:
        """The quantized layers of the trained network whose weights are unchanged in a tail."""
        same = (name for name in tail.weight.keys() & self.layers.keys())
        return {name: self.layers[name] for name in same if torch.equal(tail.weight[name], self.folded.weight[name])}

    def training(self) -> Iterator[Tensor]:
        return iter(
            torch.split(self.samples, 128)
        )  # the batches of `calibration_batches`: a warm start draws places by batch

    def few(self, samples: int = CALIBRATED) -> Iterator[Tensor]:
        return iter(torch.split(self.samples[:samples], BATCH))

    def measured(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Batches of floats, of the values that the codes stand for, of logits, and of labels."""
        parts = (torch.split(tensor, BATCH) for tensor in (self.floats, self.codes, self.logits, self.labels))
        return ((x, self.params.dequantize(codes), *rest) for x, codes, *rest in zip(*parts, strict=True))


def probed_images(data: DataSet) -> Split:
    """The images that probes are measured on: a part of the validation split, in the proportions of its classes."""
    return stratified_sample(data.evaluation, min(MAX_IMAGES, max(MIN_IMAGES, len(data.evaluation) // 10)))


def _feed(setup: Setup, data: DataSet, folded: FoldedNetwork, quantized: QuantizedNetwork, source: str) -> _TailInput:
    """Runs the trained network once. `source` is the node of the folded network at the cut."""

    def floats(x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor at the cut, and the logits."""
        at = x
        for node, output in walk(folded.network, x, folded.apply_node):
            at = output if node.name == source else at
        return at, output

    def at_cut(x: Tensor) -> Tensor:
        if source == INPUT:
            return x
        return next(output for node, output in walk(folded.network, x, folded.apply_node) if node.name == source)

    def codes(x: Tensor) -> Tensor:
        if source == INPUT:
            return quantized.params[INPUT].quantize(x)
        return next(output for node, output in quantized.codes(x) if node.name == source)

    images = probed_images(data)
    batches = [_faster(data.normalise(batch)) for batch, _ in images.batches(BATCH)]
    samples = [at_cut(_faster(x)) for x in calibration_batches(data, setup.seed, transform_samples(setup.space))()]
    given, logits = zip(*map(floats, batches), strict=True)
    return _TailInput(
        torch.cat(samples),
        torch.cat(given),
        torch.cat([*map(codes, batches)]),
        quantized.params[quantized.carrier[source]],
        torch.cat(logits),
        images.labels,
        folded,
        quantized.layers,
    )


def _faster(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _measure(setup: Setup, scheme: Scheme, trained: Network, fed: _TailInput, layers: tuple[str, ...]) -> Probe:
    """Folds, quantizes and measures a tail. The probe has the statistics of `layers`."""
    folded = folded_for(scheme, trained)
    collected = ChannelMeans(CORRECTED if scheme.bias_correct else 0)
    stats = dict(calibrate(folded, fed.few, scheme.ranges, CALIBRATED, collected))
    low, high = (
        fed.params.scale * (code - fed.params.zero) for code in (0, 255)
    )  # the range at the cut in the whole network
    stats[INPUT] = replace(stats[INPUT], low=low, high=high)
    quantized = quantize(folded, stats, scheme.per_channel, fed.known(folded))
    if scheme.bias_correct:
        quantized = correct_biases(folded, quantized, partial(fed.few, CORRECTED), collected.means)
    sums, predictions = torch.zeros(4, dtype=torch.float64), []
    for x, x8, logits, labels in fed.measured():
        both = folded(x), quantized(x8)
        losses = [F.cross_entropy(y.double(), labels, reduction="sum") for y in both]
        predictions.append(torch.stack([y.argmax(1) for y in both]))
        noises = [(y - logits).double().square().sum() for y in both]
        sums += torch.stack([*losses, *noises]).cpu()
    signal = float(fed.logits.double().square().sum())
    few = fed.samples[:PROFILED]
    loss, quint8_loss = (sums[:2] / len(fed.labels)).tolist()
    predicted = torch.cat(predictions, dim=1)
    fp32_accuracy, quint8_accuracy = (predicted == fed.labels).double().mean(1).tolist()
    names = [""] * logits.shape[1]
    return Probe(
        layer="",
        rate=1,
        conv_macs=0,
        images=len(fed.labels),
        loss=loss,
        quint8_loss=quint8_loss,
        fp32_accuracy=fp32_accuracy,
        quint8_accuracy=quint8_accuracy,
        logit_snr_db=sqnr_db(signal, float(sums[2])),
        logit_sqnr_db=sqnr_db(signal, float(sums[3])),
        layers=profile(trained, folded, quantized, stats, [(few, few)], layers) if layers else (),
        classes=() if setup.metric == "accuracy" else class_results(predicted, fed.labels, names),
    )


def fisher_score(setup: Setup, data: DataSet, plan: FactorizationPlan) -> float:
    """The Fisher score of a plan: how much the loss of its freshly initialised network depends on the channels of its
    factorizable layers (BlockSwap, arXiv:1906.04113, equation 3).

    The sum over channels of the mean over a minibatch of (sum over positions of a dL/da)^2 / 2, where a is the output
    of each layer after its norm and activation.
    """
    network = build(factorize(setup.space, plan), setup.recipe.initializer, setup.seed)
    network.to(setup.numerics.device).train()
    ends = {_end(network.network, convolutions(layer, rate)[-1]) for layer, rate in plan.rates}
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(setup.seed))[:FISHER_BATCH]
    batch = data.train.take(chosen.to(data.train.images.device))
    activations = []
    with torch.enable_grad():
        for node, output in walk(network.network, _faster(data.normalise(batch.images)), network.apply_node):
            if node.name in ends:
                activations.append(output)
        loss = F.cross_entropy(output, batch.labels, reduction="sum")
        gradients = torch.autograd.grad(loss, activations)
    pairs = zip(activations, gradients, strict=True)
    return sum(float((a.detach() * gradient).flatten(2).sum(2).square().mean(0).sum()) / 2 for a, gradient in pairs)


def _end(network: Macroarchitecture, name: str) -> str:
    """The last node of a layer with its norm and activation."""
    readers = network.consumers(name)
    if len(readers) == 1 and isinstance(readers[0].layer, Foldable | Activation):
        return _end(network, readers[0].name)
    return name
