import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from fnet_search.deploy.export import read_model
from fnet_search.rundir.recorded_run import open_run
from fnet_search.training.datasets import hold_out, load_dataset
from fnet_search.training.weights import read_tensors
from tests.support.command_line import Result, files_in

pytestmark = pytest.mark.usefixtures("one_picture")


@pytest.fixture
def run(tmp_path: Path, finished: tuple[Path, Result]) -> Path:
    """A finished search in `run`, its own copy."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def winner(run: Path) -> str:
    winner = open_run(run).winner
    assert winner is not None
    return winner.id


def test_export_writes_what_other_programs_can_run(fnet: Callable, run: Path, winner: str) -> None:
    code, out, err = fnet("export", "run", "-o", "model.onnx")
    assert (code, err) == (0, "")
    assert out.startswith(f"model.onnx: candidate {winner} (")
    assert "quint8" in out
    assert out.rstrip().endswith("ONNX opset 13, IR version 7, input Nx3x32x32 float32")
    assert fnet("export", "run", "--float", "-o", "float.onnx")[0] == 0
    data = hold_out(load_dataset("digits", (3, 32, 32)))
    facts = read_model(Path("model.onnx"))[1]
    pixels = data.test.images.float().numpy() / 255
    mean, std = (np.array(json.loads(facts["preprocessing"])[name], np.float32) for name in ("mean", "std"))
    images = ((pixels - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    for name, accuracy in (("model", "test_quint8_accuracy"), ("float", "test_fp32_accuracy")):
        session = onnxruntime.InferenceSession(f"{name}.onnx")
        (logits,) = session.run(None, {"input": images})
        assert np.mean(logits.argmax(1) == data.test.labels.numpy()) == float(facts[accuracy])
    assert onnx.load("run/best/model.onnx").graph == onnx.load("model.onnx").graph
    assert read_model(Path("float.onnx"))[1]["precision"] == "float32"


def test_export_stores_weights_as_asked_for(fnet: Callable, run: Path) -> None:
    """The codes are the same: an audit of either file finds no difference."""
    for weight_type in ("int8", "uint8"):
        code, out, _ = fnet("export", "run", "--weight-type", weight_type, "-o", f"{weight_type}.onnx")
        assert code == 0
        assert f", quint8 with {weight_type} weights, " in out
        model, facts = read_model(Path(f"{weight_type}.onnx"))
        assert facts["weight_type"] == weight_type
        weights = [tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith(".weight")]
        assert set(weights) == {getattr(onnx.TensorProto, weight_type.upper())}
        code, out, _ = fnet("audit", "run", "--onnx", f"{weight_type}.onnx")
        assert code == 0
        assert ": 0 of 3,600 output codes" in out


def test_audit_of_the_winner_and_of_every_layer(fnet: Callable, run: Path, winner: str) -> None:
    before = files_in(run)
    code, out, err = fnet("audit", "run")
    assert (code, err) == (0, "")
    assert f"candidate {winner} (" in out
    assert ": 0 of 3,600 output codes and 0 of 360 predictions differ; test images, run/best/model.onnx in " in out
    code, out, err = fnet("audit", "run", "--layers", "--candidate", "0", "--candidate", "1")
    assert (code, err) == (0, "")
    assert out.count("a fresh export in ONNX Runtime") == 2
    assert out.count("  inner activations: 0 of ") == out.count(" codes differ in 0 of ") == 2
    assert files_in(run) == before


def test_a_run_that_may_only_be_read_is_shown(fnet: Callable, run: Path, winner: str, read_only: Callable) -> None:
    read_only(run)
    before = files_in(run)
    commands = {
        "audit": ("audit", "run"),
        "export": ("export", "run", "-o", "model.onnx"),
        "quantize": ("quantize", "run", "--candidate", winner, "--ranges", "mse"),
        "analyze": ("analyze", "run", "--images", "50"),
        "latency": ("latency", "run", "--rounds", "2"),
    }
    out = {}
    for name, command in commands.items():
        code, out[name], err = fnet(*command)
        assert (code, err) == (0, ""), name
    only_shown = "run cannot be written: the results are only shown here"
    assert [name for name, text in out.items() if text.splitlines()[-1] == only_shown] == [
        "quantize",
        "analyze",
        "latency",
    ]
    assert "0 of 3,600 output codes" in out["audit"]
    assert f"│ {winner}/mse " in out["quantize"]
    assert "conv_16_1" in out["analyze"]
    assert "fp32 / quint8" in out["latency"]
    assert files_in(run) == before
    code, _, err = fnet("report", "run")
    assert code == 2
    assert err.startswith("fnet-search: cannot write to run: ")


def test_a_run_whose_images_lie_elsewhere(fnet: Callable, refused: Callable, run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 2), ("test", 1)):
        for name, number in product("0123456789", range(count)):
            (tmp_path / "here" / part / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "here" / part / name / f"{number}.png")
    recorded = hold_out(load_dataset("imagefolder:here", (3, 32, 32))).fingerprint()
    config = json.loads((run / "config.json").read_text())
    config |= {"dataset": "imagefolder:/server/images", "data": {**config["data"], "fingerprint": recorded}}
    (run / "config.json").write_text(json.dumps(config))
    audit, analyze = ("audit", "run", "--candidate", "0"), ("analyze", "run")
    quantize = ("quantize", "run", "--candidate", "0", "--ranges", "mse")
    for command in (audit, analyze, quantize):
        wanted = "the run's images are not in /server/images on this machine; give the same ones with --dataset"
        assert refused(*command) == wanted
    there = ("--dataset", "imagefolder:here")
    assert "0 of 100 output codes" in fnet(*audit, *there)[1]
    assert fnet(*analyze, *there)[1].splitlines()[-1].startswith("run/analysis/layers.csv")
    assert "its ID is 0/mse" in fnet(*quantize, *there)[1]
    shutil.copy(tmp_path / "here/train/0/0.png", tmp_path / "here/train/0/1.png")
    now = hold_out(load_dataset("imagefolder:here", (3, 32, 32))).fingerprint()
    assert refused(*audit, *there) == (
        f"data set imagefolder:here differs from the run's: its fingerprint is {now}, the recorded one is {recorded}"
    )
    unknown = "unknown data set 'digit'; did you mean 'digits'? known: digits, "
    assert refused(*analyze, "--dataset", "digit").startswith(unknown)


def test_audit_finds_a_weight_that_was_changed(fnet: Callable, run: Path, winner: str) -> None:
    path = run / "best" / "model.onnx"
    model = onnx.load(path)
    names = ("conv_16_1.weight", "conv_16_1.grouped.weight")
    (weight,) = (one for one in model.graph.initializer if one.name in names)
    codes = numpy_helper.to_array(weight).copy()
    codes.flat[:16] ^= 64
    weight.CopyFrom(numpy_helper.from_array(codes, weight.name))
    onnx.save(model, path)
    code, out, err = fnet("audit", "run", "--layers")
    assert (code, err) == (4, "")
    assert " 0 of 3,600 output codes" not in out
    first = out.partition("; the first is ")[2]
    assert first.startswith("conv_16_1")


def test_a_candidate_quantized_otherwise_is_another_evaluation(fnet: Callable, run: Path, winner: str) -> None:
    before = files_in(run / "candidates")
    candidates = (run / "candidates.csv").read_bytes()
    arguments = ("--ranges", "mse", "--per-channel", "--equalize", "--bias-correct")
    code, out, err = fnet("quantize", "run", "--candidate", "0", *arguments)
    assert (code, err) == (0, "")
    name = "0/mse+per-channel+equalize+bias-correct"
    assert out.rstrip().endswith(f"its ID is {name}")
    after = files_in(run / "candidates")
    assert {path: text for path, text in after.items() if path in before} == before
    files = ("evaluation.json", "layers.csv", "plan.toml", "quantized.safetensors", "model.onnx")
    assert after.keys() - before.keys() == {f"00{name}/{file}" for file in files}
    assert (run / "candidates.csv").read_bytes() == candidates
    frame = pd.read_csv(run / "requantized.csv")
    assert list(frame["network"]) == ["0", name]
    assert list(frame["split"]) == ["validation"] * 2
    assert frame["fp32_accuracy"][0] == pytest.approx(frame["fp32_accuracy"][1], abs=1 / 287)
    assert (frame["audited_codes"][1], frame["differing_codes"][1]) == (2870, 0)
    assert "mse+per-channel+equalize+bias-correct" in (run / "report.html").read_text()
    own, other = (one.evaluation for one in open_run(run).networks if one.evaluation.number == 0)
    assert (other.plan, other.seed, other.epochs, other.split) == (own.plan, own.seed, own.epochs, own.split)
    assert other.qmse != own.qmse
    assert len(read_tensors(run / "candidates" / f"00{name}" / "quantized.safetensors")[0]["conv_8.weight.scale"]) > 1
    for arguments in (("audit", "run", "--layers"), ("export", "run", "-o", "other.onnx")):
        code, out, err = fnet(*arguments, "--candidate", name)
        assert (code, err) == (0, "")
    assert read_model(Path("other.onnx"))[1]["scheme"] == "mse+per-channel+equalize+bias-correct"
    code, _, err = fnet("quantize", "run", "--candidate", "0", "--ranges", "percentile:0.1")
    assert (code, err) == (0, "")
    assert fnet("audit", "run", "--candidate", "0/percentile:0.1")[0] == 0
    assert fnet("audit", "run", "--candidate", "0/percentile-0.1")[0] == 0


def foreign(path: Path) -> None:
    """An ONNX file of somebody else."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    same = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [same])
    onnx.save(helper.make_model(graph, producer_name="pytorch", opset_imports=[helper.make_opsetid("", 13)]), path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("audit", "run", "--onnx", "no.onnx"),
            "cannot read no.onnx: No such file or directory; fnet-search export",
        ),
        (("audit", "run", "--onnx", "text"), "cannot read text: it is not a valid ONNX file"),
        (("audit", "run", "--onnx", "."), "Invalid value for '--onnx': File '.' is a directory."),
        (
            ("audit", "run", "--onnx", "foreign.onnx"),
            "was not written by fnet-search export, but by pytorch",
        ),
        (("audit", "run", "--onnx", "float.onnx"), "float.onnx is a float32 export; the audit needs a quint8 export"),
        (("audit", "run", "--onnx", "one.onnx", "--candidate", "0"), "one.onnx is not candidate 0: its plan is "),
        (
            ("audit", "run", "--onnx", "other.onnx", "--candidate", "1"),
            "other.onnx is not candidate 1: its seed is 9, not 0",
        ),
        (
            ("audit", "run", "--onnx", "one.onnx", "--candidate", "0", "--candidate", "1"),
            "name it with one --candidate",
        ),
        (("audit", "run", "--candidate", "7"), "run has no network '7'; networks with weights: 0, 1"),
        (("audit", "run", "--candidate", "init2"), "run has no network 'init2'; networks with weights: 0, 1"),
        (("audit", "run", "--candidate", "0/mse"), "run has no network '0/mse'"),
        (("audit", "nowhere"), "nowhere is not a run folder: it has no config.json"),
        (("export", "run", "-o", "no/model.onnx"), "-o no/model.onnx: the folder no does not exist"),
        (("export", "run"), "Missing option '-o' / '--output'."),
        (("export", "run", "-o", "m.onnx", "--candidate", "9"), "run has no network '9'"),
        (("quantize", "run"), "Missing option '--candidate'."),
        (
            ("quantize", "run", "--candidate", "0", "--ranges", "mean"),
            "unknown range method 'mean'; write minmax, ",
        ),
        (
            ("quantize", "run", "--candidate", "0", "--ranges", "percentile:50"),
            "write minmax, mse or percentile:P ",
        ),
    ],
)
def test_bad_input_of_the_commands_on_a_run(
    fnet: Callable, refused: Callable[..., str], run: Path, arguments: tuple[str, ...], message: str
) -> None:
    foreign(Path("foreign.onnx"))
    Path("text").write_text("no protobuf")
    if "float.onnx" in arguments:
        fnet("export", "run", "--float", "-o", "float.onnx")
    if "other.onnx" in arguments:
        fnet("export", "run", "--candidate", "1", "-o", "one.onnx")
        model, facts = read_model(Path("one.onnx"))
        helper.set_model_props(model, {**facts, "seed": "9"})
        onnx.save(model, "other.onnx")
    if "one.onnx" in arguments:
        fnet("export", "run", "--candidate", "1", "-o", "one.onnx")
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "config.json",
            '"constraints": {"foo": 1}',
            "run/config.json is not the configuration of a run: it has no proper 'co",
        ),
        ("config.json", '"data": {}', "run/config.json is not the configuration of a run: it has no proper 'data'"),
        (
            "candidates/000/evaluation.json",
            "{}",
            "run/candidates/000/evaluation.json is not the evaluation of a candidate",
        ),
        (
            "candidates/000/evaluation.json",
            "[]",
            "run/candidates/000/evaluation.json is not the evaluation of a candidate",
        ),
        ("candidates/000/evaluation.json", "{", "cannot read run/candidates/000/evaluation.json"),
    ],
)
def test_broken_files_of_a_run(refused: Callable[..., str], run: Path, file: str, text: str, message: str) -> None:
    if file == "config.json":
        key = text.split('"')[1]
        text = json.dumps({**json.loads((run / file).read_text()), key: json.loads(f"{{{text}}}")[key]})
    (run / file).write_text(text)
    for arguments in (("audit", "run"), ("quantize", "run", "--candidate", "1", "--ranges", "mse"), ("report", "run")):
        assert message in refused(*arguments)


