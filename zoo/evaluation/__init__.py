"""Protocols: each measures one claim about what is deployed and returns results for the card."""

from zoo.evaluation.registry import PROTOCOLS, evaluate, ledger_of
from zoo.evaluation.request import Request, parse_eps

__all__ = ["PROTOCOLS", "Request", "evaluate", "ledger_of", "parse_eps"]
