"""What may be said about timings, and the twin that is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import repdeploy
from repdeploy.benchmark import children
from repdeploy.bundle import Bundle
from repdeploy.errors import BackendFailed
from repdeploy.network import ExpressionLayer, sample_images
from repdeploy.rebuild import deploy_network, training_twin
from repdeploy.registry import families
from repdeploy.runtimes.interface import Missing
from repdeploy.runtimes.onnx_runtime import OnnxRuntime
from repdeploy.runtimes.torch_eager import TorchEager
from repdeploy.statistics import apart, interleaved, speedup, warm_up
from tests.networks import repvgg, save


@pytest.mark.parametrize("rounds", [12, 30, 80, 300])
def test_no_difference_is_called_between_equal_networks(rounds: int) -> None:
    """Over 200 simulated comparisons of recorded noise with itself, a difference is called in at most 5 %.

    Each is a stretch of the runs of one session (`benchmarks.recorded_noise`), cut into rounds of two, in random order.
    """
    recorded = np.load(Path(__file__).parents[1] / "recorded" / "noise.npz")
    generator = np.random.default_rng(0)
    called = 0
    for seed in range(200):
        runs = recorded[recorded.files[seed % len(recorded.files)]].astype(float)
        start = int(generator.integers(0, len(runs) - 2 * rounds))
        pairs = generator.permuted(runs[start : start + 2 * rounds].reshape(rounds, 2), axis=1)
        called += speedup(pairs[:, 0], pairs[:, 1], seed).differs
    assert called <= 10


def test_noise_that_lasts_makes_intervals_wider() -> None:
    """A machine that is slow for a while tells less than one that is slow now and then."""
    generator = np.random.default_rng(0)
    now_and_then = 1 + 0.3 * generator.integers(0, 2, 120) + generator.normal(0, 0.01, 120)
    for_a_while = np.sort(now_and_then)
    steady = 1 + generator.normal(0, 0.01, 120)
    scattered, lasting = (apart(runs, steady) for runs in (now_and_then, for_a_while))
    assert lasting.high - lasting.low > scattered.high - scattered.low


def test_a_real_difference_is_found_with_its_size() -> None:
    generator = np.random.default_rng(0)
    interval = speedup(tuple(2 * generator.lognormal(0, 0.05, 80)), tuple(generator.lognormal(0, 0.05, 80)))
    assert interval.differs
    assert interval.low <= 2 <= interval.high
    assert interval.high - interval.low < 0.2


def test_runs_are_interleaved_in_random_order_and_all_kept() -> None:
    order: list[str] = []

    def timer(name: str) -> float:
        order.append(name)
        return 0.001

    runs = interleaved([lambda: timer("a"), lambda: timer("b")], seconds=0, least=30, most=30)
    assert [len(seen) for seen in runs] == [30, 30]
    pairs = [tuple(order[index : index + 2]) for index in range(0, 60, 2)]
    assert set(pairs) == {("a", "b"), ("b", "a")}


def test_warm_up_waits_for_steadiness_and_gives_up_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repdeploy.statistics.MIN_WARMUP_SECONDS", 0.0)
    monkeypatch.setattr("repdeploy.statistics.MAX_WARMUP_SECONDS", 0.05)
    falling = iter(np.concatenate([np.linspace(9, 1, 20), np.ones(100_000)]))
    runs, steady = warm_up([lambda: float(next(falling))])
    assert steady
    assert runs > 20
    slowing = iter(range(1, 1_000_000))
    assert warm_up([lambda: 1.2 ** min(next(slowing), 3800)])[1] is False


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    path = save(repvgg(groups=2), tmp_path / "a.pth")
    repdeploy.convert(path, output=tmp_path / "a.repdeploy", input_shape="1x3x65x65")
    path.unlink()  # a bundle never needs its checkpoint again
    return Bundle(tmp_path / "a.repdeploy")


def test_the_twin_has_the_branches_and_harmless_values(bundle: Bundle) -> None:
    twin = training_twin(bundle, families(), (3, 65, 65))
    layers = [layer for layer in twin.modules() if isinstance(layer, ExpressionLayer)]
    assert len(layers) == 6
    output = twin(sample_images((2, 3, 65, 65), 0))
    assert torch.isfinite(output).all()
    assert 1e-3 < float(output.detach().abs().max()) < 1e3
    for name, value in twin.state_dict().items():
        nonzero = value[value != 0].abs()
        assert not len(nonzero) or float(nonzero.min()) > 1e-30, name


def test_the_deploy_network_is_the_stored_one(bundle: Bundle) -> None:
    network = deploy_network(bundle, families(), (3, 65, 65))
    inputs, outputs = bundle.references()[3, 65, 65]
    with torch.no_grad():
        assert torch.allclose(network(torch.from_numpy(inputs)).double(), torch.from_numpy(outputs), atol=1e-4)


def test_a_missing_runtime_is_a_row_with_a_hint(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self: Missing("onnxruntime is not installed", "pip install onnxruntime"))
    result = repdeploy.bench(bundle.path, batch=[1], seconds=0.05, latency_only=True)
    by_name = {row.runtime: row for row in result.rows}
    assert by_name["torch"].speedup is not None
    assert by_name["onnxruntime"].missing == "onnxruntime is not installed"
    assert by_name["onnxruntime"].hint == "pip install onnxruntime"


def test_a_crash_is_a_row_and_the_rest_go_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights vanish between the check and the child that measures: its row says so."""
    monkeypatch.setattr(children.sys, "executable", "/bin/false")
    with pytest.raises(BackendFailed, match="exit status 1"):
        repdeploy.bench(bundle.path, batch=[1], seconds=0.05, latency_only=True)
    with pytest.raises(BackendFailed, match="torch on cpu failed"):
        repdeploy.bench(bundle.path, batch=[1], seconds=0.05, latency_only=True, runtime=["torch"])


@pytest.mark.cuda
def test_cuda_measures_with_events(bundle: Bundle) -> None:
    result = repdeploy.bench(bundle.path, device="cuda", batch=[1], seconds=0.2)
    assert result.rows[0].device == "cuda"
    assert result.rows[0].speedup is not None


def test_cuda_says_what_it_looked_for() -> None:
    missing = TorchEager("cuda").missing()
    assert torch.cuda.is_available() == (missing is None)
    assert missing is None or "CUDA" in missing.what