def test_what_somebody_put_beside_the_candidates_is_left_alone(fnet: Callable, run: Path) -> None:
    shutil.copytree(run / "candidates" / "000", run / "candidates" / "backup")
    shutil.copytree(run / "candidates" / "000", run / "candidates" / "000" / "mine")
    assert [one.id for one in open_run(run).networks] == ["0", "1"]
    assert fnet("audit", "run", "--candidate", "0", "--candidate", "00")[1].count("predictions differ") == 1
    (run / "latency.csv").write_text("x\n")
    assert fnet("report", "run")[0] == 0
    assert "latency.csv: it is not what fnet-search latency writes" in (run / "report.html").read_text()


def test_a_graph_that_was_changed(refused: Callable[..., str], run: Path) -> None:
    path = run / "best" / "model.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "image" if name == "input" else name
    model.graph.input[0].name = "image"
    onnx.save(model, path)
    assert refused("audit", "run").startswith("ONNX Runtime cannot run the exported network: Required inputs")


def test_quantize_waits_for_nobody(refused: Callable[..., str], run: Path) -> None:
    with open_run(run).run.locked():
        for arguments in (("quantize", "run", "--candidate", "0", "--ranges", "mse"), ("latency", "run")):
            assert refused(*arguments).startswith("run is in use by another fnet-search process; wait for it")


