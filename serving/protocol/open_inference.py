"""The Open Inference Protocol (KServe V2) over REST, for models from `images` to `probabilities` and `logits`.

A request is JSON, or JSON followed by raw little-endian tensors (the binary tensor extension), or nothing but one raw
tensor (`Inference-Header-Content-Length: 0`). Everything is checked here, before a request may join a batch: a request
that gets through cannot fail in the model.

Further outputs come only to requests that name them: `exit` of a multi-exit model; and `agreement`, the share of draws
or members that vote for the winner. The parameters of a request may set `timeout` (microseconds) and `priority` (2
yields to others) and, where the operator allows it, choose by `exit` or `confidence` which exit answers, and by `mode`
and `draws` how.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import itertools
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Plan, Prediction
from serving.engine.exits import ExitChoice, num_exits, read_confidence
from serving.errors import Headers, RequestError, bad_request
from zoo.bundle.card import Card
from zoo.errors import BadInput
from zoo.vocabulary import Mode

HEADER_LENGTH: Final = b"inference-header-content-length"
VERSION: Final = "1"
INPUT: Final = "images"
OUTPUTS: Final = ("probabilities", "logits")
EXIT: Final = "exit"
AGREEMENT: Final = "agreement"

_WIRE: Final = {"probabilities": "<f4", "logits": "<f4", EXIT: "<i8", AGREEMENT: "<f4"}
_BOTH: Final = tuple((name, True) for name in OUTPUTS)
_MAX_TIMEOUT: Final = 86_400_000_000
_DATATYPE: Final = f"the input {INPUT!r} has datatype {{found}}, expected FP32 (pixels in [0, 1]) or UINT8 (0 to 255)"
_ITEM_BYTES: Final = {"FP32": 4, "UINT8": 1}
_MAX_ID: Final = 256
_MAX_REMEMBERED: Final = 256
_MAX_REMEMBERED_BYTES: Final = 1024
_MAX_SHOWN: Final = 160
# commas, colons, lists and objects around the pixels; a request has about a dozen
_MAX_OTHER_PARTS: Final = 1000
_UNSUPPORTED: Final = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size", "classification")

Parameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a request asks for beside its images, in any protocol."""

    plan: Plan | None = None
    """How it wants to be answered; None leaves it to the server."""
    limits: NDArray[np.float32] | None = None
    """By which exit it wants to be answered, (exit - 1); None leaves it to the server."""
    timeout: float | None = None
    """Seconds after which nobody wants the answer any more."""
    bulk: bool = False
    """Whether it yields to others."""


