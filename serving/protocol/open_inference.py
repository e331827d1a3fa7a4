"""The Open Inference Protocol (KServe V2) over REST, for models from `images` to `probabilities` and `logits`.

A request is JSON, or JSON followed by raw little-endian tensors (the binary tensor extension), or nothing but one raw
tensor (`Inference-Header-Content-Length: 0`). Everything is checked here, before a request may join a batch: a request
that gets through cannot fail in the model.

Further outputs come only to requests that name them: `exit` of a multi-exit model; and `agreement`, the share of draws
or members that vote for the winner. What the parameters of a request may choose is in `serving.protocol.choices`.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Prediction
from serving.engine.graphs import INPUT, OUTPUTS
from serving.errors import Headers, bad_request, shown
from serving.protocol.choices import NOTHING_ASKED, Asked, Choices, Parameters, checked_parameters
from serving.protocol.tensors import Tensors, bytes_of, datatype_of, output_of, pixels_of_json
from zoo.bundle.card import Card

HEADER_LENGTH: Final = b"inference-header-content-length"
VERSION: Final = "1"
MAX_ID: Final = 256
"""Characters of a request's id."""

_BOTH: Final = tuple((name, True) for name in OUTPUTS)
_MAX_REMEMBERED: Final = 256
_MAX_REMEMBERED_BYTES: Final = 1024
# commas, colons, lists and objects around the pixels; a request has about a dozen
_MAX_OTHER_PARTS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class _Form:
    """All of a request but its pixels, and what its answer will look like.

    A client repeats the same JSON with each binary request, so forms are remembered by their bytes; those of requests
    without any JSON by their number of images.
    """

    rows: int
    datatype: str
    size: int | None
    """Bytes of the binary tensor; None where the pixels are in the JSON."""
    outputs: tuple[tuple[str, bool], ...]
    """Name, and whether it is wanted in binary."""
    heading: Parameters
    """The answer's fields before `outputs`."""
    binary_head: bytes | None
    """The answer's whole JSON, where every output is binary."""
    binary_headers: Headers
    http_head: bytes | None
    """The same as a whole HTTP/1.1 response up to its tensors."""
    asked: Asked


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """A request that passed every check."""

    images: NDArray[np.float32] | NDArray[np.uint8]
    """(image, channel, height, width): float32 in [0, 1], or levels from 0 to 255."""
    form: _Form


