"""Artifacts that run without this package: ONNX, and what TensorRT needs to build its engine from it."""
