"""The OpenAPI 3.1 document of everything that HTTP offers, made from the models that are served.

Names, shapes, classes and what requests may choose are those of this server at this moment; whatever it would refuse
is not in its document. JSON Schema cannot say everything: that `data` has as many numbers as `shape` says, and which
version goes with which model, is in words only.
"""

from typing import Any, Final

from serving.protocol.open_inference import AGREEMENT, EXIT, INPUT, OUTPUTS
from serving.scheduling.service import MAX_DRAWS, Served, Service

Json = dict[str, Any]

_MAX_EXAMPLE_NUMBERS: Final = 4096  # of larger images only the binary form has an example
_MAX_TIMEOUT: Final = 86_400_000_000
_PNG: Final = ("image/png", "image/jpeg", "image/webp")
_DATATYPES: Final = {
    "FP32": ({"type": "number", "minimum": 0, "maximum": 1}, 4, "pixels from 0 to 1"),
    "UINT8": ({"type": "integer", "minimum": 0, "maximum": 255}, 1, "pixels from 0 to 255, divided by 255 here"),
}
_WHAT: Final = {
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
_OF_THE_CONNECTION: Final = (400, 431, 503)
"""What may be answered before a request is understood, in plain text."""
_INTRODUCTION: Final = """\
The [Open Inference Protocol](https://github.com/kserve/open-inference-protocol) (KServe V2) with the
[binary tensor extension](https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md)
and those for the model repository, statistics, configuration and scheduling; `POST /classify` for image files.

Any request may bring `X-Request-Id` (up to 128 letters, digits and `._~-`), which its answer repeats. Bodies are never
compressed. Errors are `{"error": "..."}`; only what cannot be read as HTTP is refused in plain text."""


def document(service: Service) -> Json:
    """Return the document of a server: an object of JSON."""
    settings = service.settings
    served = service.everything()
    bare = _paths(service)
    for path, operations in bare.items():
        for operation in operations.values():
            administration = path.startswith("/v2/repository/models/") and bool(settings.admin_keys_file)
            is_open = path.startswith("/v2/health/")
            _complete(operation, keys=not is_open and (administration or bool(settings.api_keys_file)))
    components: Json = {"schemas": _schemas(served, settings.max_queue), "parameters": _parameters(service)}
    if examples := _examples(service):
        components["examples"] = examples
    components["responses"] = {f"Error{status}": _error(status) for status in _WHAT}
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
        "paths": bare,
        "components": components,
    }


# --- paths


def _paths(service: Service) -> Json:
    paths: Json = {
        "/": {"get": _get("index", "server", "The models and the most used calls.", "Index")},
        "/openapi.json": {"get": _get("openapi", "server", "This document.", "OpenApi")},
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "tags": ["server"],
                "summary": "Counts and times in Prometheus's text format.",
                "responses": {
                    "200": {"description": "The metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
                },
            }
        },
        "/classify": {"post": _classify(service)},
        "/v2": {"get": _get("server_metadata", "server", "The server's name, version and extensions.", "Server")},
        "/v2/health/live": {"get": _get("server_live", "server", "Whether the process answers.", "Live")},
        "/v2/health/ready": {
            "get": _ready(
                _get("server_ready", "server", "Whether all models that should be served take requests.", "Ready"),
                "Ready",
            )
        },
        "/v2/repository/index": {
            "post": {
                **_get("repository_index", "models", "The models there are, and whether they are ready.", "Repository"),
                "requestBody": _optional_body("RepositoryIndexRequest"),
                **_refusals(408, 413, 415),
            }
        },
    }
    for verb, what in (
        ("load", "Load a model, again if it is served already, as the operator configured it."),
        ("unload", "Serve a model no longer, until it is loaded again."),
    ):
        off = "" if service.settings.allow_repository_changes else " Not allowed on this server, so always 403."
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": {
                **_get(f"model_{verb}", "models", what, "Loaded" if verb == "load" else "Nothing"),
                "description": what + off,
                "parameters": [_parameter("KnownModel")],
                "requestBody": _optional_body("LoadRequest" if verb == "load" else "UnloadRequest"),
                **_refusals(403, 404, 408, 413, 415),
            }
        }
    for suffix in ("", "/versions/{version}"):
        prefix = f"/v2/models/{{model}}{suffix}"
        mark = "_of_version" if suffix else ""
        where: Json = {"parameters": [_parameter("Model"), *([_parameter("Version")] if suffix else [])]}
        for path, name, what, schema in (
            ("", "metadata", "The inputs and outputs of a model.", "Model"),
            ("/ready", "ready", "Whether a model takes requests.", "ModelReady"),
            ("/config", "config", "How a model is batched and run.", "ModelConfiguration"),
            ("/stats", "stats", "Counts and times of a model.", "Statistics"),
        ):
            operation = {**_get(f"model_{name}{mark}", "models", what, schema), **where, **_refusals(404)}
            paths[prefix + path] = {"get": _ready(operation, schema) if name == "ready" else operation}
        paths[f"{prefix}/infer"] = {"post": _infer(service, f"model_infer{mark}", where["parameters"])}
    return paths


