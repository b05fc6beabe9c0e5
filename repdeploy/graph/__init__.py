"""The graph road: linear regions of an ONNX graph, read as expressions of the algebra and squeezed. Knows no family."""
