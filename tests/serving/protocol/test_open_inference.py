import json
from typing import Any

import numpy as np
import pytest

from serving.answers import Plan, Prediction
from serving.errors import RequestError, shown
from serving.protocol.choices import NOTHING_ASKED, Asked, Choices
from serving.protocol.open_inference import HEADER_LENGTH, Codec, InferRequest, http_response

PIXELS = 48


@pytest.fixture
def codec(card) -> Codec:
    return Codec(card, max_rows=16)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)


def tensor(**changes: Any) -> dict[str, Any]:
    fields = {"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * PIXELS, **changes}
    return {key: value for key, value in fields.items() if value is not None}


def request(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def binary(
    raw: bytes, *, size: Any = None, datatype: str = "FP32", rows: int = 1, **fields: Any
) -> tuple[bytes, bytes]:
    """Return a body and the value of its Inference-Header-Content-Length."""
    parameters = {"binary_data_size": len(raw) if size is None else size}
    head = request(tensor(data=None, datatype=datatype, shape=[rows, 3, 4, 4], parameters=parameters), **fields)
    return head + raw, str(len(head)).encode()


def answer(rows: int) -> Prediction:
    probabilities = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) / 7
    return Prediction(probabilities, -probabilities)


def refused(codec: Codec, body: bytes, header_length: bytes | None = None) -> str:
    with pytest.raises(RequestError) as refusal:
        codec.decode(body, header_length)
    assert refusal.value.status == 400
    return str(refusal.value)


@pytest.mark.parametrize("nested", [False, True])
def test_json_pixels_are_read_flat_or_nested(codec: Codec, images: np.ndarray, nested: bool) -> None:
    data = images.tolist() if nested else images.ravel().tolist()
    read = codec.decode(request(tensor(shape=[2, 3, 4, 4], data=data)), None).images
    assert read.dtype == np.float32
    assert np.array_equal(read, images)


@pytest.mark.parametrize("padding", range(4))
def test_binary_pixels_are_read_wherever_the_json_ends(codec: Codec, images: np.ndarray, padding: int) -> None:
    body, length = binary(images.tobytes(), rows=2, id="x" * padding)
    read = codec.decode(body, length).images
    assert np.array_equal(read, images)
    assert read.flags.aligned


def test_a_raw_tensor_alone_is_read_as_fp32(codec: Codec, images: np.ndarray) -> None:
    decoded = codec.decode(images.tobytes(), b"0")
    assert np.array_equal(decoded.images, images)
    headers, _ = codec.encode(decoded, answer(2))
    assert (b"content-type", b"application/octet-stream") in headers


def test_raw_tensors_of_different_sizes_are_each_answered_in_their_own(codec: Codec) -> None:
    for rows in (2, 1, 2, 3):
        headers, body = codec.encode(codec.decode(np.zeros((rows, 3, 4, 4), "<f4").tobytes(), b"0"), answer(rows))
        head = json.loads(body[: int(dict(headers)[b"inference-header-content-length"])])
        assert [output["shape"] for output in head["outputs"]] == [[rows, 3], [rows, 3]]
        assert int(dict(headers)[b"content-length"]) == len(body)


def test_uint8_pixels_in_json_are_divided_by_255(codec: Codec) -> None:
    levels = np.arange(PIXELS, dtype=np.uint8) * 5
    read = codec.decode(request(tensor(datatype="UINT8", data=levels.tolist())), None).images
    assert np.array_equal(read.ravel(), levels.astype(np.float32) / np.float32(255))


def test_binary_uint8_pixels_stay_levels_until_a_worker_divides_them(codec: Codec) -> None:
    levels = np.arange(PIXELS, dtype=np.uint8) * 5
    body, length = binary(levels.tobytes(), datatype="UINT8")
    read = codec.decode(body, length).images
    assert read.dtype == np.uint8
    assert np.array_equal(read.ravel(), levels)


def test_a_json_answer_echoes_the_id_and_holds_both_outputs(codec: Codec) -> None:
    headers, body = codec.encode(codec.decode(request(tensor(), id="q1"), None), answer(1))
    assert (b"content-type", b"application/json") in headers
    assert (b"content-length", str(len(body)).encode()) in headers
    document = json.loads(body)
    assert document["model_name"] == "tiny"
    assert document["model_version"] == "1"
    assert document["id"] == "q1"
    assert [(output["name"], output["datatype"], output["shape"]) for output in document["outputs"]] == [
        ("probabilities", "FP32", [1, 3]),
        ("logits", "FP32", [1, 3]),
    ]
    assert document["outputs"][0]["data"] == answer(1).probabilities.ravel().tolist()
    assert "id" not in json.loads(codec.encode(codec.decode(request(tensor()), None), answer(1))[1])


def test_a_binary_answer_holds_its_tensors_after_the_json(codec: Codec) -> None:
    body, length = binary(np.zeros((2, 3, 4, 4), np.float32).tobytes(), rows=2, parameters={"binary_data_output": True})
    headers, content = codec.encode(codec.decode(body, length), answer(2))
    head_length = int(dict(headers)[b"inference-header-content-length"])
    document = json.loads(content[:head_length])
    assert [output["parameters"]["binary_data_size"] for output in document["outputs"]] == [24, 24]
    tensors = np.frombuffer(content[head_length:], dtype="<f4").reshape(2, 2, 3)
    assert np.array_equal(tensors[0], answer(2).probabilities)
    assert np.array_equal(tensors[1], answer(2).logits)
    assert int(dict(headers)[b"content-length"]) == len(content)


def test_the_wanted_outputs_alone_are_sent_in_their_order_and_form(codec: Codec) -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
    headers, content = codec.encode(codec.decode(request(tensor(), outputs=outputs), None), answer(1))
    head_length = int(dict(headers)[b"inference-header-content-length"])
    document = json.loads(content[:head_length])
    assert [output["name"] for output in document["outputs"]] == ["logits", "probabilities"]
    assert "data" not in document["outputs"][0]
    assert document["outputs"][1]["data"] == answer(1).probabilities.ravel().tolist()
    assert np.array_equal(np.frombuffer(content[head_length:], "<f4"), answer(1).logits.ravel())

    only = codec.encode(codec.decode(request(tensor(), outputs=[{"name": "logits"}]), None), answer(1))[1]
    assert [output["name"] for output in json.loads(only)["outputs"]] == ["logits"]


def test_an_output_overrules_what_the_request_says_about_binary(codec: Codec) -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}]
    decoded = codec.decode(request(tensor(), outputs=outputs, parameters={"binary_data_output": True}), None)
    assert "data" in json.loads(codec.encode(decoded, answer(1))[1])["outputs"][0]