def _get(operation_id: str, tag: str, summary: str, schema: str) -> Json:
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        "responses": {"200": _answer(summary, schema)},
    }


def _answer(description: str, schema: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": _schema(schema)}}}


def _ready(operation: Json, schema: str) -> Json:
    """Add the answer that says no, in the same words as the one that says yes."""
    operation["responses"]["503"] = {
        "description": "It does not, or there are too many connections.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}}},
        "content": {
            "application/json": {"schema": {"anyOf": [_schema(schema), _schema("Error")]}},
            "text/plain": {"schema": {"type": "string"}},
        },
    }
    return operation


def _refusals(*statuses: int) -> Json:
    """Return a mark with which statuses an operation refuses; see `_complete`."""
    return {"x-refusals": statuses}


def _complete(operation: Json, *, keys: bool) -> None:
    """Add to an operation what it may refuse, and what it needs."""
    statuses = {*operation.pop("x-refusals", ()), *_OF_THE_CONNECTION, *((401, 403) if keys else ())}
    responses = operation["responses"]
    for status in sorted(statuses):
        responses.setdefault(str(status), {"$ref": f"#/components/responses/Error{status}"})
    if keys:
        operation["security"] = [{"bearer": []}, {"apiKey": []}]


def _optional_body(schema: str) -> Json:
    return {"required": False, "content": {"application/json": {"schema": _schema(schema)}}}


def _classify(service: Service) -> Json:
    most = service.settings.max_image_pixels
    what = f"PNG, JPEG or WEBP, up to {most:,} pixels; brought to the model's size by its card's rule."
    binary = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {**binary, "description": what}},
    }
    content: Json = {
        "multipart/form-data": {"schema": form, "encoding": {"image": {"contentType": ", ".join(_PNG)}}},
        **{kind: {"schema": {**binary, "contentMediaType": kind}} for kind in _PNG},
    }
    examples = {f"{served.name}": {"value": _classified(served)} for served in service.everything()[:1]}
    answer = _answer("The classes, the likeliest first.", "Classification")
    if examples:
        answer["content"]["application/json"]["examples"] = examples
    return {
        "operationId": "classify",
        "tags": ["inference"],
        "summary": "Classify an image file.",
        "description": f"{what} `curl -F image=@cat.png http://127.0.0.1:8000/classify`",
        "parameters": [_parameter(name) for name in _parameters(service) if name.startswith("classify_")],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answer},
        **_refusals(404, 408, 413, 415, 429, 500, 504),
    }