def test_a_scheme_is_measured_once(fnet: Callable, refused: Callable[..., str], run: Path) -> None:
    assert fnet("quantize", "run", "--candidate", "0", "--ranges", "minmax")[0] == 0
    again = ("quantize", "run", "--candidate", "0", "--ranges", "minmax")
    assert refused(*again) == "candidate 0 is quantized with minmax already, as 0/minmax"
    beside = ("quantize", "run", "--candidate", "0/minmax", "--equalize")
    assert refused(*beside) == "--candidate 0/minmax: name the candidate without a scheme, 0"


def test_a_network_quantized_otherwise_may_win(fnet: Callable, refused: Callable[..., str], run: Path) -> None:
    """Of two that are alike but for the clipping, the winner is clipped hard; the other takes its place, for good."""
    own = open_run(run)
    assert own.winner is not None
    number = str(own.winner.evaluation.number)
    worse = ("quantize", "run", "--candidate", number, "--scheme", "percentile:40")
    out = fnet(*worse, "--promote")[1]
    assert f"{number}/percentile:40 is not better than the winner: best/ stays" in out
    assert f"winner: candidate {number} (" in out
    assert open_run(run).winner.id == number, "it is no better"  # type: ignore[union-attr]
    before = json.loads((run / "best" / "test.json").read_text())
    for path in (run / "candidates").glob("*/evaluation.json"):  # as if the run had quantized badly
        path.write_text(json.dumps({**json.loads(path.read_text()), "quint8_accuracy": 0.2, "quint8_loss": 9.0}))
    out = fnet("quantize", "run", "--candidate", number, "--scheme", "minmax")[1]
    remark = f"{number}/minmax is better than the winner: fnet-search quantize run --candidate {number} --scheme minmax"
    assert f"{remark} --promote makes it best/." in out
    assert "is better than the winner" in (run / "report.html").read_text()
    assert refused("quantize", "run", "--candidate", number, "--scheme", "minmax").endswith(
        f"already, as {number}/minmax"
    )
    code, out, err = fnet("quantize", "run", "--candidate", number, "--scheme", "minmax", "--promote")
    assert (code, err) == (0, "")
    assert "is better than the winner" not in out
    assert f"candidate {number} is quantized with minmax already, as {number}/minmax" in out
    assert f"{number}/minmax is the winner now" in out
    winner = open_run(run).winner
    assert winner is not None
    assert winner.id == f"{number}/minmax"
    test = json.loads((run / "best" / "test.json").read_text())
    assert (test["number"], test["scheme"], test["split"]) == (int(number), "minmax", "test")
    assert before["scheme"] != "minmax"
    facts = read_model(run / "best" / "model.onnx")[1]
    assert (facts["scheme"], float(facts["test_quint8_accuracy"])) == ("minmax", test["quint8_accuracy"])
    assert fnet("audit", "run")[1].count("0 of 3,600 output codes") == 1