class Codec:
    """Reads requests for one model and writes its answers."""

    def __init__(
        self,
        card: Card,
        choices: Choices | None = None,
        *,
        max_rows: int,
        version: str = VERSION,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare for a model whose requests may hold `max_rows` images.

        `choices` is what a request may choose, None is nothing. `details` is what the metadata tells beside the
        protocol's own fields.
        """
        self.choices = choices or Choices(card)
        self.tensors = Tensors(card, max_rows)
        self._name = card.name
        self._version = version
        self._details = dict(details or {})
        self._forms: dict[bytes | int, _Form] = {}
        """By the JSON of a binary request, or by the number of images of a raw one."""

    def metadata(self) -> dict[str, Any]:
        """Return the answer to `GET /v2/models/NAME`; -1 is the batch."""
        outputs = [
            {"name": name, "datatype": datatype_of(name), "shape": [-1, *self.tensors.row_shape(name)]}
            for name in self.choices.outputs
        ]
        return {
            "name": self._name,
            "versions": [self._version],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self.tensors.image_shape]}],
            "outputs": outputs,
            **({"parameters": self._details} if self._details else {}),
        }

    def decode(self, body: bytes, header_length: bytes | None) -> InferRequest:
        """Read and check a request: its whole body and the value of `Inference-Header-Content-Length`, if it was sent.

        Raises:
            RequestError: 400 with what is wrong, 413 for too many images.
        """
        if header_length is None:
            return self._decode_json(body)
        length = _header_length(header_length, len(body))
        if length == 0:
            return self._decode_raw(body)
        if length == len(body):
            return self._decode_json(body)
        head = body[:length]
        form = self._forms.get(head)
        if form is None:
            form, _ = self._parse(head)
            if length <= _MAX_REMEMBERED_BYTES:
                self._remember(head, form)
        if form.size is None:
            raise bad_request(
                f"{len(body) - length} bytes follow the JSON, but the input {INPUT!r} has no 'binary_data_size'; "
                "set it in the input's parameters, or send the pixels as 'data'"
            )
        if len(body) - length != form.size:
            raise bad_request(
                f"{len(body) - length} bytes follow the JSON of {length} bytes, expected {form.size} (binary_data_size "
                f"of {INPUT!r}); the tensor is cut short or Inference-Header-Content-Length is wrong"
            )
        return InferRequest(images=self.tensors.view(body, length, form.datatype, form.rows), form=form)

    def encode(self, request: InferRequest, answer: Prediction) -> tuple[Headers, bytes]:
        """Return the HTTP headers and the body of the answer to `request`."""
        form = request.form
        if form.binary_head is not None:
            tensors = [bytes_of(answer, name) for name, _ in form.outputs]
            return form.binary_headers, b"".join((form.binary_head, *tensors))
        outputs = []
        tensors = []
        for name, binary in form.outputs:
            values = output_of(answer, name)
            output = _output_form(name, values.shape, self.tensors.size_of(name, len(values)) if binary else None)
            if binary:
                tensors.append(bytes_of(answer, name))
            else:
                output["data"] = values.ravel().tolist()
            outputs.append(output)
        head = _to_json({**form.heading, "outputs": outputs})
        body = b"".join((head, *tensors))
        return (_binary_headers(len(head), len(body)) if tensors else json_headers(len(body))), body

    def respond(self, request: InferRequest, answer: Prediction) -> bytes:
        """Return the answer as a whole HTTP/1.1 response."""
        form = request.form
        if form.http_head is not None:
            if form.outputs is _BOTH:
                return b"".join((form.http_head, answer.probabilities.tobytes(), answer.logits.tobytes()))
            return b"".join((form.http_head, *(bytes_of(answer, name) for name, _ in form.outputs)))
        headers, body = self.encode(request, answer)
        return http_response(b"200 OK", headers, body)

    def _decode_json(self, body: bytes) -> InferRequest:
        form, data = self._parse(body)
        if form.size is not None:
            raise bad_request(
                f"the input {INPUT!r} has a 'binary_data_size' of {form.size}, but no bytes follow the JSON; send "
                "Inference-Header-Content-Length with the length of the JSON, and the tensor after it"
            )
        shape = (form.rows, *self.tensors.image_shape)
        return InferRequest(images=pixels_of_json(data, shape, form.datatype), form=form)

    def _decode_raw(self, body: bytes) -> InferRequest:
        image_bytes = self.tensors.image_items * 4
        rows, rest = divmod(len(body), image_bytes)
        if rest or not rows:
            raise bad_request(
                f"the raw tensor has {len(body)} bytes, expected a multiple of {image_bytes} (FP32 "
                f"{list(self.tensors.image_shape)} per image); for UINT8 send the JSON header as well"
            )
        self.tensors.check_rows(rows)
        form = self._forms.get(rows)
        if form is None:
            form = self._form(None, rows, "FP32", len(body), _BOTH, NOTHING_ASKED)
            self._remember(rows, form)
        return InferRequest(images=self.tensors.view(body, 0, "FP32", rows), form=form)

    def _remember(self, key: bytes | int, form: _Form) -> None:
        if len(self._forms) >= _MAX_REMEMBERED:
            self._forms.clear()
        self._forms[key] = form

    def _parse(self, text: bytes) -> tuple[_Form, Any]:
        """Read the JSON of a request; returns its form and the pixels that are in it."""
        self._check_structure(text)
        document = _load(text)
        request_id = document.get("id")
        if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= MAX_ID):
            raise bad_request(f"'id' must be a string of at most {MAX_ID} characters, got {shown(request_id)}")
        parameters = _parameters(document, "the request")
        tensor = self._only_input(document)
        datatype = self.tensors.check_datatype(tensor.get("datatype"))
        rows = self.tensors.rows(tensor.get("shape"))
        size = _parameters(tensor, f"the input {INPUT!r}").get("binary_data_size")
        if size is not None:
            self.tensors.check_size(size, rows, datatype)
            if "data" in tensor:
                raise bad_request(f"the input {INPUT!r} has 'data' and 'binary_data_size'; send one of them")
        elif "data" not in tensor:
            raise bad_request(f"the input {INPUT!r} has neither 'data' nor 'binary_data_size'; send one of them")
        binary = parameters.get("binary_data_output", False)
        asked = self.choices.asked(parameters)
        outputs = self._outputs(document.get("outputs"), _boolean(binary, "binary_data_output"), asked)
        return self._form(request_id, rows, datatype, size, outputs, asked), tensor.get("data")

    def _check_structure(self, text: bytes) -> None:
        """Refuse JSON of more parts than any good request has: millions of empty lists take seconds to parse."""
        channels, height, _ = self.tensors.image_shape
        lists = self.tensors.max_rows * (1 + channels * (1 + height)) + _MAX_OTHER_PARTS
        numbers = self.tensors.max_rows * self.tensors.image_items + _MAX_OTHER_PARTS
        for part, limit in ((b"[", lists), (b"{", _MAX_OTHER_PARTS), (b":", _MAX_OTHER_PARTS), (b",", numbers)):
            found = text.count(part)
            if found > limit:
                raise bad_request(
                    f"the JSON holds {part.decode()!r} {found} times, expected at most {limit} in a request of up to "
                    f"{self.tensors.max_rows} images; send the pixels flat, or better as a binary tensor"
                )

    def _only_input(self, document: dict[str, Any]) -> dict[str, Any]:
        inputs = document.get("inputs")
        if not isinstance(inputs, list) or not all(isinstance(tensor, dict) for tensor in inputs):
            raise bad_request(f"'inputs' must be an array of objects, got {shown(inputs)}")
        for tensor in inputs:
            if tensor.get("name") != INPUT:
                raise bad_request(f"unknown input {shown(tensor.get('name'))}; {self._name} takes only {INPUT!r}")
        if len(inputs) != 1:
            raise bad_request(f"got {len(inputs)} inputs, expected exactly one, {INPUT!r}")
        tensor = inputs[0]
        assert isinstance(tensor, dict)
        return tensor

    def _outputs(self, wanted: Any, binary_default: bool, asked: Asked) -> tuple[tuple[str, bool], ...]:
        if wanted is None or wanted == []:
            return _BOTH if binary_default else tuple((name, False) for name in OUTPUTS)
        if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
            raise bad_request(f"'outputs' must be an array of objects, got {shown(wanted)}")
        outputs: dict[str, bool] = {}
        for output in wanted:
            name = self.choices.check_output(output.get("name"), asked)
            if name in outputs:
                raise bad_request(f"the output {name!r} is asked for twice; name it once")
            binary = _parameters(output, f"the output {name!r}").get("binary_data", binary_default)
            outputs[name] = _boolean(binary, "binary_data")
        return tuple(outputs.items())

    def _form(
        self,
        request_id: str | None,
        rows: int,
        datatype: str,
        size: int | None,
        outputs: tuple[tuple[str, bool], ...],
        asked: Asked,
    ) -> _Form:
        heading = {"model_name": self._name, "model_version": self._version}
        if request_id is not None:
            heading["id"] = request_id
        binary_head, binary_headers, http_head = None, [], None
        if all(binary for _, binary in outputs):
            sizes = {name: self.tensors.size_of(name, rows) for name, _ in outputs}
            forms = [_output_form(name, (rows, *self.tensors.row_shape(name)), size) for name, size in sizes.items()]
            binary_head = _to_json({**heading, "outputs": forms})
            binary_headers = _binary_headers(len(binary_head), len(binary_head) + sum(sizes.values()))
            http_head = http_response(b"200 OK", binary_headers, binary_head)
        return _Form(
            rows=rows,
            datatype=datatype,
            size=size,
            outputs=outputs,
            heading=heading,
            binary_head=binary_head,
            binary_headers=binary_headers,
            http_head=http_head,
            asked=asked,
        )


def json_headers(length: int) -> Headers:
    """Return the HTTP headers of a JSON body of `length` bytes."""
    return [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]


def _binary_headers(head_length: int, length: int) -> Headers:
    return [
        (b"content-type", b"application/octet-stream"),
        (HEADER_LENGTH, str(head_length).encode()),
        (b"content-length", str(length).encode()),
    ]


def http_response(status: bytes, headers: Headers, body: bytes) -> bytes:
    """Return a whole HTTP/1.1 response; `status` is its number and its phrase."""
    lines = b"".join(b"%s: %s\r\n" % header for header in headers)
    return b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, lines, body)


def _header_length(value: bytes, body_length: int) -> int:
    if not (value.isdigit() and len(value) <= 18 and int(value) <= body_length):
        raise bad_request(
            f"Inference-Header-Content-Length is {shown(value.decode('latin-1'))}, expected a number of bytes up to "
            f"the body's {body_length}"
        )
    return int(value)


def _load(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_request(
            f"the request is not JSON ({error}); a binary tensor needs Inference-Header-Content-Length"
        ) from error
    if not isinstance(document, dict):
        raise bad_request(f"the request is {shown(document)}, expected a JSON object with 'inputs'")
    return document


def _parameters(holder: dict[str, Any], where: str) -> Parameters:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise bad_request(f"the 'parameters' of {where} must be an object, got {shown(parameters)}")
    return checked_parameters(parameters, where)


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise bad_request(f"{name!r} must be true or false, got {shown(value)}")
    return value


def _output_form(name: str, shape: tuple[int, ...], size: int | None) -> dict[str, Any]:
    """Return an output's JSON without its numbers; `size` is in bytes, None where the numbers are in the JSON."""
    output: dict[str, Any] = {"name": name, "datatype": datatype_of(name), "shape": list(shape)}
    if size is not None:
        output["parameters"] = {"binary_data_size": size}
    return output


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
