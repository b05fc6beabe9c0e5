"""The versions of the libraries that results depend on, without importing any."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TOOLS = (
    "repdeploy", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxsim", "openvino", "tensorrt", "safetensors",
)  # fmt: skip


def tool_versions() -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
