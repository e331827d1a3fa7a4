"""The JSON messages over HTTP, as the OpenAPI document has them.

They are for the document alone: `serving.protocol.open_inference` reads requests itself, pixels a hundred times as
fast. A field that may be left out is `Maybe`; no field is ever null. Where a server narrows a field (names, shapes,
choices), `serving.http.openapi` fills it in. `_Choices` is only what two messages share.
"""

# ruff: noqa: D101 -- a docstring here is a sentence of the document, where one is needed
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from serving.protocol.choices import MAX_PRIORITY, MAX_TIMEOUT
from serving.protocol.open_inference import MAX_ID

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Confidence = Annotated[float, Meta(gt=0, le=1)]
Confidences = Annotated[str, Meta(pattern=r"^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)(,(0?\.[0-9]*[1-9][0-9]*|1|inf))*$")]
Timeout = Annotated[int, Meta(ge=0, le=MAX_TIMEOUT)]
Priority = Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]
Top = Annotated[int, Meta(ge=1, le=999_999_999)]
_T = TypeVar("_T")
Maybe: TypeAlias = _T | UnsetType


def says(text: str) -> Meta:
    """Return the description of a field."""
    return Meta(description=text)


WANTED = says(
    "Which outputs, in which order, each at most once; `probabilities` and `logits` if this is left out or empty."
)
ENOUGH = says(
    "The first exit answers whose largest probability reaches this; one number, or one per exit but the last."
)


class Error(Struct):
    error: Annotated[str, says("What was wrong, what was expected, what to do.")]


# --- the server


class IndexedModel(Struct):
    name: str
    mode: str
    modes: list[str]
    versions: list[str]
    description: str
    classes: list[str]
    infer: Annotated[str, says("The path of its inference.")]
    exits: Maybe[Annotated[int, says("How many a multi-exit model has.")]] = UNSET


class Index(Struct):
    name: str
    version: str
    models: list[IndexedModel]
    endpoints: list[str]


class OpenApi(Struct):
    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]


class ServerMetadata(Struct):
    name: str
    version: str
    extensions: list[str]


class Live(Struct):
    live: bool


class Ready(Struct):
    ready: bool


# --- the models


class Tensor(Struct):
    name: str
    datatype: str
    shape: list[Annotated[int, Meta(ge=-1)]]


class ModelMetadata(Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: Maybe[Annotated[dict[str, Any], says("Mode, precision, provider and the like.")]] = UNSET


class ModelReady(Struct):
    name: str
    ready: bool


class ConfiguredTensor(Struct):
    name: str
    data_type: str
    dims: list[int]


class ModelConfiguration(Struct):
    name: str
    platform: str
    backend: str
    max_batch_size: Count
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: dict[str, Any]
    parameters: dict[str, Any]


class Duration(Struct):
    count: Count
    ns: Count


class InferStatistics(Struct):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(Struct):
    name: str
    version: str
    inference_count: Count
    execution_count: Count
    inference_stats: InferStatistics
    batch_stats: list[Any]


class Statistics(Struct):
    model_stats: list[ModelStatistics]


class RepositoryIndexRequest(Struct):
    ready: Annotated[bool, says("Only the models that are ready.")] = False


class RepositoryEntry(Struct):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class LoadRequest(Struct):
    """Empty: a model is loaded as the operator configured it."""


class Loaded(Struct):
    gone: Maybe[
        Annotated[list[str], says("Versions that have gone from the repository, and are served no longer.")]
    ] = UNSET


class UnloadRequest(Struct):
    """Whatever is in it is ignored."""


class Unloaded(Struct):
    pass


# --- inference


class _Choices(Struct):
    timeout: Maybe[Annotated[Timeout, says("Microseconds after which nobody wants the answer; 0 is none.")]] = UNSET
    priority: Maybe[Annotated[Priority, says("0: by the number of images; 2: yields to others.")]] = UNSET
    mode: Maybe[Annotated[str, says("How to answer; only where the model has it.")]] = UNSET
    draws: Maybe[Annotated[Positive, says("Paths whose probabilities are averaged, in mode `random`.")]] = UNSET
    exit: Maybe[Annotated[Positive, says("Which exit of a multi-exit model answers.")]] = UNSET


class InferParameters(_Choices):
    """Others are ignored."""

    confidence: Maybe[Annotated[Confidence | list[Confidence], ENOUGH]] = UNSET
    binary_data_output: Annotated[bool, says("All outputs in binary.")] = False


class ClassifyQuery(_Choices):
    model: Maybe[Annotated[str, says("Which model; the first one served unless it is named.")]] = UNSET
    version: Maybe[Annotated[str, says("Which version of it; the latest unless it is named.")]] = UNSET
    top: Maybe[Annotated[Top, says("How many classes to tell of; all unless it is said.")]] = UNSET
    confidence: Maybe[Annotated[Confidences, ENOUGH]] = UNSET


class WantedOutputParameters(Struct):
    binary_data: Maybe[bool] = UNSET


class WantedOutput(Struct):
    name: str
    parameters: Maybe[WantedOutputParameters] = UNSET


class BinarySize(Struct):
    binary_data_size: Positive


class InferRequest(Struct, kw_only=True):
    id: Maybe[Annotated[str, Meta(max_length=MAX_ID, description="Comes back with the answer.")]] = UNSET
    parameters: Maybe[InferParameters] = UNSET
    inputs: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=1)]
    outputs: Maybe[Annotated[list[WantedOutput], WANTED]] = UNSET


class BinaryInferRequestHead(InferRequest):
    pass


class Output(Struct):
    name: str
    datatype: Literal["FP32", "INT64"]
    shape: list[Positive]
    data: Annotated[list[float], says("Flat, row by row.")]


class BinaryOutput(Struct):
    name: str
    datatype: Literal["FP32", "INT64"]
    shape: list[Positive]
    data: Maybe[list[float]] = UNSET
    parameters: Maybe[BinarySize] = UNSET


class InferResponse(Struct, kw_only=True):
    model_name: str
    model_version: str
    id: Maybe[str] = UNSET
    outputs: list[Output]


class BinaryInferResponseHead(Struct, kw_only=True):
    model_name: str
    model_version: str
    id: Maybe[str] = UNSET
    outputs: list[BinaryOutput]


class Classification(Struct):
    model: str
    mode: str
    label: str
    probabilities: dict[str, Share]
    exit: Maybe[Positive] = UNSET
    agreement: Maybe[Annotated[Share, says("The share of draws or members that vote for the label.")]] = UNSET
