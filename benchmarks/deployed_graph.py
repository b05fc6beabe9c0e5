"""An exported RepVGG-A0 against a hand-written stack of 3x3 convolutions, in onnxruntime and OpenVINO.

usage: python -m benchmarks.deployed_graph [--seconds S]
Design section 9, row 4: one convolution (with its ReLU) per block, the runtime's optimised graph equals that of the
hand-written stack, and the interval of the latency ratio covers 1.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import repdeploy
from repdeploy.exporters.onnx_file import write_onnx
from repdeploy.statistics import interleaved, speedup, warm_up
from sample_models.repvgg import RepVGG
from sample_models.scatter import scatter

BLOCKS, WIDTHS = (2, 4, 14, 1), (48, 48, 96, 192, 1280)
IMAGE = (3, 224, 224)


class Stack(nn.Module):
    """What somebody would write by hand: 3x3 convolutions and ReLUs, the mean, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, 2, 1), nn.ReLU()]
        for count, inputs, outputs in zip(BLOCKS, WIDTHS, WIDTHS[1:], strict=False):
            for index in range(count):
                layers += [nn.Conv2d(outputs if index else inputs, outputs, 3, 1 if index else 2, 1), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x).mean((2, 3)))
        return logits


def onnxruntime_graph(path: Path, x: np.ndarray) -> tuple[Counter[str], Callable[[], float]]:
    """The operators left after onnxruntime's own optimisation, and a timer."""
    import onnxruntime

    from repdeploy.runtimes.onnx_runtime import OnnxSession

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    kinds = Counter(
        node.op_type + ("+Relu" if any(a.name == "activation" and a.s == b"Relu" for a in node.attribute) else "")
        for node in nodes
    )
    return kinds, OnnxSession(path, threads=0).timer(x)


def openvino_graph(path: Path, x: np.ndarray) -> tuple[Counter[str], Callable[[], float]]:
    """The layers OpenVINO really runs (its runtime model), in float32, and a timer."""
    import time

    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({0: list(x.shape)})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})
    kinds = Counter(_layer(op) for op in compiled.get_runtime_model().get_ops())
    request = compiled.create_infer_request()

    def once() -> float:
        start = time.perf_counter()
        request.infer({0: x})
        return time.perf_counter() - start

    return Counter({kind: count for kind, count in kinds.items() if kind not in ("Const", "Reorder")}), once


def _layer(op: Any) -> str:
    information = op.get_rt_info()
    kind, fused = (information[name].astype(str) for name in ("layerType", "originalLayersNames"))
    return kind + ("+Relu" if kind == "Convolution" and "relu" in fused.lower() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        torch.save(scatter(RepVGG(BLOCKS, WIDTHS, 1000)).state_dict(), folder / "a0.pth")
        repdeploy.convert(folder / "a0.pth", output=folder / "a0.repdeploy", gates="blocks")
        repdeploy.export(folder / "a0.repdeploy", output=folder / "exported.onnx")
        write_onnx(Stack().eval(), folder / "stack.onnx", IMAGE, batch=None, provenance={})
        x = np.random.default_rng(0).standard_normal((1, *IMAGE)).astype(np.float32)
        for name, load in (("onnxruntime", onnxruntime_graph), ("OpenVINO", openvino_graph)):
            (ours, our_timer), (theirs, their_timer) = (load(folder / f"{kind}.onnx", x) for kind in ("exported", "stack"))
            timers = [our_timer, their_timer]
            warm_up(timers)
            runs = interleaved(timers, seconds, least=30, most=2000)
            interval = speedup(runs[0], runs[1])
            covers = "covers 1" if interval.low <= 1 <= interval.high else "does not cover 1"
            print(f"{name}: {dict(sorted(ours.items()))}")
            print(f"  the graph of the hand-written stack is {'the same' if ours == theirs else dict(sorted(theirs.items()))}")
            print(
                f"  latency, exported over hand-written: {interval.ratio:.3f}x, 95 % interval "
                f"{interval.low:.3f} .. {interval.high:.3f} ({covers}), {len(runs[0])} runs each"
            )


if __name__ == "__main__":
    main()
