"""Inference requests and answers as messages of gRPC: tensors as raw bytes or typed contents in, raw bytes out."""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Prediction
from serving.engine.graphs import INPUT, OUTPUTS
from serving.errors import bad_request, shown
from serving.protocol.choices import Asked, Parameters, checked_parameters
from serving.protocol.messages import message
from serving.protocol.tensors import bytes_of, datatype_of, output_of
from serving.scheduling.service import Served

_CONTENTS: Final = {"FP32": "fp32_contents", "UINT8": "uint_contents"}


def parameters_of(parameters: Any, where: str) -> Parameters:
    """Return parameters in Python's types; 400 if they ask for an extension that we do not have."""
    values = {}
    for name, value in checked_parameters(parameters, where).items():
        field = value.WhichOneof("parameter_choice")
        if field is not None:
            values[name] = getattr(value, field)
    return values


def outputs_of(served: Served, request: Any, asked: Asked) -> list[str]:
    """Return the names of the outputs that a request wants; 400 if the model has not all, or one is there twice."""
    outputs: list[str] = []
    for output in request.outputs:
        name = served.codec.choices.check_output(output.name, asked)
        if name in outputs:
            raise bad_request(f"the output {name!r} is asked for twice; name it once")
        parameters_of(output.parameters, f"the output {name!r}")
        outputs.append(name)
    return outputs or list(OUTPUTS)


def images_of(served: Served, request: Any) -> NDArray[Any]:
    """Return a request's checked images; 400 for anything but one good tensor, 413 for too many images."""
    for tensor in request.inputs:
        if tensor.name != INPUT:
            raise bad_request(f"unknown input {shown(tensor.name)}; {served.name} takes only {INPUT!r}")
    if len(request.inputs) != 1:
        raise bad_request(f"got {len(request.inputs)} inputs, expected exactly one, {INPUT!r}")
    tensor = request.inputs[0]
    shape = list(tensor.shape)
    rows = served.codec.tensors.rows(shape)
    parameters_of(tensor.parameters, f"the input {INPUT!r}")
    datatype = tensor.datatype
    typed = [field.name for field, _ in tensor.contents.ListFields()]
    if request.raw_input_contents:
        if typed:
            raise bad_request(f"the input {INPUT!r} has {typed[0]}, and there are raw_input_contents; send one of them")
        if len(request.raw_input_contents) != 1:
            raise bad_request(f"got {len(request.raw_input_contents)} raw_input_contents, expected one, of {INPUT!r}")
        return served.codec.tensors.pixels(request.raw_input_contents[0], datatype, rows)
    return served.codec.tensors.pixels(_typed_content(tensor, typed, shape), datatype, rows)


def _typed_content(tensor: Any, typed: list[str], shape: list[int]) -> bytes:
    """Return what the raw bytes of a tensor would be that came as typed contents."""
    datatype = tensor.datatype
    expected = _CONTENTS.get(datatype)
    if expected is None:
        return b""  # the check of the pixels says what is wrong with the type
    if typed != [expected]:
        found = ", ".join(typed) or "no contents"
        raise bad_request(
            f"the input {INPUT!r} has {found}, expected raw_input_contents, or {expected} for datatype {datatype}"
        )
    numbers = getattr(tensor.contents, expected)
    if len(numbers) != math.prod(shape):
        raise bad_request(
            f"the input {INPUT!r} has {len(numbers)} numbers in {expected}, expected {math.prod(shape)} for {shape}"
        )
    if datatype == "FP32":
        return np.array(numbers, dtype="<f4").tobytes()
    levels = np.array(numbers, dtype=np.uint32)
    if levels.max() > 255:
        raise bad_request(f"the pixels of {INPUT!r} reach to {levels.max()}, expected 0 to 255 for UINT8")
    return levels.astype(np.uint8).tobytes()


def response_of(served: Served, request: Any, outputs: list[str], answer: Prediction) -> Any:
    """Return the message that answers a request."""
    response = message("ModelInferResponse")(model_name=served.name, model_version=served.version, id=request.id)
    for name in outputs:
        response.outputs.add(name=name, datatype=datatype_of(name), shape=output_of(answer, name).shape)
        response.raw_output_contents.append(bytes_of(answer, name))
    return response
