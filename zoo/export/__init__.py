"""ONNX graphs of a bundle: written, checked against torch and quantised."""