def test_a_remembered_header_does_not_remember_pixels_or_another_id(codec: Codec, images: np.ndarray) -> None:
    for image, name in ((images[:1], "a"), (images[1:], "b"), (images[:1], "b")):
        body, length = binary(image.tobytes(), id=name)
        decoded = codec.decode(body, length)
        assert np.array_equal(decoded.images, image)
        assert json.loads(codec.encode(decoded, answer(1))[1])["id"] == name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01, 255.0, 1e300])
@pytest.mark.parametrize("form", ["json", "binary", "raw"])
def test_pixels_outside_0_to_1_are_refused_with_the_likely_fix(codec: Codec, value: float, form: str) -> None:
    data = [0.5] * (PIXELS - 1) + [value]
    if form == "json":
        message = refused(codec, request(tensor(data=data)))
    else:
        with np.errstate(over="ignore"):
            raw = np.array(data).astype("<f4").tobytes()
        message = refused(codec, *(binary(raw) if form == "binary" else (raw, b"0")))
    assert "pixels are in [0, 1]: divide by 255" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "holds '[' 100000 times"),
        (b'{"inputs": [{"shape": [' + b"9" * 5000 + b"]}]}", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"{}", "'inputs' must be an array"),
        (b'{"inputs": [7]}', "'inputs' must be an array of objects"),
        (request(), "got 0 inputs, expected exactly one"),
        (request(tensor(), tensor()), "got 2 inputs"),
        (request(tensor(name="image")), "unknown input 'image'; tiny takes only 'images'"),
        (request(tensor(), tensor(name="gates", shape=[2], data=[0, 1])), "unknown input 'gates'"),
        (request(tensor(datatype="FP64")), "datatype 'FP64', expected FP32"),
        (request(tensor(datatype=None)), "datatype None, expected FP32"),
        (request(tensor(datatype=["FP32"])), "expected FP32"),
        (request(tensor(shape=[1, 4, 4, 3])), "shape [1, 4, 4, 3], expected [images, 3, 4, 4]"),
        (request(tensor(shape=[3, 4, 4])), "add the leading batch dimension"),
        (request(tensor(shape=[0, 3, 4, 4])), "shape [0, 3, 4, 4]"),
        (request(tensor(shape=[-1, 3, 4, 4])), "shape [-1, 3, 4, 4]"),
        (request(tensor(shape=[True, 3, 4, 4])), "shape [True, 3, 4, 4]"),
        (request(tensor(shape=[1.0, 3, 4, 4])), "shape [1.0, 3, 4, 4]"),
        (request(tensor(shape="all")), "shape 'all'"),
        (request(tensor(data=[0.5] * 47)), "47 numbers, expected 48, flat or as [1, 3, 4, 4]"),
        (
            request(tensor(data=[[0.5] * 48])),
            "48 entries in dimension 2, expected 3 entries; send it flat or as [1, 3, 4, 4]",
        ),
        (request(tensor(data=[[0.5], [0.5, 0.5]])), "not a regular array: 2 entries in dimension 1, expected 1"),
        (request(tensor(data=[[[0.5] * 4] * 3])), "0.5 in dimension 4, expected 4 entries"),
        (request(tensor(data=[[[[0.5] * 4] * 4] * 2 + ["four"]])), "'four' in dimension 3, expected 4 entries"),
        (request(tensor(data=[[[[0.5] * 4] * 4] * 2 + [[[0.5] * 3 + [[]]] * 4]])), "numbers only, got []"),
        (request(tensor(data=[0.5] * 47 + [[]])), "must hold numbers only, got []"),
        (request(tensor(data=["0.5"] * 48)), "must hold numbers only"),
        (request(tensor(data=[True] * 48)), "must hold numbers only"),
        (request(tensor(data=[0.5] * 47 + [None])), "must hold numbers only, got None"),
        (request(tensor(data=[10**30] * 48)), "divide by 255"),
        (request(tensor(data=[10**4000] * 48)), "beyond any float"),
        (request(tensor(datatype="UINT8", data=[10**4000] * 48)), "integers from 0 to 255"),
        (request(tensor(datatype="UINT8", data=[1] * 47 + [1.0])), "integers from 0 to 255"),
        (request(tensor(data={})), "must hold numbers only"),
        (request(tensor(data=None)), "neither 'data' nor 'binary_data_size'"),
        (request(tensor(datatype="UINT8")), "integers from 0 to 255"),
        (request(tensor(datatype="UINT8", data=[256] * 48)), "integers from 0 to 255"),
        (request(tensor(datatype="UINT8", data=[-1] * 48)), "integers from 0 to 255"),
        (request(tensor(), id=7), "'id' must be a string"),
        (request(tensor(), id="x" * 257), "'id' must be a string"),
        (request(tensor(), parameters=[]), "'parameters' of the request must be an object"),
        (request(tensor(), parameters={"binary_data_output": 1}), "must be true or false"),
        (request(tensor(), outputs={}), "'outputs' must be an array"),
        (request(tensor(), outputs=[{"name": "gates"}]), "unknown output 'gates'; tiny has probabilities, logits"),
        (request(tensor(), outputs=[{"name": "logits"}] * 2), "asked for twice"),
        (request(tensor(), outputs=[{"name": "logits", "parameters": {"classification": 2}}]), "'classification'"),
        (request(tensor(parameters={"shared_memory_region": "r"})), "'shared_memory_region'"),
        (request(tensor(data=None, parameters={"binary_data_size": 192})), "no bytes follow the JSON"),
    ],
)
def test_a_bad_json_request_is_refused_with_what_was_expected(codec: Codec, body: bytes, said: str) -> None:
    message = refused(codec, body)
    assert said in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "data",
    [["a" * 100_000] + [1] * 47, [1] * 47 + ["a" * 100_000], [[]] * 48, [{}] * 48, [[1] * 48] * 48],
    ids=["string first", "string last", "lists", "objects", "rows"],
)
def test_json_pixels_reach_numpy_only_after_every_one_is_known_to_be_a_number(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, data: list
) -> None:
    def must_not_be_called(*_: Any, **__: Any) -> None:
        raise AssertionError("numpy reserves the longest string's length for every entry")

    body = request(tensor(data=data))
    for name in ("array", "asarray"):
        monkeypatch.setattr(np, name, must_not_be_called)
    assert len(refused(codec, body)) < 400