def test_networks_without_their_files(refused: Callable[..., str], run: Path, winner: str) -> None:
    (run / "best" / "model.onnx").unlink()
    assert "cannot read run/best/model.onnx: No such file" in refused("audit", "run")
    for name in ("weights", "quantized"):
        (run / "candidates" / "000" / f"{name}.safetensors").unlink()
        message = "candidate 0 has no weights (a search keeps those of the best 3); networks with weights: 1"
        for command in (("audit",), ("export", "-o", "m.onnx"), ("quantize", "--ranges", "mse")):
            assert refused(command[0], "run", *command[1:], "--candidate", "0") == message
    (run / "candidates" / "001" / "quantized.safetensors").write_text("torn")
    said = refused("export", "run", "-o", "m", "--candidate", "1")
    assert "cannot read weights run/candidates/001/quantized.safetensors" in said
    shutil.rmtree(run / "candidates")
    assert refused("audit", "run") == "run has no trained network with its weights"


def test_analyze_and_latency_leave_tables_and_pictures(fnet: Callable, run: Path) -> None:
    code, out, err = fnet("analyze", "run", "--candidate", "0", "--candidate", "1", "--images", "50")
    assert (code, err) == (0, "")
    assert "on 50 validation images" in " ".join(out.split()), "a long title is folded"
    frame = pd.read_csv(run / "analysis" / "layers.csv", dtype={"network": str})
    assert set(frame["network"]) == {"0", "1"}
    assert {"conv_in", "dense_out"} < set(frame["layer"])
    assert (run / "analysis" / "analysis.html").read_text().count("<img ") >= 3
    code, out, err = fnet("latency", "run", "--candidate", "0", "--rounds", "2", "--batch", "3")
    assert (code, err) == (0, "")
    assert "1 thread, a batch of 3 images, 2 interleaved rounds" in out
    frame = pd.read_csv(run / "latency.csv", dtype={"network": str})
    assert frame[["network", "precision", "batch"]].to_numpy().tolist() == [["0", "quint8", 3], ["0", "fp32", 3]]
    assert "<h2>Latency</h2>" in (run / "report.html").read_text()
    assert fnet("report", "run")[0] == 0
    assert "<h2>Latency</h2>" in (run / "report.html").read_text(), "it stays"


def test_other_data_than_the_run_had(refused: Callable[..., str], run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["fingerprint"] = "0123456789abcdef"
    (run / "config.json").write_text(json.dumps(config))
    for arguments in (("audit", "run"), ("analyze", "run"), ("quantize", "run", "--candidate", "0", "--ranges", "mse")):
        message = refused(*arguments)
        assert message.startswith("data set digits differs from the run's: its fingerprint is ")
        assert message.endswith("the recorded one is 0123456789abcdef")
