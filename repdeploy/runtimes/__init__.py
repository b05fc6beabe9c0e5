"""Runtimes behind one small interface. Being absent is normal: a runtime says what is missing and how to get it."""

from repdeploy.runtimes.interface import Job, Missing, Runtime, Session
from repdeploy.runtimes.onnx_cpu import OnnxRuntimeCpu
from repdeploy.runtimes.torch_eager import TorchEager

RUNTIMES: tuple[Runtime, ...] = (TorchEager("cpu"), OnnxRuntimeCpu(), TorchEager("cuda"))

__all__ = ["RUNTIMES", "Job", "Missing", "OnnxRuntimeCpu", "Runtime", "Session", "TorchEager"]
