"""The OpenAPI 3.1 document of everything that HTTP offers, made from the models that are served.

Paths come from the routes and what is written beside their handlers, schemas from `serving.protocol.rest_messages`.
Names, shapes, classes and what requests may choose are those of this server at this moment; whatever it would refuse
is not in its document. JSON Schema cannot say everything: that `data` has as many numbers as `shape` says, and which
version goes with which model, is in words only.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.routing import BaseRoute, Route

from serving.engine.graphs import INPUT
from serving.http.documented import Documented
from serving.protocol import rest_messages
from serving.protocol.open_inference import HEADER_LENGTH
from serving.protocol.tensors import ITEM_BYTES
from serving.scheduling.service import MAX_DRAWS, Served, Service

Json = dict[str, Any]

STATUSES: Final = {
    400: "The request makes no sense: what is wrong, what was expected, what to do.",
    401: "No API key, or none that holds.",
    403: "Not allowed: the key is not for this model, or clients change nothing here.",
    404: "No such model, version or path; the message lists what there is.",
    408: "The body did not come in time.",
    413: "The body, or the number of images, is above the limit.",
    415: "A compressed body, or no PNG, JPEG or WEBP.",
    429: "The queue is full; Retry-After says when to come back.",
    431: "Request line, headers and trailers exceed 64 KiB.",
    500: "The model failed; the server's log says why.",
    503: "Starting, stopping, or too much is going on at the moment; try again.",
    504: "The request's own timeout was over.",
}
"""What a request may be refused with, and why."""
_OF_THE_CONNECTION: Final = (400, 431, 503)
"""What may be answered before a request is understood, in plain text."""
_HEADERS: Final = {
    401: ("WWW-Authenticate", "string"),
    429: ("Retry-After", "integer"),
    503: ("Retry-After", "integer"),
}
_MAX_EXAMPLE_NUMBERS: Final = 4096  # of larger images only the binary form has an example
_PICTURES: Final = ("image/png", "image/jpeg", "image/webp")
_BINARY: Final = {"type": "string", "format": "binary"}
_TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}
_HEADER_LENGTH: Final = "-".join(part.capitalize() for part in HEADER_LENGTH.decode().split("-"))
_PIXELS: Final = {
    "FP32": ({"type": "number", "minimum": 0, "maximum": 1}, "Pixels from 0 to 1"),
    "UINT8": ({"type": "integer", "minimum": 0, "maximum": 255}, "Pixels from 0 to 255, divided by 255 here"),
}
_INTRODUCTION: Final = """\
The [Open Inference Protocol](https://github.com/kserve/open-inference-protocol) (KServe V2) with the
[binary tensor extension](https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md)
and those for the model repository, statistics, configuration and scheduling; `POST /classify` for image files.

Any request may bring `X-Request-Id` (up to 128 letters, digits and `._~-`), which its answer repeats. Bodies are never
compressed. Errors are `{"error": "..."}`; only what cannot be read as HTTP is refused in plain text."""


def document(service: Service, routes: Sequence[BaseRoute]) -> Json:
    """Return the document of a server: an object of JSON.

    Args:
        service: whose models and settings it tells of.
        routes: those whose handlers are `Documented` are in it.
    """
    schemas = _schemas(service)
    paths: Json = {}
    for route in routes:
        documentation = getattr(getattr(route, "endpoint", None), "documentation", None)
        if isinstance(route, Route) and documentation is not None:
            (method,) = (route.methods or set()) - {"HEAD"}  # Starlette's own addition to GET
            operation = _operation(service, route, documentation, schemas)
            paths.setdefault(route.path, {})[method.lower()] = operation
    del schemas["ClassifyQuery"]  # which is parameters
    settings = service.settings
    components: Json = {"schemas": schemas, "responses": {f"Error{status}": _error(status) for status in STATUSES}}
    if example := _pixels_example(service.everything()):
        components["examples"] = {"InferRequest": {"summary": "Pixels as numbers.", "value": example}}
    if settings.api_keys_file or settings.admin_keys_file:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "the same key"},
        }
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "manygates",
            "version": service.description()["version"],
            "summary": "Image classifiers, answered along random paths where that is wanted.",
            "description": _INTRODUCTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "inference", "description": "Images to probabilities."},
            {"name": "models", "description": "What is served."},
            {"name": "server", "description": "Whether and how the server runs."},
        ],
        "paths": paths,
        "components": components,
    }


# --- operations


def _operation(service: Service, route: Route, documentation: Documented, schemas: Json) -> Json:
    summary, _, description = (inspect.getdoc(route.endpoint) or "").partition("\n")
    settings = service.settings
    changes = route.path.startswith("/v2/repository/models/")
    keys = not route.path.startswith("/v2/health/") and bool(
        settings.api_keys_file or (changes and settings.admin_keys_file)
    )
    refusals = {*documentation.refuses, *_OF_THE_CONNECTION, *((401, 403) if keys else ())}
    responses: Json = {"200": {"description": summary, **_answer(service, documentation.answer)}}
    if documentation.says_no:
        responses["503"] = _negative(documentation.answer)
    for status in sorted(refusals):
        responses.setdefault(str(status), {"$ref": f"#/components/responses/Error{status}"})
    found: Json = {
        "operationId": route.name,
        "tags": [documentation.tag],
        "summary": summary,
        "parameters": _parameters(service, route, documentation, schemas),
        "responses": responses,
    }
    if description.strip():
        found["description"] = description.strip()
    if documentation.takes is not None:
        found["requestBody"] = _body(service, documentation.takes)
    if keys:
        found["security"] = [{"bearer": []}, {"apiKey": []}]
    return found


def _parameters(service: Service, route: Route, documentation: Documented, schemas: Json) -> list[Json]:
    """Return what an operation takes beside a body; names of models and versions are those that are served."""
    served = service.everything()
    names: Json = {"enum": service.names} if served else {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
    versions: Json = (
        {"enum": sorted({each.version for each in served})} if served else {"pattern": "^[1-9][0-9]{0,17}$"}
    )
    if route.path.startswith("/v2/repository/"):
        names = {}  # also of one that is not loaded
    known = {"model": {"type": "string", **names}, "version": {"type": "string", **versions}}
    found: list[Json] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": known[name],
            **({"example": service.names[0]} if name == "model" and served else {}),
        }
        for name in route.param_convertors
    ]
    if documentation.takes == "Picture":
        for name, schema in schemas["ClassifyQuery"]["properties"].items():
            schema = {**schema, **known.get(name, {})}
            found.append({"name": name, "in": "query", "description": schema.pop("description"), "schema": schema})
    elif documentation.takes == "InferRequest":
        text = "Bytes of the JSON at the beginning of a binary body; 0 if there is none. Left out, all of it is JSON."
        whole = {"type": "integer", "minimum": 0}
        found.append({"name": _HEADER_LENGTH, "in": "header", "description": text, "schema": whole})
    return found


def _body(service: Service, message: str) -> Json:
    if message == "Picture":
        limit = f"Up to {service.settings.max_image_pixels:,} pixels."
        form = {
            "type": "object",
            "required": ["image"],
            "properties": {"image": {**_BINARY, "description": limit}},
        }
        content: Json = {
            "multipart/form-data": {"schema": form, "encoding": {"image": {"contentType": ", ".join(_PICTURES)}}},
            **{kind: {"schema": {**_BINARY, "contentMediaType": kind, "description": limit}} for kind in _PICTURES},
        }
        return {"required": True, "content": content}
    plain: Json = {"schema": _schema(message)}
    if message != "InferRequest":
        return {"required": False, "content": {"application/json": plain}}
    if _pixels_example(service.everything()):
        plain["examples"] = {"json": {"$ref": "#/components/examples/InferRequest"}}
    shapes = " or ".join(str(list(shape)) for shape in _image_shapes(service.everything()))
    binary = {
        **_BINARY,
        "description": "JSON as in `BinaryInferRequestHead`, then as many bytes as its `binary_data_size` says: "
        f"little-endian, row by row. With `{_HEADER_LENGTH}: 0` there is no JSON, and the body is FP32 of {shapes} "
        "per image.",
        "x-json-part": _schema("BinaryInferRequestHead"),
    }
    return {"required": True, "content": {"application/json": plain, "application/octet-stream": {"schema": binary}}}


def _answer(service: Service, message: str) -> Json:
    if message == "Text":
        return {"content": _TEXT}
    if message == "RepositoryIndex":
        return {"content": {"application/json": {"schema": {"type": "array", "items": _schema("RepositoryEntry")}}}}
    content: Json = {"application/json": {"schema": _schema(message)}}
    if message == "Classification" and (served := service.everything()):
        content["application/json"]["examples"] = {served[0].name: {"value": _classified(served[0])}}
    if message != "InferResponse":
        return {"content": content}
    binary = {
        **_BINARY,
        "description": f"JSON as in `BinaryInferResponseHead`, as long as `{_HEADER_LENGTH}` says, then the bytes of "
        "those outputs that have a `binary_data_size`, in their order.",
        "x-json-part": _schema("BinaryInferResponseHead"),
    }
    header = {"description": "Bytes of the JSON at the beginning of a binary answer.", "schema": {"type": "integer"}}
    return {
        "headers": {_HEADER_LENGTH: header},
        "content": {**content, "application/octet-stream": {"schema": binary}},
    }


def _negative(message: str) -> Json:
    """Return the answer that says no, in the same words as the one that says yes."""
    found = _error(503)
    found["description"] = "It does not, or there are too many connections."
    found["content"]["application/json"] = {"schema": {"anyOf": [_schema(message), _schema("Error")]}}
    return found


def _error(status: int) -> Json:
    found: Json = {
        "description": STATUSES[status],
        "content": {
            "application/json": {"schema": _schema("Error")},
            **(_TEXT if status in _OF_THE_CONNECTION else {}),
        },
    }
    if status in _HEADERS:
        name, kind = _HEADERS[status]
        found["headers"] = {name: {"schema": {"type": kind}}}
    return found


def _schema(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# --- schemas


def _schemas(service: Service) -> Json:
    """Return the schemas of all messages, narrowed to what this server takes and says."""
    messages = [
        each
        for name, each in vars(rest_messages).items()
        if inspect.isclass(each) and each.__module__ == rest_messages.__name__ and not name.startswith("_")
    ]
    _, schemas = msgspec.json.schema_components(messages, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        del schema["title"]
    served = service.everything()
    for name in ("InferParameters", "ClassifyQuery"):
        _narrow_choices(schemas[name]["properties"], served)
    outputs = list(dict.fromkeys(name for each in served for name in each.codec.choices.outputs))
    for name in ("WantedOutput", "Output", "BinaryOutput") if served else ():
        schemas[name]["properties"]["name"]["enum"] = outputs
    for name, binary in (("InferRequest", False), ("BinaryInferRequestHead", True)):
        tensors = [
            _pixels(shape, datatype, service.settings.max_queue, binary)
            for shape in _image_shapes(served)
            for datatype in _PIXELS
        ]
        schemas[name]["properties"]["inputs"]["items"] = {"oneOf": tensors}
    if served:
        modes = sorted({mode for each in served for mode in {each.model.mode, *each.model.modes}})
        schemas["Classification"]["properties"]["mode"]["enum"] = modes
        schemas["ModelMetadata"]["examples"] = [served[0].codec.metadata()]
        schemas["BinaryInferRequestHead"]["examples"] = [_binary_example(served[0])]
        schemas["InferResponse"]["examples"] = [_answer_example(served[0])]
    return schemas


def _narrow_choices(properties: Json, served: list[Served]) -> None:
    """Leave out what requests may not choose, and bound the rest by what there is."""
    if modes := sorted({mode for each in served for mode in each.model.modes}):
        properties["mode"]["enum"] = modes
        properties["draws"]["maximum"] = max([MAX_DRAWS, *(each.model.draws for each in served)])
    else:
        del properties["mode"], properties["draws"]
    if any(each.model.limits is not None for each in served):
        properties["exit"]["maximum"] = max(len(each.model.card.exits) for each in served)
    else:
        del properties["exit"], properties["confidence"]


def _pixels(shape: tuple[int, ...], datatype: str, max_images: int, binary: bool) -> Json:
    """Return the schema of an input: numbers in JSON, or what the JSON says of a raw tensor."""
    number, meaning = _PIXELS[datatype]
    images = {"type": "integer", "minimum": 1, "maximum": max_images}
    rank = 1 + len(shape)
    found: Json = {
        "name": {"const": INPUT},
        "shape": {
            "type": "array",
            "prefixItems": [images, *({"const": length} for length in shape)],
            "minItems": rank,
            "maxItems": rank,
        },
        "datatype": {"const": datatype},
    }
    if binary:
        size = ITEM_BYTES[datatype] * math.prod(shape)
        bounds = {"type": "integer", "minimum": size, "maximum": size * max_images, "multipleOf": size}
        found["parameters"] = _object({"binary_data_size": bounds})
    else:
        nested = number
        for length in reversed(shape):
            nested = _array(nested, length, length)
        flat = _array(number, math.prod(shape), math.prod(shape) * max_images)
        found["data"] = {
            "anyOf": [flat, _array(nested, 1, max_images)],
            "description": f"{meaning}; flat or nested, as many as the shape says.",
        }
    return _object(found)


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Json, least: int, most: int) -> Json:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _image_shapes(served: list[Served]) -> list[tuple[int, ...]]:
    return sorted({each.codec.tensors.image_shape for each in served}) or [(3, 32, 32)]


# --- examples


def _pixels_example(served: list[Served]) -> Json | None:
    """Return a whole request for the default model, unless that would be too long to read."""
    if not served or served[0].codec.tensors.image_items > _MAX_EXAMPLE_NUMBERS:
        return None
    tensors = served[0].codec.tensors
    levels = [place % 256 for place in range(tensors.image_items)]
    tensor = {"name": INPUT, "shape": [1, *tensors.image_shape], "datatype": "UINT8", "data": levels}
    return {"id": "42", "inputs": [tensor], "outputs": [{"name": "probabilities"}]}


def _binary_example(served: Served) -> Json:
    tensors = served.codec.tensors
    size = {"binary_data_size": 4 * tensors.image_items}
    tensor = {"name": INPUT, "shape": [1, *tensors.image_shape], "datatype": "FP32", "parameters": size}
    return {"inputs": [tensor], "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}


def _answer_example(served: Served) -> Json:
    shares = _shares(served)
    output = {"name": "probabilities", "datatype": "FP32", "shape": [1, len(shares)], "data": shares}
    return {"model_name": served.name, "model_version": served.version, "id": "42", "outputs": [output]}


def _classified(served: Served) -> Json:
    shares = dict(zip(served.model.card.classes, _shares(served), strict=True))
    return {
        "model": served.name,
        "mode": served.model.mode,
        "label": next(iter(shares)),
        "probabilities": dict(list(shares.items())[:3]),
    }


def _shares(served: Served) -> list[float]:
    """Return probabilities as they could be: each class half as likely as the one before."""
    weights = [2.0**-place for place in range(len(served.model.card.classes))]
    return [round(weight / sum(weights), 6) for weight in weights]
