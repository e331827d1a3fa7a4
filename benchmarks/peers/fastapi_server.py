"""FastAPI without batching: each worker process runs each request on its own event loop's thread.

uvicorn fastapi_server:application --workers 2      (settings: MODEL_FILE, INTRA_OP)
"""

import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, Request, Response

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("INTRA_OP", "1"))
session = onnxruntime.InferenceSession(os.environ["MODEL_FILE"], options, providers=["CPUExecutionProvider"])
application = FastAPI()


@application.post("/infer")
async def infer(request: Request) -> Response:
    """Raw bytes in, float32 probabilities out."""
    pixels = np.frombuffer(await request.body(), np.uint8).reshape(1, 3, 32, 32)
    images = np.multiply(pixels, np.float32(1 / 255), dtype=np.float32)
    (answers,) = session.run(["probabilities"], {"images": images})
    return Response(answers.tobytes(), media_type="application/octet-stream")
