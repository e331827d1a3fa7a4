"""The JSON messages over HTTP, as the OpenAPI document has them.

They are for the document alone, and imported when it is asked for: `serving.protocol.open_inference` reads requests,
a hundred times as fast on pixels. A field that may be left out has the default None; no field is ever null. Where a
server narrows a field (names, shapes, choices), `serving.http.openapi` fills it in.
"""

# ruff: noqa: D101 -- a docstring here is a sentence of the document, where one is needed
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.protocol.choices import MAX_PRIORITY, MAX_TIMEOUT
from serving.protocol.open_inference import MAX_ID

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(gt=0, le=1)]


class Message(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Error(Message):
    error: str
    """What was wrong, what was expected, what to do."""


# --- the server


class IndexedModel(Message):
    name: str
    mode: str
    modes: list[str]
    versions: list[str]
    description: str
    classes: list[str]
    infer: str
    """The path of its inference."""
    exits: int | None = None
    """How many a multi-exit model has."""


class Index(Message):
    name: str
    version: str
    models: list[IndexedModel]
    endpoints: list[str]


class OpenApi(Message):
    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]


class ServerMetadata(Message):
    name: str
    version: str
    extensions: list[str]


class Live(Message):
    live: bool


class Ready(Message):
    ready: bool


# --- the models


class Tensor(Message):
    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=-1)]]


class ModelMetadata(Message):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, Any] | None = None
    """Mode, precision, provider and the like."""


class ModelReady(Message):
    name: str
    ready: bool


class ConfiguredTensor(Message):
    name: str
    data_type: str
    dims: list[int]


class ModelConfiguration(Message):
    name: str
    platform: str
    backend: str
    max_batch_size: Count
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: dict[str, Any]
    parameters: dict[str, Any]


class Duration(Message):
    count: Count
    ns: Count


class InferStatistics(Message):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(Message):
    name: str
    version: str
    inference_count: Count
    execution_count: Count
    inference_stats: InferStatistics
    batch_stats: list[Any]


class Statistics(Message):
    model_stats: list[ModelStatistics]


class RepositoryIndexRequest(Message):
    ready: bool = False
    """Only the models that are ready."""


class RepositoryEntry(Message):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class LoadRequest(Message):
    """Empty: a model is loaded as the operator configured it."""


class Loaded(Message):
    gone: list[str] | None = None
    """Versions that have gone from the repository, and are served no longer."""


class UnloadRequest(Message):
    """Whatever is in it is ignored."""


class Unloaded(Message):
    pass


# --- inference


class Choices(Message):
    timeout: Annotated[int, Field(ge=0, le=MAX_TIMEOUT)] | None = None
    """Microseconds after which nobody wants the answer; 0 is none."""
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] | None = None
    """0: by the number of images; 2: yields to others."""
    mode: str | None = None
    """How to answer; only where the model has it."""
    draws: Positive | None = None
    """Paths whose probabilities are averaged, in mode `random`."""
    exit: Positive | None = None
    """Which exit of a multi-exit model answers."""


class InferParameters(Choices):
    """Others are ignored."""

    confidence: Confidence | list[Confidence] | None = None
    """The first exit answers whose largest probability reaches this; one number, or one per exit but the last."""
    binary_data_output: bool = False
    """All outputs in binary."""


class ClassifyQuery(Choices):
    model: str | None = None
    """Which model; the first one served unless it is named."""
    version: str | None = None
    """Which version of it; the latest unless it is named."""
    top: Annotated[int, Field(ge=1, le=999_999_999)] | None = None
    """How many classes to tell of; all unless it is said."""
    confidence: (
        Annotated[str, Field(pattern=r"^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)(,(0?\.[0-9]*[1-9][0-9]*|1|inf))*$")] | None
    ) = None
    """The first exit answers whose largest probability reaches this; one number, or one per exit but the last."""


class WantedOutputParameters(Message):
    binary_data: bool | None = None


class WantedOutput(Message):
    name: str
    parameters: WantedOutputParameters | None = None


class BinarySize(Message):
    binary_data_size: Positive


class Asking(Message):
    id: Annotated[str, Field(max_length=MAX_ID)] | None = None
    """Comes back with the answer."""
    parameters: InferParameters | None = None
    outputs: list[WantedOutput] | None = None
    """Which outputs, in which order, each at most once; `probabilities` and `logits` if this is left out or empty."""


class InferRequest(Asking):
    inputs: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]


class BinaryInferRequestHead(Asking):
    inputs: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]


class Output(Message):
    name: str
    datatype: Literal["FP32", "INT64"]
    shape: list[Positive]
    data: list[float]
    """Flat, row by row."""


class BinaryOutput(Output):
    data: list[float] | None = None  # type: ignore[assignment]  # left out where the numbers follow the JSON
    parameters: BinarySize | None = None


class Answered(Message):
    model_name: str
    model_version: str
    id: str | None = None


class InferResponse(Answered):
    outputs: list[Output]


class BinaryInferResponseHead(Answered):
    outputs: list[BinaryOutput]


class Classification(Message):
    model: str
    mode: str
    label: str
    probabilities: dict[str, Share]
    exit: Positive | None = None
    agreement: Share | None = None
    """The share of draws or members that vote for the label."""
