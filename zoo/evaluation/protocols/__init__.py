"""Protocols: a module each; `zoo.evaluation.registry` names them."""
