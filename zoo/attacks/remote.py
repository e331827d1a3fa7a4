"""A deployed server as a model: attacks that need only scores or labels run against it over HTTP.

A server sees 8 bits, so an image is rounded inside the query: the attack searches among the images that can be sent.
Rounding its result afterwards could undo it. The result stays in the ball too if the radius is a whole number of steps
of 1/255:

    remote = RemoteModel("http://127.0.0.1:8000", "eio-resnet20-cifar10")
    images, budget = eight_bit(images, LinfBudget(eps=8 / 255))
    adversarial = to_grid(square(remote, images, labels, budget, queries=500), images, budget.eps)

Attack only servers that you may attack. Servers on other machines need `allow_remote=True`.

The client is that of the standard library: with httpx, queries of one image are a quarter slower.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote, urlsplit

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.budget import LinfBudget
from zoo.attacks.images import check_images
from zoo.errors import BadInput, ManygatesError, UnknownName

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
MOST_RETRIES: Final = 8
"""Attempts after the first for a request that the server is too busy to answer."""
PATIENCE: Final = 60.0
"""Seconds that one request may spend waiting between attempts; the answer's own time comes on top."""
MOST_BYTES: Final = 4 * 2**20
"""Bytes of pixels in one request; the server's own limit is 16 MiB unless it is set otherwise."""

_HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_BUSY: Final = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_FIRST_WAIT: Final = 0.1
_MAX_SHOWN: Final = 300