@pytest.mark.parametrize("part", ["[],", "{},", "0,", '"a":'])
def test_json_of_more_parts_than_any_request_has_is_refused_before_it_is_parsed(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def must_not_parse(text: bytes) -> None:
        raise AssertionError("parsed it")

    monkeypatch.setattr("serving.protocol.open_inference._load", must_not_parse)
    message = refused(codec, b'{"inputs": [' + part.encode() * 100_000 + b"0]}")
    counted = part[0] if part[0] in "[{" else part[-1]
    assert f"the JSON holds {counted!r} 100" in message


def test_the_largest_request_has_no_more_parts_than_allowed(codec: Codec) -> None:
    pixels = np.zeros((16, 3, 4, 4)).tolist()
    assert len(codec.decode(request(tensor(shape=[16, 3, 4, 4], data=pixels)), None).images) == 16


def test_a_large_value_in_the_wrong_place_is_shown_in_short_without_sorting_it(codec: Codec) -> None:
    class Unsortable(str):
        def __lt__(self, other: object) -> bool:
            raise AssertionError("sorted all keys to show a few")

    assert shown({Unsortable(number): 0 for number in range(9)}) == "{'0': 0, '1': 0, '2': 0, '3': 0, ...}"
    wide: list = [9] * 20
    for _ in range(8):
        wide = [wide] * 20  # 20^9 numbers, all the same few lists
    assert len(shown(wide)) < 200
    assert len(shown({"a" * 1000: {"b" * 1000: "c" * 1000}})) < 200


def test_a_truncated_tensor_is_refused_with_its_expected_size(codec: Codec) -> None:
    body, length = binary(b"\0" * 192)
    assert "191 bytes follow the JSON" in refused(codec, body[:-1], length)
    assert "expected 192" in refused(codec, body[:-1], length)
    assert "expected a multiple of 192" in refused(codec, b"\0" * 191, b"0")
    assert "expected a multiple of 192" in refused(codec, b"", b"0")


@pytest.mark.parametrize("size", [191, 0, -192, 2**64 + 192, "192", 192.0, True])
def test_a_declared_size_that_is_not_the_shapes_is_refused(codec: Codec, size: object) -> None:
    assert "expected 192 for FP32 [1, 3, 4, 4]" in refused(codec, *binary(b"\0" * 192, size=size))


@pytest.mark.parametrize("rows", [17, 2**62, 2**64, 10**100])
def test_too_many_images_are_refused_before_any_size_is_computed(codec: Codec, rows: int) -> None:
    body, length = binary(b"\0" * 192, rows=rows)
    with pytest.raises(RequestError, match="expected at most 16; split it") as refusal:
        codec.decode(body, length)
    assert refusal.value.status == 413


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"", b"99999", b"9" * 30, b"\xb2"])
def test_a_header_length_that_is_no_length_is_refused(codec: Codec, length: bytes) -> None:
    body, _ = binary(b"\0" * 192)
    assert "Inference-Header-Content-Length is" in refused(codec, body, length)


