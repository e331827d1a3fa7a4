"""What a request may choose beside its images, in any protocol: how it is answered, by which exit, and how soon."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Plan
from serving.engine.exits import ExitChoice, num_exits, read_confidence
from serving.errors import bad_request
from serving.protocol.shown import shown
from serving.protocol.tensors import AGREEMENT, EXIT, OUTPUTS
from zoo.bundle.card import Card
from zoo.errors import BadInput
from zoo.vocabulary import Mode

MAX_TIMEOUT: Final = 86_400_000_000
"""Microseconds: a day."""
MAX_PRIORITY: Final = 2
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


class Choices:
    """What requests may choose of one model."""

    def __init__(
        self,
        card: Card,
        *,
        plan: Plan | None = None,
        modes: Sequence[Mode] = (),
        voting: Sequence[Mode] = (),
        max_draws: int = 1,
        may_choose_exit: bool = False,
    ) -> None:
        """Prepare for a model; the arguments are those of `Codec`."""
        self._name = card.name
        self._num_exits = num_exits(card)
        self._may_choose_exit = may_choose_exit
        self._plan = plan or Plan("single")
        self._modes = tuple(modes)
        self._voting = tuple(voting)
        self._max_draws = max_draws
        votes = self._votes(self._plan) or any(mode in self._modes for mode in self._voting)
        self.outputs = (*OUTPUTS, *([EXIT] if self._num_exits > 1 else []), *([AGREEMENT] if votes else []))
        """The names of all outputs that a request may ask for."""

    def asked(self, parameters: Parameters) -> Asked:
        """Return what a request's parameters ask for.

        Raises:
            RequestError: 400 if they make no sense, or ask for what requests may not choose.
        """
        if not parameters:
            return NOTHING_ASKED
        return Asked(
            plan=self._chosen_plan(parameters.get("mode"), parameters.get("draws")),
            limits=self._exit_limits(parameters),
            timeout=_timeout(parameters.get("timeout")),
            bulk=_priority(parameters.get("priority")) > 1,
        )

    def check_output(self, name: object, asked: Asked) -> str:
        """Return the name of an output that a request may have.

        Raises:
            RequestError: 400 if the model has none of this name, or not for this request.
        """
        if not isinstance(name, str) or name not in self.outputs:
            raise bad_request(f"unknown output {shown(name)}; {self._name} has {', '.join(self.outputs)}")
        plan = asked.plan or self._plan
        if name == AGREEMENT and not self._votes(plan):
            raise bad_request(
                f"the output {name!r} needs several votes, but the request is answered in mode {plan.mode!r} by one; "
                "leave it out"
            )
        return name

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
            raise bad_request(f"mode is {shown(mode)}, expected one of {', '.join(self._modes)}")
        if draws is None:
            return self._unless_default(Plan(chosen, self._plan.draws if chosen == self._plan.mode == "random" else 1))
        if chosen != "random":
            raise bad_request(f"draws is {shown(draws)}, but mode {chosen!r} draws no paths; leave it out")
        if type(draws) is not int or not 1 <= draws <= self._max_draws:
            raise bad_request(f"draws is {shown(draws)}, expected a whole number from 1 to {self._max_draws}")
        return self._unless_default(Plan(chosen, draws))

    def _unless_default(self, plan: Plan) -> Plan | None:
        """Return a plan; None for the default, so that such requests share batches with those that choose nothing."""
        return None if plan == self._plan else plan

    def _exit_limits(self, parameters: Parameters) -> NDArray[np.float32] | None:
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


def checked_parameters(parameters: Parameters, where: str) -> Parameters:
    """Return the parameters of a request, or of a part of it.

    Raises:
        RequestError: 400 if they ask for an extension that we do not have.
    """
    for name in _UNSUPPORTED:
        if name in parameters:
            raise bad_request(f"{where} has the parameter {name!r}, which this server does not offer; remove it")
    return parameters


def _timeout(value: Any) -> float | None:
    """Read microseconds, as the scheduling policy extension counts; 0 is none."""
    if value is None or value == 0:
        return None
    if type(value) is not int or not 0 < value <= MAX_TIMEOUT:
        raise bad_request(f"timeout is {shown(value)}, expected microseconds, a whole number up to {MAX_TIMEOUT}")
    return value / 1e6


def _priority(value: Any) -> int:
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_PRIORITY:
        raise bad_request(
            f"priority is {shown(value)}, expected 0 (by the number of images), 1 or 2 (yields to others)"
        )
    return value