NOTHING_ASKED: Final = Asked()


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
        *,
        max_rows: int,
        version: str = VERSION,
        plan: Plan | None = None,
        modes: Sequence[Mode] = (),
        voting: Sequence[Mode] = (),
        max_draws: int = 1,
        may_choose_exit: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare for a model.

        Args:
            card: of the model.
            max_rows: how many images one request may hold.
            version: the model's.
            plan: how a request is answered that chooses nothing; None is by one path.
            modes: what a request may choose instead; empty where it may not choose.
            voting: the modes that can tell their agreement; `random` does with more than one draw only.
            max_draws: how many draws a request may choose.
            may_choose_exit: whether a request may say which exit of a multi-exit model is to answer.
            details: what the metadata tells beside the protocol's own fields.
        """
        self._name = card.name
        self._version = version
        self._image_shape = (card.input.channels, card.input.height, card.input.width)
        self._image_items = math.prod(self._image_shape)
        self._classes = len(card.classes)
        self._max_rows = max_rows
        self._num_exits = num_exits(card)
        self._may_choose_exit = may_choose_exit
        self._plan = plan or Plan("single")
        self._modes = tuple(modes)
        self._voting = tuple(voting)
        self._max_draws = max_draws
        self._details = dict(details or {})
        votes = self._votes(self._plan) or any(mode in self._modes for mode in self._voting)
        self._known_outputs = (
            *OUTPUTS,
            *([EXIT] if self._num_exits > 1 else []),
            *([AGREEMENT] if votes else []),
        )
        self._forms: dict[bytes | int, _Form] = {}
        """By the JSON of a binary request, or by the number of images of a raw one."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs that a request may ask for."""
        return self._known_outputs

    def metadata(self) -> dict[str, Any]:
        """Return the answer to `GET /v2/models/NAME`; -1 is the batch."""
        outputs = [
            {"name": name, "datatype": _datatype(name), "shape": [-1, *self._shape_of_row(name)]}
            for name in self._known_outputs
        ]
        return {
            "name": self._name,
            "versions": [self._version],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self._image_shape]}],
            "outputs": outputs,
            **({"parameters": self._details} if self._details else {}),
        }

    def asked(self, parameters: Parameters) -> Asked:
        """Return what a request's parameters ask for.

        Raises:
            RequestError: 400 if they make no sense, or ask for what requests may not choose.
        """
        if not parameters:
            return NOTHING_ASKED
        return Asked(
            plan=self._chosen_plan(parameters.get("mode"), parameters.get("draws")),
            limits=self.exit_limits(parameters),
            timeout=_timeout(parameters.get("timeout")),
            bulk=_priority(parameters.get("priority")) > 1,
        )

    def check_output(self, name: object, asked: Asked) -> str:
        """Return the name of an output that a request may have.

        Raises:
            RequestError: 400 if the model has none of this name, or not for this request.
        """
        if not isinstance(name, str) or name not in self._known_outputs:
            raise bad_request(f"unknown output {_short(name)}; {self._name} has {', '.join(self._known_outputs)}")
        plan = asked.plan or self._plan
        if name == AGREEMENT and not self._votes(plan):
            raise bad_request(
                f"the output {name!r} needs several votes, but the request is answered in mode {plan.mode!r} by one; "
                "leave it out"
            )
        return name

    def values(self, answer: Prediction, name: str) -> NDArray[Any]:
        """Return an output of an answer: (image, class) or (image,), in its own type."""
        return _of(answer, name)

    def rows(self, shape: Any) -> int:
        """Return how many images a declared shape means.

        Raises:
            RequestError: 400 for any other shape than this model's, 413 for too many images.
        """
        return self._rows(shape)

    def pixels(self, content: bytes, datatype: str, rows: int) -> NDArray[Any]:
        """Return the checked pixels of a raw little-endian tensor, FP32 or UINT8, of the right size.

        Raises:
            RequestError: 400 for another type or size, or pixels outside [0, 1].
        """
        if datatype not in _ITEM_BYTES:
            raise bad_request(_DATATYPE.format(found=_short(datatype)))
        expected = rows * self._image_items * _ITEM_BYTES[datatype]
        if len(content) != expected:
            raise bad_request(
                f"the input {INPUT!r} has {len(content)} bytes, expected {expected} for {datatype} "
                f"{[rows, *self._image_shape]}"
            )
        return self._view(content, 0, datatype, rows)

    def _votes(self, plan: Plan) -> bool:
        return plan.mode in self._voting and (plan.mode != "random" or plan.draws > 1)

    def _chosen_plan(self, mode: Any, draws: Any) -> Plan | None:
        if mode is None and draws is None:
            return None
        if not self._modes:
            raise bad_request(
                f"the request chooses by {'draws' if mode is None else 'mode'!r}, but here the server chooses how it "
                "answers; leave it out (the operator may allow it with MANYGATES_SERVE_ALLOW_MODE_CHOICE=true)"
            )
        chosen = self._plan.mode if mode is None else mode
        if chosen not in self._modes:
            raise bad_request(f"mode is {_short(mode)}, expected one of {', '.join(self._modes)}")
        if draws is None:
            return self._unless_default(Plan(chosen, self._plan.draws if chosen == self._plan.mode == "random" else 1))
        if chosen != "random":
            raise bad_request(f"draws is {_short(draws)}, but mode {chosen!r} draws no paths; leave it out")
        if type(draws) is not int or not 1 <= draws <= self._max_draws:
            raise bad_request(f"draws is {_short(draws)}, expected a whole number from 1 to {self._max_draws}")
        return self._unless_default(Plan(chosen, draws))

    def _unless_default(self, plan: Plan) -> Plan | None:
        """Return a plan; None for the default, so that such requests share batches with those that choose nothing."""
        return None if plan == self._plan else plan

    def exit_limits(self, parameters: Parameters) -> NDArray[np.float32] | None:
        """Return the limits, float32 (exit - 1), that the parameters `exit` or `confidence` stand for; None without.

        Raises:
            RequestError: 400 if they make no sense, the model has only one exit, or requests may not choose.
        """
        given = [name for name in (EXIT, "confidence") if parameters.get(name) is not None]
        if not given:
            return None
        if self._num_exits == 1:
            raise bad_request(f"the request chooses by {given[0]!r}, but {self._name} has only one exit; leave it out")
        if not self._may_choose_exit:
            raise bad_request(
                f"the request chooses by {given[0]!r}, but here the server chooses which exit answers; leave it out "
                "(the operator may allow it with MANYGATES_SERVE_ALLOW_EXIT_CHOICE=true)"
            )
        confidence = parameters.get("confidence")
        try:
            if isinstance(confidence, str):
                confidence = read_confidence(confidence)
            return ExitChoice(exit=parameters.get(EXIT), confidence=confidence).limits(self._name, self._num_exits)
        except BadInput as error:
            raise bad_request(str(error)) from error

    def decode(self, body: bytes, header_length: bytes | None) -> InferRequest:
        """Read and check a request.

        Args:
            body: the whole body.
            header_length: the value of `Inference-Header-Content-Length`, if it was sent.

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
        return InferRequest(images=self._pixels(body, length, form), form=form)

    def encode(self, request: InferRequest, answer: Prediction) -> tuple[Headers, bytes]:
        """Return the HTTP headers and the body of the answer to `request`."""
        form = request.form
        if form.binary_head is not None:
            tensors = [self._bytes_of(answer, name) for name, _ in form.outputs]
            return form.binary_headers, b"".join((form.binary_head, *tensors))
        outputs = []
        tensors = []
        for name, binary in form.outputs:
            values = self.values(answer, name)
            output = _output_form(name, values.shape, binary)
            if binary:
                tensors.append(self._bytes_of(answer, name))
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
            return b"".join((form.http_head, *(self._bytes_of(answer, name) for name, _ in form.outputs)))
        headers, body = self.encode(request, answer)
        return http_response(b"200 OK", headers, body)

    def _bytes_of(self, answer: Prediction, name: str) -> bytes:
        return self.values(answer, name).astype(_WIRE[name], copy=False).tobytes()

    def _decode_json(self, body: bytes) -> InferRequest:
        form, data = self._parse(body)
        if form.size is not None:
            raise bad_request(
                f"the input {INPUT!r} has a 'binary_data_size' of {form.size}, but no bytes follow the JSON; send "
                "Inference-Header-Content-Length with the length of the JSON, and the tensor after it"
            )
        shape = (form.rows, *self._image_shape)
        return InferRequest(images=_pixels_of_json(data, shape, form.datatype), form=form)

    def _decode_raw(self, body: bytes) -> InferRequest:
        image_bytes = self._image_items * 4
        rows, rest = divmod(len(body), image_bytes)
        if rest or not rows:
            raise bad_request(
                f"the raw tensor has {len(body)} bytes, expected a multiple of {image_bytes} (FP32 "
                f"{list(self._image_shape)} per image); for UINT8 send the JSON header as well"
            )
        self._check_rows(rows)
        form = self._forms.get(rows)
        if form is None:
            form = self._form(None, rows, "FP32", len(body), _BOTH, NOTHING_ASKED)
            self._remember(rows, form)
        return InferRequest(images=self._pixels(body, 0, form), form=form)

    def _remember(self, key: bytes | int, form: _Form) -> None:
        if len(self._forms) >= _MAX_REMEMBERED:
            self._forms.clear()
        self._forms[key] = form

    def _parse(self, text: bytes) -> tuple[_Form, Any]:
        """Read the JSON of a request; returns its form and the pixels that are in it."""
        self._check_structure(text)
        document = _load(text)
        request_id = document.get("id")
        if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= _MAX_ID):
            raise bad_request(f"'id' must be a string of at most {_MAX_ID} characters, got {_short(request_id)}")
        parameters = _parameters(document, "the request")
        tensor = self._only_input(document)
        datatype = tensor.get("datatype")
        if not isinstance(datatype, str) or datatype not in _ITEM_BYTES:
            raise bad_request(_DATATYPE.format(found=_short(datatype)))
        rows = self._rows(tensor.get("shape"))
        size = _parameters(tensor, f"the input {INPUT!r}").get("binary_data_size")
        if size is not None:
            self._check_size(size, rows, datatype)
            if "data" in tensor:
                raise bad_request(f"the input {INPUT!r} has 'data' and 'binary_data_size'; send one of them")
        elif "data" not in tensor:
            raise bad_request(f"the input {INPUT!r} has neither 'data' nor 'binary_data_size'; send one of them")
        binary = parameters.get("binary_data_output", False)
        asked = self.asked(parameters)
        outputs = self._outputs(document.get("outputs"), _boolean(binary, "binary_data_output"), asked)
        return self._form(request_id, rows, datatype, size, outputs, asked), tensor.get("data")

    def _check_structure(self, text: bytes) -> None:
        """Refuse JSON of more parts than any good request has: millions of empty lists take seconds to parse."""
        channels, height, _ = self._image_shape
        lists = self._max_rows * (1 + channels * (1 + height)) + _MAX_OTHER_PARTS
        numbers = self._max_rows * self._image_items + _MAX_OTHER_PARTS
        for part, limit in ((b"[", lists), (b"{", _MAX_OTHER_PARTS), (b":", _MAX_OTHER_PARTS), (b",", numbers)):
            found = text.count(part)
            if found > limit:
                raise bad_request(
                    f"the JSON holds {part.decode()!r} {found} times, expected at most {limit} in a request of up to "
                    f"{self._max_rows} images; send the pixels flat, or better as a binary tensor"
                )

    def _only_input(self, document: dict[str, Any]) -> dict[str, Any]:
        inputs = document.get("inputs")
        if not isinstance(inputs, list) or not all(isinstance(tensor, dict) for tensor in inputs):
            raise bad_request(f"'inputs' must be an array of objects, got {_short(inputs)}")
        for tensor in inputs:
            if tensor.get("name") != INPUT:
                raise bad_request(f"unknown input {_short(tensor.get('name'))}; {self._name} takes only {INPUT!r}")
        if len(inputs) != 1:
            raise bad_request(f"got {len(inputs)} inputs, expected exactly one, {INPUT!r}")
        tensor = inputs[0]
        assert isinstance(tensor, dict)
        return tensor

    def _rows(self, shape: Any) -> int:
        """Return how many images a declared shape means."""
        whole = isinstance(shape, list) and all(type(size) is int for size in shape)
        if not whole or tuple(shape[1:]) != self._image_shape or shape[0] < 1:
            expected = f"[images, {', '.join(map(str, self._image_shape))}]"
            hint = "; add the leading batch dimension" if whole and tuple(shape) == self._image_shape else ""
            raise bad_request(f"the input {INPUT!r} has shape {_short(shape)}, expected {expected}{hint}")
        rows = shape[0]
        assert isinstance(rows, int)
        self._check_rows(rows)
        return rows

    def _check_rows(self, rows: int) -> None:
        if rows > self._max_rows:
            raise RequestError(
                413,
                "too_many_images",
                f"{_short(rows)} images in one request, expected at most {self._max_rows}; split it",
            )

    def _check_size(self, size: Any, rows: int, datatype: str) -> None:
        # Python's integers do not overflow, and `rows` is bounded
        expected = rows * self._image_items * _ITEM_BYTES[datatype]
        if type(size) is not int or size != expected:
            raise bad_request(
                f"the input {INPUT!r} has a 'binary_data_size' of {_short(size)}, expected {expected} for {datatype} "
                f"{[rows, *self._image_shape]}"
            )

    def _outputs(self, wanted: Any, binary_default: bool, asked: Asked) -> tuple[tuple[str, bool], ...]:
        if wanted is None or wanted == []:
            return _BOTH if binary_default else tuple((name, False) for name in OUTPUTS)
        if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
            raise bad_request(f"'outputs' must be an array of objects, got {_short(wanted)}")
        outputs: dict[str, bool] = {}
        for output in wanted:
            name = self.check_output(output.get("name"), asked)
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
            shapes = {name: (rows, *self._shape_of_row(name)) for name, _ in outputs}
            binary_head = _to_json({**heading, "outputs": [_output_form(name, shapes[name], True) for name in shapes]})
            total = len(binary_head) + sum(_size_of(name, shape) for name, shape in shapes.items())
            binary_headers = _binary_headers(len(binary_head), total)
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

    def _shape_of_row(self, name: str) -> tuple[int, ...]:
        """Return the shape of an output for one image."""
        return () if name in (EXIT, AGREEMENT) else (self._classes,)

    def _pixels(self, body: bytes, offset: int, form: _Form) -> NDArray[Any]:
        return self._view(body, offset, form.datatype, form.rows)

    def _view(self, body: bytes, offset: int, datatype: str, rows: int) -> NDArray[Any]:
        shape = (rows, *self._image_shape)
        if datatype == "UINT8":
            return np.frombuffer(body, dtype=np.uint8, offset=offset).reshape(shape)
        images = np.frombuffer(body, dtype="<f4", offset=offset).reshape(shape)
        # the tensor starts wherever the JSON ends, and unaligned arrays are slow and unsafe further down
        return _checked(images.astype(np.float32, copy=not images.flags.aligned))


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
            f"Inference-Header-Content-Length is {_short(value.decode('latin-1'))}, expected a number of bytes up to "
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
        raise bad_request(f"the request is {_short(document)}, expected a JSON object with 'inputs'")
    return document


def _parameters(holder: dict[str, Any], where: str) -> Parameters:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise bad_request(f"the 'parameters' of {where} must be an object, got {_short(parameters)}")
    for name in _UNSUPPORTED:
        if name in parameters:
            raise bad_request(f"{where} has the parameter {name!r}, which this server does not offer; remove it")
    return parameters


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise bad_request(f"{name!r} must be true or false, got {_short(value)}")
    return value


def _pixels_of_json(data: Any, shape: tuple[int, ...], datatype: str) -> NDArray[np.float32]:
    """Turn flat or nested numbers into checked pixels."""
    numbers = _numbers(data, shape)
    if datatype == "UINT8":
        # compared as Python's integers, which have no width to overflow
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) > 255:
            raise bad_request(f"the 'data' of {INPUT!r} must be integers from 0 to 255 for UINT8; send FP32 for [0, 1]")
        return _scaled(np.array(numbers, dtype=np.uint8).reshape(shape))
    try:
        values = np.array(numbers, dtype=np.float64)
    except OverflowError as error:  # an integer beyond 1e308; a float like that is infinite already
        raise bad_request(f"the 'data' of {INPUT!r} holds a number beyond any float; pixels are in [0, 1]") from error
    with np.errstate(over="ignore"):  # too large becomes infinite, which is refused like any other pixel
        return _checked(values.astype(np.float32).reshape(shape))


def _numbers(data: Any, shape: tuple[int, ...]) -> list[int | float]:
    """Return flat or nested numbers as one flat list.

    All of it is checked before numpy sees any: a single long string among numbers would make numpy reserve its length
    for every one of them.
    """
    if not isinstance(data, list):
        raise bad_request(f"the 'data' of {INPUT!r} must hold numbers only, got {_short(data)}")
    if data and isinstance(data[0], list):
        numbers: list[Any] = [data]
        for depth, size in enumerate(shape):
            for row in numbers:
                if not isinstance(row, list) or len(row) != size:
                    found = f"{len(row)} entries" if isinstance(row, list) else _short(row)
                    raise bad_request(
                        f"the 'data' of {INPUT!r} is not a regular array: {found} in dimension {depth + 1}, expected "
                        f"{size} entries; send it flat or as {list(shape)}"
                    )
            numbers = list(itertools.chain.from_iterable(numbers))
    else:
        numbers = data
        if len(numbers) != math.prod(shape):
            raise bad_request(
                f"the 'data' of {INPUT!r} has {len(numbers)} numbers, expected {math.prod(shape)}, flat or as "
                f"{list(shape)}"
            )
    if not {int, float}.issuperset(map(type, numbers)):
        wrong = next(number for number in numbers if type(number) not in (int, float))
        raise bad_request(f"the 'data' of {INPUT!r} must hold numbers only, got {_short(wrong)}")
    return numbers


def _scaled(levels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.divide(levels, np.float32(255), dtype=np.float32)


def _checked(images: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise bad_request(
            f"the pixels of {INPUT!r} reach from {low:g} to {high:g}; pixels are in [0, 1]: divide by 255, or send "
            "them as UINT8"
        )
    return images


def _timeout(value: Any) -> float | None:
    """Read microseconds, as the scheduling policy extension counts; 0 is none."""
    if value is None or value == 0:
        return None
    if type(value) is not int or not 0 < value <= _MAX_TIMEOUT:
        raise bad_request(f"timeout is {_short(value)}, expected microseconds, a whole number up to {_MAX_TIMEOUT}")
    return value / 1e6


def _priority(value: Any) -> int:
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= 2:
        raise bad_request(
            f"priority is {_short(value)}, expected 0 (by the number of images), 1 or 2 (yields to others)"
        )
    return value


def _of(answer: Prediction, name: str) -> NDArray[Any]:
    if name == "probabilities":
        return answer.probabilities
    if name == "logits":
        return answer.logits
    if name == EXIT:
        assert answer.exits is not None  # only multi-exit models have this output
        return answer.exits
    assert answer.agreement is not None  # the request was checked to be answered by several votes
    return answer.agreement


def _datatype(name: str) -> str:
    return "INT64" if name == EXIT else "FP32"


def _size_of(name: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes an output has."""
    return math.prod(shape) * np.dtype(_WIRE[name]).itemsize


def _output_form(name: str, shape: tuple[int, ...], binary: bool) -> dict[str, Any]:
    output: dict[str, Any] = {"name": name, "datatype": _datatype(name), "shape": list(shape)}
    if binary:
        output["parameters"] = {"binary_data_size": _size_of(name, shape)}
    return output


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _short(value: Any) -> str:
    """Show a value from a request, however large it is."""
    shown = _SHORTENED.repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


class _Shortened(reprlib.Repr):
    """The standard library's short forms, without its sorting of a whole object to show four of its keys."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        first = itertools.islice(x.items(), self.maxdict)
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in first]
        return "{" + ", ".join(shown + ["..."] * (len(x) > self.maxdict)) + "}"


_SHORTENED: Final = _Shortened()
_SHORTENED.maxlevel = 2
