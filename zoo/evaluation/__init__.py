"""Protocols: each measures one claim about what is deployed and returns results for the card."""

from zoo.evaluation.protocols import PROTOCOLS, Request, evaluate, parse_eps

__all__ = ["PROTOCOLS", "Request", "evaluate", "parse_eps"]