def _infer(service: Service, operation_id: str, parameters: list[Json]) -> Json:
    example = {"examples": {"json": {"$ref": "#/components/examples/InferRequest"}}} if _examples(service) else {}
    return {
        "operationId": operation_id,
        "tags": ["inference"],
        "summary": "Probabilities and logits of images.",
        "description": "The body is JSON; or JSON and then the raw tensor, its length told by "
        "`Inference-Header-Content-Length`; or, where that is 0, one raw FP32 tensor and nothing else, which is the "
        "cheapest request there is.",
        "parameters": [*parameters, _parameter("HeaderLength")],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _schema("InferRequest"), **example},
                "application/octet-stream": {"schema": _schema("BinaryInferRequest")},
            },
        },
        "responses": {
            "200": {
                "description": "The answers, in the order of the images: JSON, or JSON and the raw outputs that were "
                "asked for in binary.",
                "headers": {
                    "Inference-Header-Content-Length": {
                        "description": "Bytes of the JSON at the beginning of a binary answer.",
                        "schema": {"type": "integer", "minimum": 1},
                    }
                },
                "content": {
                    "application/json": {"schema": _schema("InferResponse")},
                    "application/octet-stream": {"schema": _schema("BinaryInferResponse")},
                },
            }
        },
        **_refusals(404, 408, 413, 415, 429, 500, 504),
    }


def _error(status: int) -> Json:
    content: Json = {"application/json": {"schema": _schema("Error")}}
    if status in _OF_THE_CONNECTION:
        content["text/plain"] = {"schema": {"type": "string"}}
    answer: Json = {"description": _WHAT[status], "content": content}
    if status in (429, 503):
        answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    if status == 401:
        answer["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return answer


# --- parameters


def _parameters(service: Service) -> Json:
    names = service.names
    versions = sorted({served.version for served in service.everything()})
    model: Json = {
        "type": "string",
        **({"enum": names} if names else {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}),
    }
    first = {"example": names[0]} if names else {}
    version: Json = {"type": "string", **({"enum": versions} if versions else {"pattern": "^[1-9][0-9]{0,17}$"})}
    classes = max((len(served.model.card.classes) for served in service.everything()), default=1)
    whole: Json = {"type": "integer", "minimum": 0}
    hidden = {*(() if _modes(service) else ("mode", "draws"))}
    hidden |= {*(() if _may_choose_exit(service) else ("exit", "confidence"))}
    classify: Json = {
        "model": (model, "Which model; the first one served unless it is named.", first),
        "version": (version, "Which version of it; the latest unless it is named.", {}),
        "top": (
            {"type": "integer", "minimum": 1, "maximum": 999_999_999},
            f"How many classes to tell of, up to {classes}; all unless it is said.",
            {"example": min(3, classes)},
        ),
        "timeout": (
            {**whole, "maximum": _MAX_TIMEOUT},
            "Microseconds after which nobody wants the answer; 0 is none.",
            {},
        ),
        "priority": ({**whole, "maximum": 2}, "0: by the number of images; 2: yields to others.", {}),
        "mode": ({"type": "string", "enum": _modes(service)}, "How to answer; only where the model has it.", {}),
        "draws": (
            {"type": "integer", "minimum": 1, "maximum": _max_draws(service)},
            "Paths whose probabilities are averaged, in mode `random`.",
            {},
        ),
        "exit": (
            {"type": "integer", "minimum": 1, "maximum": _num_exits(service)},
            "Which exit of a multi-exit model answers.",
            {},
        ),
        "confidence": (
            {"type": "string", "pattern": r"^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)(,(0?\.[0-9]*[1-9][0-9]*|1|inf))*$"},
            "The first exit answers whose largest probability reaches this; one number, or one per exit but the last.",
            {},
        ),
    }
    parameters: Json = {
        f"classify_{name}": {"name": name, "in": "query", "description": text, "schema": schema, **more}
        for name, (schema, text, more) in classify.items()
        if name not in hidden
    }
    return parameters | {
        "Model": {
            "name": "model",
            "in": "path",
            "required": True,
            "description": "Its name.",
            "schema": model,
            **first,
        },
        "KnownModel": {
            "name": "model",
            "in": "path",
            "required": True,
            "description": "Its name; also of one that is not loaded.",
            "schema": {"type": "string"},
            **first,
        },
        "Version": {
            "name": "version",
            "in": "path",
            "required": True,
            "description": "Its version; not every model has all of these.",
            "schema": version,
            **({"example": service.find(names[0]).version} if names else {}),
        },
        "HeaderLength": {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of the JSON at the beginning of a binary body; 0 if there is none. Left out, all of "
            "the body is JSON.",
            "schema": whole,
        },
    }


def _modes(service: Service) -> list[str]:
    """Return the modes that requests may choose, of any model."""
    return sorted({mode for served in service.everything() for mode in served.model.modes})


def _may_choose_exit(service: Service) -> bool:
    return any(served.model.limits is not None for served in service.everything())


def _max_draws(service: Service) -> int:
    return max([MAX_DRAWS, *(served.model.draws for served in service.everything())])


def _num_exits(service: Service) -> int:
    return max([1, *(len(served.model.card.exits) for served in service.everything())])


# --- schemas


def _schemas(served: list[Served], max_images: int) -> Json:
    return {
        "Error": _object(
            {"error": {"type": "string", "description": "What was wrong, what was expected, what to do."}}
        ),
        "Nothing": {"type": "object"},
        "Loaded": {
            "type": "object",
            "properties": {
                "gone": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Versions that have gone from the repository, and are served no longer.",
                }
            },
        },
        "OpenApi": {"type": "object", "required": ["openapi", "info", "paths"]},
        "Live": _object({"live": {"type": "boolean"}}),
        "Ready": _object({"ready": {"type": "boolean"}}),
        **_schemas_of_models(served),
        **_schemas_of_inference(served, max_images),
    }


