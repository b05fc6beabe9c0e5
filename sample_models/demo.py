"""From a trained checkpoint to a benchmarked deploy network, and the proof that no prediction changed.

usage: python -m sample_models.demo [--folder DIR]        (what `make demo` runs)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sample_models.digits import load_digits
from sample_models.repvgg import DeployRepVGG, RepVGG
from sample_models.samples import SAMPLES
from sample_models.train import accuracy


def repdeploy(folder: Path, *arguments: str) -> None:
    print(f"\n$ repdeploy {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "repdeploy", *arguments], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    folder: Path = parser.parse_args().folder
    shutil.rmtree(folder / "ckpt.repdeploy", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SAMPLES["repvgg"].checkpoint("repvgg"), folder / "ckpt.pth")
    digits = load_digits()
    trained = SAMPLES["repvgg"].build()
    assert isinstance(trained, RepVGG)
    trained.load_state_dict(torch.load(folder / "ckpt.pth", weights_only=True)["state_dict"])
    trained.eval()
    with torch.no_grad():
        recorded = trained(digits.test_images[:8])
    np.savez(folder / "expect.npz", input=digits.test_images[:8].numpy(), output=recorded.numpy())

    repdeploy(folder, "convert", "ckpt.pth", "--family", "repvgg", "--input-shape", "1x1x16x16", "--expect", "expect.npz")
    repdeploy(folder, "export")
    repdeploy(folder, "verify")
    repdeploy(folder, "bench", "--device", "cpu", "--batch", "1", "--batch", "64", "--seconds", "2")
    repdeploy(folder, "report")

    import onnxruntime

    deploy = DeployRepVGG(trained)
    deploy.load_state_dict(load_file(folder / "ckpt.repdeploy" / "weights.safetensors"), strict=True)
    session = onnxruntime.InferenceSession(folder / "ckpt.repdeploy" / "model.fp32.onnx", providers=["CPUExecutionProvider"])
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "trained network": trained,
        "fused weights, in plain torch": deploy.eval(),
        "model.fp32.onnx, in onnxruntime": lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0]),
    }
    with torch.no_grad():
        wanted = trained(digits.test_images).argmax(1)
        print(f"\n{len(wanted)} test images")
        for name, network in networks.items():
            score = accuracy(network, digits.test_images, digits.test_labels)
            changed = int((network(digits.test_images).argmax(1) != wanted).sum())
            print(f"  {name:<32} accuracy {score:.2%}   predictions changed {changed}")
            if changed:
                sys.exit(f"{name}: {changed} predictions changed")


if __name__ == "__main__":
    main()
