"""Plans that are trained once, from a common reference, and kept: what policies.py and ranking.py have in common."""

import argparse
import base64
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import FactorizationPlan, label, regular
from fnet_search.candidates.evaluate import evaluate
from fnet_search.candidates.job import Job, Setup, Start
from fnet_search.candidates.network_files import load_quantized, load_trained
from fnet_search.candidates.probes import ProbeTask, probe_layer, probe_tasks, probes_from
from fnet_search.candidates.worker_count import cores
from fnet_search.deploy.export import quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.importing.spaces import load_space
from fnet_search.policy.evaluation import Evaluation, Probe, Probes
from fnet_search.quant.scheme import parse_scheme
from fnet_search.training.datasets import DataSet, load_dataset, read_dataset
from fnet_search.training.numerics import Numerics, resolve
from fnet_search.training.recipe import Fidelity, load_recipe

WARM_RATE, WARM_EPOCHS = 0.05, 0.25
"""Of children: as few images leave a transformed network better at a rate below the recipe's."""


@dataclass(frozen=True)
class Study:
    """What all searches have in common, and where it is kept."""

    out: Path
    space: Macroarchitecture
    numerics: Numerics

    def setup(self, seed: int) -> Setup:
        recipe = replace(load_recipe("quick"), warm_rate=WARM_RATE)
        scheme, fidelity = parse_scheme("percentile:1"), Fidelity(True, WARM_EPOCHS)
        return Setup(self.space, recipe, (scheme,), self.numerics, seed, "validation", fidelity=fidelity)

    def start(self, parent: int) -> Start:
        """The reference of a seed."""
        folder = self.out / f"seed{parent}" / "reference"
        return Start(0, regular(self.space), folder, self.setup(parent).recipe.epochs)

    def folder(self, seed: int, plan: FactorizationPlan, parent: int) -> Path:
        name = "-".join(str(rate) for _, rate in plan.rates)
        return self.out / f"seed{seed}" / (name if parent == seed else f"{name}-from{parent}")


@dataclass(frozen=True)
class Measured:
    """One trained plan: its evaluation on the validation split, and which test images its quint8 network gets right."""

    evaluation: Evaluation
    test_hits: np.ndarray
    seconds: float

    @property
    def test(self) -> float:
        return float(self.test_hits.mean())


@cache
def _data(path: Path) -> DataSet:
    return read_dataset(path)


def measure(study: Study, seed: int, plan: FactorizationPlan, parent: int | None) -> None:
    """Trains and measures a plan from the reference of seed `parent`; None: that reference. Leaves ``result.json``."""
    began, setup, data = time.monotonic(), study.setup(seed), _data(study.out / "data.safetensors")
    folder = study.start(seed).folder if parent is None else study.folder(seed, plan, parent)
    job = Job(0 if parent is None else 1, plan, folder, "reference" if parent is None else "candidate")
    if parent is not None:
        job = replace(job, start=study.start(parent))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(setup.threads_of(job))
    evaluation = evaluate(setup, data, job, lambda progress: None)
    hits = torch.zeros(0, dtype=torch.bool)
    if evaluation.state == "complete":
        _, quantized = load_quantized(load_trained(study.space, plan, folder), setup.schemes[0], folder)
        runtime = Runtime(quantized_model(quantized), torch.get_num_threads())
        parts = [runtime(data.normalise(x)).argmax(1) == labels for x, labels in data.test.batches(50)]
        hits = torch.cat(parts)
    if parent is not None:
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    packed = base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()
    facts = {"evaluation": evaluation.to_json(), "hits": packed, "images": len(hits)}
    partial = folder / "result.tmp"
    partial.write_text(json.dumps({**facts, "seconds": time.monotonic() - began}))
    partial.rename(folder / "result.json")


def read(folder: Path) -> Measured | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    facts = json.loads(path.read_text())
    bits = np.unpackbits(np.frombuffer(base64.b64decode(facts["hits"]), dtype=np.uint8))
    return Measured(Evaluation.from_json(facts["evaluation"]), bits[: facts["images"]], facts["seconds"])