def _schemas_of_models(served: list[Served]) -> Json:
    text: Json = {"type": "string"}
    count: Json = {"type": "integer", "minimum": 0}
    tensor = _object({"name": text, "datatype": text, "shape": _array({"type": "integer", "minimum": -1})})
    configured = _object({"name": text, "data_type": text, "dims": _array({"type": "integer"})})
    duration = _object({"count": count, "ns": count})
    index = _object(
        {
            "name": text,
            "mode": text,
            "modes": _array(text),
            "versions": _array(text),
            "description": text,
            "classes": _array(text),
            "infer": {"type": "string", "description": "The path of its inference."},
        },
        {"exits": {"type": "integer", "description": "How many a multi-exit model has."}},
    )
    state = {"type": "string", "enum": ["READY", "UNAVAILABLE"]}
    times = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    statistics = _object(
        {
            "name": text,
            "version": text,
            "inference_count": count,
            "execution_count": count,
            "inference_stats": _object(dict.fromkeys(times, duration)),
            "batch_stats": {"type": "array"},
        }
    )
    examples = {"examples": [served[0].codec.metadata()]} if served else {}
    return {
        "Index": _object({"name": text, "version": text, "models": _array(index), "endpoints": _array(text)}),
        "Server": _object({"name": text, "version": text, "extensions": _array(text)}),
        "Model": {
            **_object(
                {
                    "name": text,
                    "versions": _array(text),
                    "platform": text,
                    "inputs": _array(tensor),
                    "outputs": _array(tensor),
                },
                {"parameters": {"type": "object", "description": "Mode, precision, provider and the like."}},
            ),
            **examples,
        },
        "ModelReady": _object({"name": text, "ready": {"type": "boolean"}}),
        "ModelConfiguration": _object(
            {
                "name": text,
                "platform": text,
                "backend": text,
                "max_batch_size": count,
                "input": _array(configured),
                "output": _array(configured),
                "dynamic_batching": {"type": "object"},
                "parameters": {"type": "object"},
            }
        ),
        "Statistics": _object({"model_stats": _array(statistics)}),
        "Repository": _array(_object({"name": text, "version": text, "state": state, "reason": text})),
        "RepositoryIndexRequest": _object(
            {}, {"ready": {"type": "boolean", "description": "Only the models that are ready.", "default": False}}
        ),
        "LoadRequest": {"type": "object", "description": "Empty: a model is loaded as the operator configured it."},
        "UnloadRequest": {"type": "object", "description": "Whatever is in it is ignored."},
    }


