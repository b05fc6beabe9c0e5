"""What is installed, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from repdeploy.exporters.registry import EXPORTERS
from repdeploy.records import Tool

LIBRARIES = (
    ("torch", "reading, fusing, proving", "pip install torch"),
    ("onnx", "export", "pip install onnx"),
    ("onnxscript", "export", "pip install onnxscript"),
    ("onnxruntime", "verifying and measuring ONNX on the CPU", "pip install onnxruntime"),
    ("h5py", "reading .hdf5 checkpoints", "pip install h5py"),
    ("safetensors", "reading and writing .safetensors", "pip install safetensors"),
    ("matplotlib", "plots of the report", "pip install repdeploy[report]"),
    ("jinja2", "pages of the report", "pip install repdeploy[report]"),
    ("onnxsim", "simplifying ONNX", "pip install repdeploy[simplify]"),
)


def examine() -> tuple[Tool, ...]:
    """One entry per library, exporter and device."""
    found = [Tool("python", "everything", "ready", platform.python_version())]
    for name, purpose, hint in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            found.append(Tool(name, purpose, "missing", hint=hint))
            continue
        try:
            found.append(Tool(name, purpose, "ready", version(name)))
        except PackageNotFoundError:
            found.append(Tool(name, purpose, "ready", "unknown"))
    found += _exporters()
    capability = torch.backends.cpu.get_cpu_capability()
    found.append(Tool("cpu", "measuring with --device cpu", "ready", f"{os.cpu_count()} cores, {capability}"))
    mkldnn = torch.backends.mkldnn.is_available()
    found.append(
        Tool(
            "oneDNN",
            "torch's convolutions on the CPU",
            "ready" if mkldnn else "missing",
            hint="" if mkldnn else "install an official build of torch",
        )
    )
    if torch.cuda.is_available():
        found.append(Tool("cuda", "measuring with --device cuda", "ready", torch.cuda.get_device_name(0)))
    else:
        reason = "install a CUDA build of torch" if torch.version.cuda is None else "check the driver with nvidia-smi"
        found.append(Tool("cuda", "measuring with --device cuda", "missing", hint=reason))
    return tuple(found)


def _exporters() -> Iterator[Tool]:
    """Targets beside ONNX, ours and others', by what `export --to` calls them."""
    for item in EXPORTERS.installed():
        name = f"export --to {item.name}"
        if item.value is None:
            yield Tool(name, item.distribution, "missing", hint=f"the plugin does not load: {item.error}")
            continue
        absent = item.value.missing()
        if absent is None:
            yield Tool(name, item.value.title, "ready")
        else:
            yield Tool(name, item.value.title, "missing", hint=absent.hint)
