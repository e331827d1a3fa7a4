"""Asks a server through KServe's own clients and prints what they got, as JSON; run by `test_clients.py`.

    python kserve_client.py URL GRPC_ADDRESS MODEL IMAGES

Needs nothing but `pip install kserve` (tried with 0.21.0). It imports nothing of ours.
"""

import asyncio
import json
import sys
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

OUTPUTS = ("probabilities", "logits")


def request_of(model: str, images: np.ndarray, *, binary: bool) -> InferRequest:
    tensor = InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    wanted = [RequestedOutput(name, {"binary_data": binary}) for name in OUTPUTS]
    return InferRequest(model, [tensor], request_id="seven", request_outputs=wanted)


def told(response: Any) -> dict[str, Any]:
    return {"id": response.id} | {output.name: output.as_numpy().tolist() for output in response.outputs}


async def main(url: str, grpc_address: str, model: str, images: np.ndarray) -> dict[str, Any]:
    ready: dict[str, bool] = {}
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    binary, plain = (request_of(model, images, binary=binary) for binary in (True, False))
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as rest:
        ready["rest live"] = await rest.is_server_live(url)
        ready["rest ready"] = await rest.is_server_ready(url)
        ready["rest model"] = await rest.is_model_ready(url, model)
        answers["rest json"] = told(await rest.infer(url, plain, model_name=model))
        answers["rest binary"] = told(await rest.infer(url, binary, model_name=model))
        try:
            await rest.infer(url, plain, model_name="other")
        except httpx.HTTPStatusError as error:
            errors["rest"] = str(error)
    async with InferenceGRPCClient(grpc_address, retries=0) as client:
        ready["grpc live"] = await client.is_server_live()
        ready["grpc ready"] = await client.is_server_ready()
        ready["grpc model"] = await client.is_model_ready(model)
        answers["grpc raw"] = told(await client.infer(binary))
        answers["grpc contents"] = told(await client.infer(plain))
        try:
            await client.infer(request_of("other", images, binary=True))
        except grpc.RpcError as error:
            errors["grpc"] = f"{error.code().name} {error.details()}"
    return {"ready": ready, "answers": answers, "errors": errors}


if __name__ == "__main__":
    address, grpc_address, model, images = sys.argv[1:]
    found = asyncio.run(main(address, grpc_address, model, np.array(json.loads(images), dtype=np.float32)))
    print(json.dumps(found))
