"""What a request may choose beside its images, in any protocol: how it is answered, by which exit, and how soon."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Plan
from serving.engine.exits import ExitChoice, num_exits, read_confidence
from serving.engine.graphs import AGREEMENT, EXIT, OUTPUTS
from serving.errors import bad_request, shown
from zoo.bundle.card import Card
from zoo.errors import BadInput
from zoo.vocabulary import Mode

MAX_TIMEOUT: Final = 86_400_000_000
"""Microseconds: a day."""
MAX_PRIORITY: Final = 2
_UNSUPPORTED: Final = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size", "classification")

_ONE_PATH: Final = Plan("single")

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


@dataclass(frozen=True)
class Choices:
    """What requests may choose of one model."""

    card: Card
    plan: Plan = _ONE_PATH
    """How a request is answered that chooses nothing."""
    modes: Sequence[Mode] = ()
    """What a request may choose instead; empty where it may not choose."""
    voting: Sequence[Mode] = ()
    """The modes that can tell their agreement; `random` does with more than one draw only."""
    max_draws: int = 1
    may_choose_exit: bool = False
    """Whether a request may say which exit of a multi-exit model is to answer."""

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs that a request may ask for."""
        votes = self._votes(self.plan) or any(mode in self.modes for mode in self.voting)
        return (*OUTPUTS, *([EXIT] if num_exits(self.card) > 1 else []), *([AGREEMENT] if votes else []))

    def asked(self, parameters: Parameters) -> Asked:
        """Return what a request's parameters ask for; 400 if it makes no sense, or requests may not choose it."""
        if not parameters:
            return NOTHING_ASKED
        return Asked(
            plan=self._chosen_plan(parameters.get("mode"), parameters.get("draws")),
            limits=self._exit_limits(parameters),
            timeout=_timeout(parameters.get("timeout")),
            bulk=_priority(parameters.get("priority")) > 1,
        )

    def check_output(self, name: object, asked: Asked) -> str:
        """Return the name of an output that a request may have; 400 for any other."""
        if not isinstance(name, str) or name not in self.outputs:
            raise bad_request(f"unknown output {shown(name)}; {self.card.name} has {', '.join(self.outputs)}")
        plan = asked.plan or self.plan
        if name == AGREEMENT and not self._votes(plan):
            raise bad_request(
                f"the output {name!r} needs several votes, but the request is answered in mode {plan.mode!r} by one; "
                "leave it out"
            )
        return name

    def _votes(self, plan: Plan) -> bool:
        return plan.mode in self.voting and (plan.mode != "random" or plan.draws > 1)

    def _chosen_plan(self, mode: Any, draws: Any) -> Plan | None:
        if mode is None and draws is None:
            return None
        if not self.modes:
            raise bad_request(
                f"the request chooses by {'draws' if mode is None else 'mode'!r}, but here the server chooses how it "
                "answers; leave it out (the operator may allow it with MANYGATES_SERVE_ALLOW_MODE_CHOICE=true)"
            )
        chosen = self.plan.mode if mode is None else mode
        if chosen not in self.modes:
            raise bad_request(f"mode is {shown(mode)}, expected one of {', '.join(self.modes)}")
        if draws is None:
            return self._unless_default(Plan(chosen, self.plan.draws if chosen == self.plan.mode == "random" else 1))
        if chosen != "random":
            raise bad_request(f"draws is {shown(draws)}, but mode {chosen!r} draws no paths; leave it out")
        if type(draws) is not int or not 1 <= draws <= self.max_draws:
            raise bad_request(f"draws is {shown(draws)}, expected a whole number from 1 to {self.max_draws}")
        return self._unless_default(Plan(chosen, draws))

    def _unless_default(self, plan: Plan) -> Plan | None:
        """Return a plan; None for the default, so that such requests share batches with those that choose nothing."""
        return None if plan == self.plan else plan

    def _exit_limits(self, parameters: Parameters) -> NDArray[np.float32] | None:
        """Return the limits, float32 (exit - 1), that `exit` or `confidence` stand for; None without either."""
        given = [name for name in (EXIT, "confidence") if parameters.get(name) is not None]
        if not given:
            return None
        exits = num_exits(self.card)
        if exits == 1:
            raise bad_request(
                f"the request chooses by {given[0]!r}, but {self.card.name} has only one exit; leave it out"
            )
        if not self.may_choose_exit:
            raise bad_request(
                f"the request chooses by {given[0]!r}, but here the server chooses which exit answers; leave it out "
                "(the operator may allow it with MANYGATES_SERVE_ALLOW_EXIT_CHOICE=true)"
            )
        confidence = parameters.get("confidence")
        try:
            if isinstance(confidence, str):
                confidence = read_confidence(confidence)
            return ExitChoice(exit=parameters.get(EXIT), confidence=confidence).limits(self.card.name, exits)
        except BadInput as error:
            raise bad_request(str(error)) from error


def checked_parameters(parameters: Parameters, where: str) -> Parameters:
    """Return the parameters of a request, or of a part of it; 400 for an extension that we do not have."""
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
