"""mosec: a front end in Rust that gathers batches for worker processes. Raw bytes in, float32 probabilities out.

python mosec_server.py --port 8000      (settings: MODEL_FILE, WORKERS, MAX_BATCH, MAX_WAIT_MS)
"""

import os

import numpy as np
import onnxruntime
from mosec import Server, Worker


class Classifier(Worker):
    """One ONNX Runtime session with one thread."""

    def __init__(self) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("INTRA_OP", "1"))
        self.session = onnxruntime.InferenceSession(
            os.environ["MODEL_FILE"], options, providers=["CPUExecutionProvider"]
        )
        for batch in range(1, int(os.environ["MAX_BATCH"]) + 1):
            self.session.run(["probabilities"], {"images": np.zeros((batch, 3, 32, 32), np.float32)})

    def deserialize(self, data: bytes) -> bytes:
        """Take the body as it is."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """Answer with the bytes as they are."""
        return data

    def forward(self, data: bytes | list[bytes]) -> bytes | list[bytes]:
        """Classify a batch, or one image where there is no batching."""
        single = not isinstance(data, list)
        pixels = np.frombuffer(data if single else b"".join(data), np.uint8).reshape(-1, 3, 32, 32)
        images = np.multiply(pixels, np.float32(1 / 255), dtype=np.float32)
        (answers,) = self.session.run(["probabilities"], {"images": images})
        return answers.tobytes() if single else [row.tobytes() for row in answers]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Classifier,
        num=int(os.environ["WORKERS"]),
        max_batch_size=int(os.environ["MAX_BATCH"]),
        max_wait_time=int(os.environ["MAX_WAIT_MS"]),
    )
    server.run()
