"""What computes an answer: ONNX Runtime sessions, gates and exits."""