def test_bytes_that_no_tensor_claims_are_refused(codec: Codec) -> None:
    head = request(tensor())
    assert "no 'binary_data_size'" in refused(codec, head + b"\0" * 192, str(len(head)).encode())
    with_both, length = binary(b"\0" * 192)
    head = json.loads(with_both[: int(length)])
    head["inputs"][0]["data"] = [0.0] * PIXELS
    both = json.dumps(head).encode()
    assert "send one of them" in refused(codec, both + b"\0" * 192, str(len(both)).encode())


def test_json_with_its_own_length_announced_is_json(codec: Codec) -> None:
    body = request(tensor())
    assert codec.decode(body, str(len(body)).encode()).images.shape == (1, 3, 4, 4)


def test_random_bytes_are_always_refused_as_the_clients_mistake(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    valid, length = binary(b"\0" * 192)
    statuses = []
    for _ in range(300):
        damaged = bytearray(valid)
        for position in rng.integers(0, int(length), size=3):
            damaged[position] = rng.integers(0, 256)
        try:  # any other exception would be answered with a 500
            codec.decode(bytes(damaged), length)
        except RequestError as error:
            statuses.append(error.status)
    assert len(statuses) > 200, "most damage is noticed"
    assert all(400 <= status < 500 for status in statuses)


# --- votes: agreement ---


def voting(card, **changes: Any) -> Codec:
    choices = Choices(card, **{"plan": Plan("ensemble"), "voting": ("ensemble", "random"), **changes})
    return Codec(card, choices, max_rows=16)


def voted(*agreement: float) -> Prediction:
    return answer(len(agreement))._replace(agreement=np.array(agreement, dtype=np.float32))


def outputs_of(codec: Codec, decoded: InferRequest, answered: Prediction) -> dict[str, Any]:
    """Return an answer's outputs by name, whether they came as JSON or in binary, and its parameters."""
    headers, body = codec.encode(decoded, answered)
    assert codec.respond(decoded, answered) == http_response(b"200 OK", headers, body)
    given = dict(headers)
    assert int(given[b"content-length"]) == len(body)
    length = int(given.get(HEADER_LENGTH, len(body)))
    head, rest = json.loads(body[:length]), body[length:]
    found: dict[str, Any] = {"parameters": head.get("parameters", {})}
    kinds = {"FP32": "<f4", "INT64": "<i8"}
    for output in head["outputs"]:
        if "data" in output:
            found[output["name"]] = output["data"]
        else:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = np.frombuffer(rest[:size], kinds[output["datatype"]]).tolist()
            rest = rest[size:]
        assert len(found[output["name"]]) == np.prod(output["shape"])
    assert rest == b""
    return found


@pytest.mark.parametrize("in_binary", [False, True])
def test_agreement_is_told_to_requests_that_ask_for_it(card, in_binary: bool) -> None:
    codec = voting(card)
    assert codec.choices.outputs == ("probabilities", "logits", "agreement")
    kinds = {output["name"]: (output["datatype"], output["shape"]) for output in codec.metadata()["outputs"]}
    assert kinds["agreement"] == ("FP32", [-1])
    wanted = [{"name": name} for name in ("logits", "agreement")]
    body = request(
        tensor(shape=[3, 3, 4, 4], data=[0.5] * 48 * 3), outputs=wanted, parameters={"binary_data_output": in_binary}
    )
    found = outputs_of(codec, codec.decode(body, None), voted(0.5, 0.75, 1.0))
    assert found["agreement"] == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("in_binary", [False, True])
def test_agreement_is_not_told_to_requests_that_do_not_ask_for_it(card, in_binary: bool) -> None:
    codec = voting(card)
    for form in (
        (np.zeros(96, "<f4").tobytes(), b"0")
        if in_binary
        else (request(tensor(shape=[2, 3, 4, 4], data=[0.5] * 96)), None),
        binary(bytes(384), rows=2, parameters={"binary_data_output": in_binary}),
    ):
        decoded = codec.decode(*form)
        found = outputs_of(codec, decoded, voted(0.1, 1.0))
        assert found.keys() == {"parameters", "probabilities", "logits"}
        assert found["parameters"] == {}


def test_where_one_path_answers_there_is_no_agreement_to_ask_for(card) -> None:
    for codec in (Codec(card, max_rows=4), voting(card, plan=Plan("single")), voting(card, voting=())):
        assert "agreement" not in codec.choices.outputs
        assert "unknown output 'agreement'" in refused(codec, request(tensor(), outputs=[{"name": "agreement"}]))
    one_draw = voting(card, plan=Plan("random", 1))
    assert "agreement" not in one_draw.choices.outputs
    assert "agreement" in voting(card, plan=Plan("random", 2)).choices.outputs
    chooses = voting(card, plan=Plan("single"), modes=("single", "random"), max_draws=8)
    assert "agreement" in chooses.choices.outputs
    wanted = [{"name": "agreement"}]
    said = refused(chooses, request(tensor(), outputs=wanted))
    assert "the output 'agreement' needs several votes, but the request is answered in mode 'single' by one" in said
    one_path = request(tensor(), outputs=wanted, parameters={"mode": "random"})
    assert "in mode 'random' by one" in refused(chooses, one_path)
    decoded = chooses.decode(request(tensor(), outputs=wanted, parameters={"mode": "random", "draws": 4}), None)
    assert decoded.form.asked.plan == Plan("random", 4)
    assert outputs_of(chooses, decoded, voted(0.25))["agreement"] == [0.25]


# --- what a request may choose ---


@pytest.mark.parametrize(
    ("parameters", "asked"),
    [
        ({}, NOTHING_ASKED),
        ({"timeout": 0, "priority": 0}, Asked()),
        ({"timeout": 250_000}, Asked(timeout=0.25)),
        ({"priority": 1}, Asked()),
        ({"priority": 2}, Asked(bulk=True)),
        ({"mode": "single"}, Asked(plan=Plan("single"))),
        ({"mode": "ensemble"}, Asked(plan=Plan("ensemble"))),
        ({"mode": "random"}, NOTHING_ASKED),
        ({"draws": 8}, Asked(plan=Plan("random", 8))),
        ({"mode": "random", "draws": 1}, Asked(plan=Plan("random", 1))),
        ({"mode": None, "draws": None, "timeout": None, "priority": None}, Asked()),
        ({"anything": "else"}, Asked()),
    ],
)
def test_a_request_chooses_by_its_parameters(card, parameters: dict[str, Any], asked: Asked) -> None:
    choices = Choices(card, Plan("random", 3), ("random", "single", "ensemble"), max_draws=8)
    codec = Codec(card, choices, max_rows=4)
    for form in ((request(tensor(), parameters=parameters), None), binary(bytes(192), parameters=parameters)):
        for _ in range(2):  # also where the head is remembered
            assert codec.decode(*form).form.asked == asked


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"timeout": -1}, "timeout is -1, expected microseconds"),
        ({"timeout": 1.5}, "timeout is 1.5, expected"),
        ({"timeout": True}, "timeout is True, expected"),
        ({"timeout": "1"}, "timeout is '1', expected"),
        ({"timeout": 10**30}, "expected microseconds, a whole number up to 86400000000"),
        ({"priority": 3}, "priority is 3, expected 0"),
        ({"priority": -1}, "priority is -1, expected"),
        ({"priority": True}, "priority is True, expected"),
        ({"mode": "fast"}, "mode is 'fast', expected one of random, single"),
        ({"mode": "ensemble"}, "mode is 'ensemble', expected one of random, single"),
        ({"mode": []}, "mode is [], expected one of"),
        ({"mode": {}}, "mode is {}, expected one of"),
        ({"mode": "single", "draws": 2}, "draws is 2, but mode 'single' draws no paths"),
        ({"draws": 0}, "draws is 0, expected a whole number from 1 to 8"),
        ({"draws": 9}, "draws is 9, expected a whole number from 1 to 8"),
        ({"draws": 2.0}, "draws is 2.0, expected a whole number"),
        ({"draws": True}, "draws is True, expected a whole number"),
        ({"draws": "2"}, "draws is '2', expected a whole number"),
        ({"draws": 10**4000}, "expected a whole number from 1 to 8"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(card, parameters: dict[str, Any], said: str) -> None:
    codec = Codec(card, Choices(card, Plan("random", 3), ("random", "single"), max_draws=8), max_rows=4)
    message = refused(codec, request(tensor(), parameters=parameters))
    assert said in message
    assert len(message) < 400


@pytest.mark.parametrize("parameters", [{"mode": "single"}, {"draws": 1}, {"mode": "single", "draws": 1}])
def test_where_requests_may_not_choose_how_they_are_answered_they_are_told_so(codec: Codec, parameters: dict) -> None:
    said = refused(codec, request(tensor(), parameters=parameters))
    assert f"the request chooses by {next(iter(parameters))!r}, but here the server chooses" in said
    assert "MANYGATES_SERVE_ALLOW_MODE_CHOICE=true" in said


# --- a whole response at once ---


@pytest.mark.parametrize("rows", [1, 3])
def test_a_response_written_at_once_is_the_one_of_headers_and_body(codec: Codec, rows: int) -> None:
    raw = np.zeros((rows, 48), "<f4").tobytes()
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
    data = [0.5] * 48 * rows
    for form in (
        (raw, b"0"),
        binary(raw, rows=rows, id="q"),
        binary(raw, rows=rows, parameters={"binary_data_output": True}),
        (request(tensor(shape=[rows, 3, 4, 4], data=data)), None),
        (request(tensor(shape=[rows, 3, 4, 4], data=data), outputs=outputs), None),
        (request(tensor(shape=[rows, 3, 4, 4], data=data), outputs=outputs[:1]), None),
    ):
        decoded = codec.decode(*form)
        found = outputs_of(codec, decoded, answer(rows))  # which compares the two
        for name in found.keys() - {"parameters"}:
            assert found[name] == pytest.approx(getattr(answer(rows), name).ravel().tolist())


def test_answers_of_another_layout_are_written_as_little_endian_rows(codec: Codec) -> None:
    decoded = codec.decode(np.zeros((2, 48), "<f4").tobytes(), b"0")
    plain = answer(2)
    turned = Prediction(np.asfortranarray(plain.probabilities), np.repeat(plain.logits, 2, axis=0)[::2])
    assert codec.respond(decoded, turned) == codec.respond(decoded, plain)


def test_the_forms_that_are_remembered_are_few_and_small(codec: Codec) -> None:
    for number in range(2000):
        body, length = binary(bytes(192), id=f"{number}")
        codec.decode(body, length)
        assert len(codec._forms) <= 256
    long, length = binary(bytes(192), parameters={"note": "x" * 2000})
    before = len(codec._forms)
    codec.decode(long, length)
    assert len(codec._forms) == before