def eight_bit(images: Tensor, budget: LinfBudget) -> tuple[Tensor, LinfBudget]:
    """Return the images on the 8-bit grid, and the budget with its radius cut down to whole steps of 1/255.

    With such images and such a radius, what an attack tries within the ball is still within it after rounding. So
    `to_grid(result, images, budget.eps)` gives the very images that a `RemoteModel` was asked about.

    Args:
        images: float (batch, channel, height, width) in [0, 1]; what is not of 8-bit origin moves by up to half a step.
        budget: 0.1 is 25.5/255 and becomes 25/255.

    Raises:
        BadInput: a pixel outside [0, 1], or a radius above 0 but below one step.
    """
    steps = math.floor(255 * budget.eps + 1e-6)
    if budget.eps > 0 and not steps:
        raise BadInput(
            f"eps {budget.eps:g} is less than 1/255, so no image of 8 bits is in the ball; take 1/255 or more"
        )
    return (check_images(images) * 255).round() / 255, replace(budget, eps=steps / 255)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request that was answered: what was sent and what came back."""

    levels: Tensor
    """uint8 (batch, channel, height, width): the bytes of the request."""
    scores: Tensor
    """float32 (batch, class): as the attack saw them."""


class RemoteModel:
    """A model behind `manygates serve`: images (batch, channel, height, width) in [0, 1] -> scores (batch, class).

    The scores are the server's `logits`, or the log of its `probabilities` if it has no logits. With `labels_only` they
    are 0 for the class it answers and -1 for the others, which is all that an attack on labels may see. They are on the
    images' device. There is no gradient.

    One connection is kept open; calls must not overlap. It is a context manager. A call after `close` connects again.

    Attributes:
        queries: images that were answered.
        requests: inference requests sent, refused and lost ones included.
        ledger: the answered requests, if it is kept.
        image_shape: what the server takes, (channel, height, width).
        num_classes: how many scores it gives.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        labels_only: bool = False,
        allow_remote: bool = False,
        keep_ledger: bool = False,
        max_images: int = 256,
        timeout: float = 30.0,
    ) -> None:
        """Connect to a server and read what the model takes and gives.

        Args:
            url: `http://HOST:PORT`; `https` works as well.
            name: the model.
            labels_only: hide the scores.
            allow_remote: the host may be another machine. You need its owner's permission.
            keep_ledger: remember what was sent and answered, which takes memory with every query.
            max_images: the most images in one request; large images go in smaller requests. A server that takes fewer
                says so, and then gets fewer.
            timeout: seconds without a sign of life after which the server counts as gone.

        Raises:
            BadInput: no such URL, another machine without `allow_remote`, or a server whose model takes no images.
            UnknownName: the server has no model of this name.
            ManygatesError: the server cannot be reached, or does not speak the Open Inference Protocol.
        """
        if max_images < 1 or not 0 < timeout < math.inf:
            raise BadInput(f"need max_images >= 1 and a finite timeout > 0, got {max_images} and {timeout}")
        self._url = url
        self._open = _connector(url, allow_remote, timeout)
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        self._path = f"/v2/models/{quote(name, safe='')}"
        self._labels_only = labels_only
        self.queries = 0
        self.requests = 0
        self.ledger: list[Exchange] | None = [] if keep_ledger else None
        try:
            self.image_shape, self._output, self.num_classes = self._ask_signature(name)
        except BaseException:  # nobody holds the object yet who could close it
            self.close()
            raise
        self._max_images = min(max_images, max(1, MOST_BYTES // math.prod(self.image_shape)))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores of `images`, rounded to 8 bits.

        Raises:
            BadInput: pixels outside [0, 1], images of another shape, or images that expect a gradient.
            ManygatesError: the server stayed busy, went away, or answered with an error.
        """
        if images.requires_grad and torch.is_grad_enabled():
            raise BadInput("a deployed model has no gradient; attack it by its scores (square) or labels (rays)")
        images = check_images(images)
        if tuple(images.shape[1:]) != self.image_shape:
            raise BadInput(f"the server takes images of shape {self.image_shape}, got {tuple(images.shape[1:])}")
        levels = (images * 255).round().to(device="cpu", dtype=torch.uint8)
        scores = [torch.empty(0, self.num_classes)]
        while len(levels):
            answer = self._scores_of(levels[: self._max_images])
            if answer is None:
                continue
            scores.append(answer)
            levels = levels[len(answer) :]
        return torch.cat(scores).to(images.device)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask_signature(self, name: str) -> tuple[tuple[int, ...], str, int]:
        """Return the shape of an image, the output to ask for and its number of classes."""
        status, _, body = self._exchange("GET", self._path)
        if status == HTTPStatus.NOT_FOUND:
            raise UnknownName(name, self._model_names(), kind=f"model of {self._url}")
        if status != HTTPStatus.OK:
            raise self._failure(status, body)
        try:
            metadata = json.loads(body)
            shapes = {part["name"]: tuple(part["shape"]) for kind in ("inputs", "outputs") for part in metadata[kind]}
        except (ValueError, TypeError, KeyError) as error:
            raise ManygatesError(
                f"{self._url}{self._path} does not describe a model as the Open Inference Protocol does; is this a "
                "server of `manygates serve`?"
            ) from error
        output = "logits" if "logits" in shapes else "probabilities"
        image_shape, row = shapes.get("images", ())[1:], shapes.get(output, ())[1:]
        if (
            len(image_shape) != 3
            or len(row) != 1
            or not all(type(size) is int and size > 0 for size in image_shape + row)
        ):
            raise BadInput(
                f"the model {name!r} of {self._url} has {shapes}, expected images of 4 dimensions and logits or "
                "probabilities of 2; only models of `manygates serve` can be attacked"
            )
        return image_shape, output, row[0]

    def _model_names(self) -> list[str]:
        status, _, body = self._exchange("GET", "/")
        try:
            return [model["name"] for model in json.loads(body)["models"]] if status == HTTPStatus.OK else []
        except (ValueError, TypeError, KeyError):
            return []  # the names only help to find the right one; this is a server of another kind

    def _scores_of(self, levels: Tensor) -> Tensor | None:
        """Ask about images in one request; None if the server wants fewer in one, which is remembered."""
        pixels = levels.contiguous().numpy().tobytes()
        tensor = {
            "name": "images",
            "shape": list(levels.shape),
            "datatype": "UINT8",
            "parameters": {"binary_data_size": len(pixels)},
        }
        output = {"name": self._output, "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [tensor], "outputs": [output]}, separators=(",", ":")).encode()
        status, headers, body = self._exchange("POST", f"{self._path}/infer", head + pixels, len(head))
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and len(levels) > 1:
            self._max_images = len(levels) // 2
            return None
        if status != HTTPStatus.OK:
            raise self._failure(status, body)
        scores = self._visible(self._read_scores(headers, body, len(levels)))
        self.queries += len(levels)
        if self.ledger is not None:
            self.ledger.append(Exchange(levels=levels.clone(), scores=scores.clone()))
        return scores

    def _read_scores(self, headers: http.client.HTTPMessage, body: bytes, rows: int) -> Tensor:
        """Read the one output of an answer, binary or in JSON."""
        try:
            length = int(headers.get(_HEADER_LENGTH, len(body)))
            (output,) = json.loads(body[:length])["outputs"]
            if output["name"] != self._output or output["datatype"] != "FP32":
                raise ValueError("another output")
            values = np.frombuffer(body[length:], "<f4") if length < len(body) else np.array(output["data"], np.float32)
            scores = torch.from_numpy(values.astype(np.float32).reshape(rows, self.num_classes))
        except (ValueError, TypeError, KeyError) as error:
            raise ManygatesError(
                f"{self._url} answered something else than the {self._output} of {rows} images and {self.num_classes} "
                "classes; is this a server of `manygates serve`?"
            ) from error
        if bool(scores.isnan().any()):
            raise ManygatesError(f"{self._url} answered NaN; the model is broken, and no attack can tell what it sees")
        return scores

    def _visible(self, scores: Tensor) -> Tensor:
        """Return what the attack may see of the server's output."""
        if self._labels_only:
            # not one-hot itself, which would pass for probabilities
            return (F.one_hot(scores.argmax(1), self.num_classes) - 1).float()
        if self._output == "probabilities":
            return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        return scores

    def _exchange(
        self, method: str, path: str, body: bytes | None = None, head: int | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send a request until the server is not too busy for it; return status, headers and body.

        Args:
            method: GET or POST.
            path: of the URL.
            body: the JSON, then the bytes of the tensor.
            head: the length of the JSON in bytes.
        """
        waited = 0.0
        for attempt in range(MOST_RETRIES + 1):
            status, headers, content = self._send(method, path, body, head)
            if status not in _BUSY:
                return status, headers, content
            wait = _wait(headers.get("Retry-After"), attempt)
            if attempt == MOST_RETRIES or waited + wait > PATIENCE:
                raise ManygatesError(
                    f"{self._url} is too busy: {status} to {attempt + 1} attempts in {waited:.1f} s, the next one is "
                    f"due after {wait:g} s ({_message(content)}); come back later or send fewer images at a time"
                )
            waited += wait
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _send(
        self, method: str, path: str, body: bytes | None, head: int | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send a request; once more if the server has closed the connection that was kept open."""
        headers = {} if head is None else {_HEADER_LENGTH: str(head), "Content-Type": "application/octet-stream"}
        while True:
            reused = self._connection is not None
            connection = self._connection = self._connection or self._open()
            self.requests += body is not None
            try:
                connection.request(method, path, body=body, headers=headers)
                answer = connection.getresponse()
                content = answer.read()
            except TimeoutError as error:
                self.close()
                raise ManygatesError(
                    f"{self._url} did not answer within {self._timeout:g} s; see whether it is alive, or allow more"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if reused:
                    continue
                raise ManygatesError(
                    f"{self._url} cannot be reached or broke off ({type(error).__name__}: {error}); see whether the "
                    "server runs at this address"
                ) from error
            if answer.will_close:
                self.close()
            return answer.status, answer.headers, content

    def _failure(self, status: int, body: bytes) -> ManygatesError:
        return ManygatesError(f"{self._url} answered {status}: {_message(body)}")


def _connector(url: str, allow_remote: bool, timeout: float) -> Callable[[], http.client.HTTPConnection]:
    """Return a function that opens a connection to the server of `url`.

    Raises:
        BadInput: it is no such URL, or is that of another machine without `allow_remote`.
    """
    kinds: dict[str, type[http.client.HTTPConnection]] = {
        "http": http.client.HTTPConnection,
        "https": http.client.HTTPSConnection,
    }
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadInput(f"{url!r} is no URL ({error}); write http://127.0.0.1:8000") from error
    host = parts.hostname
    if parts.scheme not in kinds or not host or parts.path.strip("/") or parts.query or parts.username is not None:
        raise BadInput(f"{url!r} is not of the form http://HOST:PORT; write http://127.0.0.1:8000")
    if host not in LOCAL_HOSTS and not allow_remote:
        raise BadInput(
            f"{host} is not this machine ({', '.join(LOCAL_HOSTS)}); attack only servers that you are allowed to, and "
            "then say so with allow_remote=True"
        )
    return partial(kinds[parts.scheme], host, port, timeout=timeout)


def _wait(retry_after: str | None, attempt: int) -> float:
    """Return the seconds until the next attempt: what the server asks for, or twice as long each time."""
    if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    return _FIRST_WAIT * 2.0**attempt


def _message(body: bytes) -> str:
    """Return what an error says, in short."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        said = body.decode(errors="replace")
    said = " ".join(str(said).split())
    return said[:_MAX_SHOWN] or "no reason given"
