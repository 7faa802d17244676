import re
from pathlib import Path

import pytest
import torch

from fnet_search.base.errors import FnetError
from fnet_search.deploy import runtime as runtimes
from fnet_search.deploy.export import LOGITS, codes_name, float_model, quantized_model
from fnet_search.deploy.runtime import Runtime, saturates, with_outputs
from fnet_search.quant.calibration import quantize_trained
from fnet_search.quant.fold import fold
from fnet_search.quant.scheme import Scheme
from tests.support.networks import MIXED, noise, randomized

DATA = noise(MIXED, 20)
X = DATA.normalise(DATA.train.images)
QUANTIZED = quantize_trained(randomized(MIXED), Scheme(), DATA, 0).network


@pytest.mark.parametrize("threads", [1, 2])
def test_it_gives_the_logits(threads: int) -> None:
    runtime = Runtime(quantized_model(QUANTIZED), threads)
    assert runtime.session.get_session_options().intra_op_num_threads == threads
    found = runtime(X)
    assert found.dtype == torch.float32
    assert torch.equal(found, QUANTIZED(X))


def test_options_are_passed_on() -> None:
    runtime = Runtime(float_model(fold(randomized(MIXED))), options={"log_severity_level": 4})
    assert runtime.session.get_session_options().log_severity_level == 4
    assert runtime.session.get_providers() == ["CPUExecutionProvider"]


def test_inner_codes_are_given_in_the_order_asked_for() -> None:
    model = quantized_model(QUANTIZED)
    names = [codes_name(name) for name in ("deep.act", "stem.act", "input")]
    before = model.SerializeToString()
    deep, logits, stem, image = Runtime(with_outputs(model, names)).run(X, [names[0], LOGITS, *names[1:]])
    assert model.SerializeToString() == before
    codes = {node.name: output for node, output in QUANTIZED.codes(X)}
    assert torch.equal(torch.from_numpy(deep), codes["deep.act"])
    assert torch.equal(torch.from_numpy(stem), codes["stem.act"])
    assert torch.equal(torch.from_numpy(image), QUANTIZED.params["input"].quantize(X))
    assert torch.equal(torch.from_numpy(logits), QUANTIZED(X))


def test_a_tensor_that_is_not_there_is_named() -> None:
    with pytest.raises(FnetError) as caught:
        with_outputs(quantized_model(QUANTIZED), [codes_name("stem.act"), codes_name("stem")])
    assert str(caught.value) == "the ONNX graph has no tensor 'stem.codes'; it was not exported from this network"


def test_a_model_that_does_not_load_is_refused_in_a_line() -> None:
    model = quantized_model(QUANTIZED)
    model.graph.node[0].op_type = "Unheard"
    with pytest.raises(FnetError, match=r"^ONNX Runtime cannot load the exported network: .*Unheard") as caught:
        Runtime(model)
    assert "\n" not in str(caught.value)


INFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not INFO.is_file(), reason="the instruction sets of this processor are not known")
def test_a_processor_with_vnni_does_not_saturate() -> None:
    """Each pair of products of the layer that is measured is beyond 16 bits."""
    assert 2 * 255 * 127 > 2**15 - 1
    if re.search(r"vnni|asimddp", INFO.read_text()):
        assert not saturates()


def test_where_sums_saturate_the_session_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "session.x64quantprecision"
    for saturating in (False, True):
        monkeypatch.setattr(runtimes, "saturates", lambda saturating=saturating: saturating)
        runtime = Runtime(quantized_model(QUANTIZED))
        options = runtime.session.get_session_options()
        if saturating:
            assert options.get_session_config_entry(key) == "1"
        else:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry(key)
        assert torch.equal(runtime(X), QUANTIZED(X))