def _probe(study: Study, seed: int, layer: str) -> None:
    """Probes one layer of a reference, with Fisher scores; leaves ``probes/LAYER.json``."""
    torch.set_num_threads(study.numerics.threads)
    task = next(one for one in probe_tasks(study.space, study.start(seed), fisher=True) if one.layer == layer)
    found = probe_layer(study.setup(seed), _data(study.out / "data.safetensors"), task)
    path = study.out / f"seed{seed}" / "probes" / f"{layer}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([one.to_json() for one in found]))


def probes_of(study: Study, seed: int) -> Probes:
    paths = [study.out / f"seed{seed}" / "probes" / f"{task.layer}.json" for task in tasks(study, seed)]
    measured = (Probe.from_json(one) for path in paths for one in json.loads(path.read_text()))
    return probes_from(0, regular(study.space), measured)


def tasks(study: Study, seed: int) -> list[ProbeTask]:
    return probe_tasks(study.space, study.start(seed))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Those that all benchmarks of such plans have."""
    parser.add_argument("dataset")
    parser.add_argument("--space", default="factorizenet")
    parser.add_argument("--images", type=int, default=20_000, help="training images, drawn at random")
    parser.add_argument("--validation", type=int, default=2_500, help="images held out of the others")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no training is begun after so many")
    parser.add_argument("--out", type=Path, required=True)


def open_study(options: argparse.Namespace) -> Study:
    """Data, numerics and options of the first time are used again."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    alike = {name: getattr(options, name) for name in ("dataset", "space", "images", "validation")}
    kept = out / "options.json"
    if kept.is_file() and json.loads(kept.read_text()) != alike:
        raise SystemExit(f"{out} holds trainings with {kept.read_text()}; choose another --out")
    space = load_space(options.space)
    if not (out / "data.safetensors").is_file():
        data = load_dataset(options.dataset, space.input_shape, Path("data"))
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        held_out = order[options.images : options.images + options.validation]
        data = replace(data, train=data.train.take(order[: options.images]), evaluation=data.train.take(held_out))
        data.save(out / "data.safetensors")
    if not (out / "numerics.json").is_file():
        (out / "numerics.json").write_text(json.dumps(resolve("auto", workers=cores(), cores=cores()).to_json()))
    kept.write_text(json.dumps(alike))
    numerics = Numerics.from_json(json.loads((out / "numerics.json").read_text()))
    classes = len(_data(out / "data.safetensors").classes)
    return Study(out, space.with_classes(classes), numerics)


def references(study: Study, seeds: list[int], pool: ProcessPoolExecutor, deadline: float) -> bool:
    """Trains and probes what all start from; whether all of it is there."""
    for seed in seeds:
        if read(study.start(seed).folder) is None:
            if time.monotonic() > deadline:
                return False
            pool.submit(measure, study, seed, regular(study.space), None).result()
            print(f"seed {seed}: reference trained", flush=True)
    running = []
    for seed in seeds:
        for task in tasks(study, seed):
            if not (study.out / f"seed{seed}" / "probes" / f"{task.layer}.json").is_file():
                running.append(pool.submit(_probe, study, seed, task.layer))
    for one in running:
        one.result()
    return True


def line(study: Study, seed: int, plan: FactorizationPlan, measured: Measured) -> str:
    one = measured.evaluation
    if one.state != "complete":
        return f"seed {seed} {label(study.space, plan)}: {one.state}, {one.reason}"
    found = [one.zero_shot_accuracy, one.fp32_accuracy, one.quint8_accuracy, measured.test]
    named = ("before", "fp32", "quint8", "test quint8")
    shown = ", ".join(f"{name} {100 * (value or 0):.2f} %" for name, value in zip(named, found, strict=True))
    named_plan = f"seed {seed} {label(study.space, plan)}: {one.cost.conv_macs / 1e6:.1f} MMAC"
    return f"{named_plan}, {shown}; {measured.seconds:.0f} s,"
