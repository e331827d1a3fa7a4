"""Model of Triton's python backend: `model.py` of a model repository, beside the graph."""

from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One ONNX Runtime session with one thread; a batch is gathered by Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph that lies beside this file."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        graph = Path(args["model_repository"]) / args["model_version"] / "single.onnx"
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """Run the requests of a batch together."""
        tensors = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        pixels = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        images = np.multiply(pixels, np.float32(1 / 255), dtype=np.float32)
        (answers,) = self.session.run(["probabilities"], {"images": images})
        responses, first = [], 0
        for tensor in tensors:
            rows = answers[first : first + len(tensor)]
            first += len(tensor)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("probabilities", rows)]))
        return responses