def _schemas_of_inference(served: list[Served], max_images: int) -> Json:
    shapes = sorted({_image_shape(each) for each in served}) or [(3, 32, 32)]
    outputs = [
        *OUTPUTS,
        *(name for name in (EXIT, AGREEMENT) if any(name in each.codec.outputs for each in served)),
    ]
    parameters: Json = {
        "timeout": {
            "type": "integer",
            "minimum": 0,
            "maximum": _MAX_TIMEOUT,
            "description": "Microseconds; 0 is none.",
        },
        "priority": {"type": "integer", "minimum": 0, "maximum": 2, "description": "2 yields to others."},
        "binary_data_output": {"type": "boolean", "description": "All outputs in binary.", "default": False},
    }
    if modes := sorted({mode for each in served for mode in each.model.modes}):
        most = max([MAX_DRAWS, *(each.model.draws for each in served)])
        parameters["mode"] = {"type": "string", "enum": modes}
        parameters["draws"] = {"type": "integer", "minimum": 1, "maximum": most, "description": "In mode `random`."}
    if any(each.model.limits is not None for each in served):
        number = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        parameters["exit"] = {
            "type": "integer",
            "minimum": 1,
            "maximum": max(len(each.model.card.exits) for each in served),
        }
        parameters["confidence"] = {"anyOf": [number, _array(number)]}
    asked: Json = {
        "id": {"type": "string", "maxLength": 256, "description": "Comes back with the answer."},
        "parameters": {"type": "object", "properties": parameters, "description": "Others are ignored."},
        "outputs": {
            **_array(
                _object(
                    {"name": {"type": "string", "enum": outputs}},
                    {"parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}}},
                )
            ),
            "description": "Which outputs, in which order, each at most once; `probabilities` and `logits` if this is "
            "left out or empty.",
        },
    }
    numbers = [_images(shape, datatype, max_images) for shape in shapes for datatype in _DATATYPES]
    sizes = [_binary_images(shape, datatype, max_images) for shape in shapes for datatype in _DATATYPES]
    schemas: Json = {
        "InferRequest": _object({"inputs": _one_of(numbers)}, asked),
        "BinaryInferRequestHead": _object({"inputs": _one_of(sizes)}, asked),
        "BinaryInferRequest": {
            "type": "string",
            "format": "binary",
            "description": "JSON as in `BinaryInferRequestHead`, then as many bytes as its `binary_data_size` says: "
            "little-endian, row by row. With `Inference-Header-Content-Length: 0` there is no JSON, and the body is "
            f"FP32 of {' or '.join(_shape_text(shape) for shape in shapes)} per image.",
            "x-json-part": _schema("BinaryInferRequestHead"),
        },
        **_answers(served, outputs),
    }
    if served:
        schemas["BinaryInferRequestHead"]["examples"] = [_binary_example(served[0])]
        schemas["InferResponse"]["examples"] = [_answer_example(served[0])]
    return schemas


def _answers(served: list[Served], outputs: list[str]) -> Json:
    """Return the schemas of what comes back from inference and classification."""
    text: Json = {"type": "string"}
    share: Json = {"type": "number", "minimum": 0, "maximum": 1}
    output = {
        "name": {"type": "string", "enum": outputs},
        "datatype": {"type": "string", "enum": ["FP32", "INT64"]},
        "shape": _array({"type": "integer", "minimum": 1}),
    }
    values = {"type": "array", "items": {"type": "number"}, "description": "Flat, row by row."}
    size = _object({"binary_data_size": {"type": "integer", "minimum": 1}})
    heading: Json = {"id": text}
    named: Json = {"model_name": text, "model_version": text}
    modes = sorted({mode for each in served for mode in {each.model.mode, *each.model.modes}})
    return {
        "InferResponse": _object({**named, "outputs": _array(_object({**output, "data": values}))}, heading),
        "BinaryInferResponseHead": _object(
            {**named, "outputs": _array(_object(output, {"data": values, "parameters": size}))}, heading
        ),
        "BinaryInferResponse": {
            "type": "string",
            "format": "binary",
            "description": "JSON as in `BinaryInferResponseHead`, as long as `Inference-Header-Content-Length` says, "
            "then the bytes of those outputs that have a `binary_data_size`, in their order.",
            "x-json-part": _schema("BinaryInferResponseHead"),
        },
        "Classification": _object(
            {
                "model": text,
                "mode": {"type": "string", **({"enum": modes} if modes else {})},
                "label": text,
                "probabilities": {"type": "object", "additionalProperties": share},
            },
            {
                "exit": {"type": "integer", "minimum": 1},
                "agreement": {**share, "description": "The share of draws or members that vote for the label."},
            },
        ),
    }


def _images(shape: tuple[int, ...], datatype: str, max_images: int) -> Json:
    """Return the schema of the input in JSON."""
    number, _, meaning = _DATATYPES[datatype]
    nested = number
    for length in reversed(shape):
        nested = _array(nested, length, length)
    items = _size(shape)
    flat = _array(number, items, items * max_images)
    return _object(
        {
            **_declared(shape, datatype, max_images),
            "data": {
                "anyOf": [flat, _array(nested, 1, max_images)],
                "description": f"{meaning.capitalize()}; flat or nested, as many as the shape says.",
            },
        }
    )


def _binary_images(shape: tuple[int, ...], datatype: str, max_images: int) -> Json:
    """Return the schema of the input in the JSON before a raw tensor."""
    _, item_bytes, _ = _DATATYPES[datatype]
    size = item_bytes * _size(shape)
    bounds = {"type": "integer", "minimum": size, "maximum": size * max_images, "multipleOf": size}
    return _object({**_declared(shape, datatype, max_images), "parameters": _object({"binary_data_size": bounds})})


def _declared(shape: tuple[int, ...], datatype: str, max_images: int) -> Json:
    images = {"type": "integer", "minimum": 1, "maximum": max_images}
    rank = 1 + len(shape)
    return {
        "name": {"const": INPUT},
        "shape": {
            "type": "array",
            "prefixItems": [images, *({"const": length} for length in shape)],
            "minItems": rank,
            "maxItems": rank,
        },
        "datatype": {"const": datatype},
    }


def _object(required: Json, optional: Json | None = None) -> Json:
    found: Json = {"type": "object", "properties": {**required, **(optional or {})}}
    if required:
        found["required"] = list(required)
    return found


def _array(items: Json, least: int | None = None, most: int | None = None) -> Json:
    bounds = {name: value for name, value in (("minItems", least), ("maxItems", most)) if value is not None}
    return {"type": "array", "items": items, **bounds}


def _one_of(schemas: list[Json]) -> Json:
    return _array({"oneOf": schemas}, 1, 1)


def _schema(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameter(name: str) -> Json:
    return {"$ref": f"#/components/parameters/{name}"}


# --- examples


def _image_shape(served: Served) -> tuple[int, ...]:
    format = served.model.card.input
    return (format.channels, format.height, format.width)


def _shape_text(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _size(shape: tuple[int, ...]) -> int:
    channels, height, width = shape
    return channels * height * width


def _numbers_of(served: Served) -> int:
    return _size(_image_shape(served))


def _examples(service: Service) -> Json:
    """Return a whole request for the default model, unless that would be too long to read."""
    served = service.everything()
    if not served or _numbers_of(served[0]) > _MAX_EXAMPLE_NUMBERS:
        return {}
    return {"InferRequest": {"summary": "Pixels as numbers.", "value": _json_example(served[0])}}


def _json_example(served: Served) -> Json:
    levels = [place % 256 for place in range(_numbers_of(served))]
    tensor = {"name": INPUT, "shape": [1, *_image_shape(served)], "datatype": "UINT8", "data": levels}
    return {"id": "42", "inputs": [tensor], "outputs": [{"name": "probabilities"}]}


def _binary_example(served: Served) -> Json:
    size = {"binary_data_size": 4 * _numbers_of(served)}
    tensor = {"name": INPUT, "shape": [1, *_image_shape(served)], "datatype": "FP32", "parameters": size}
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
