"""The words that several rooms share: names of variants, modes, precisions, devices, protocols, attacks and models.

A *variant* is a graph of a bundle; a *mode* is how a server answers. Both have the same names but one: the variant
`gated` serves the mode `random`. `VARIANT_OF_MODE` is the only place that translates.
"""

import re
from typing import Final, Literal, get_args

VERSION: Final = "0.1.0"
"""Of manygates; pyproject.toml and the Dockerfile have the same."""

Variant = Literal["single", "ensemble", "gated"]
"""One derived path or plain network, several averaged, or all candidates with the path as an input."""
Mode = Literal["single", "ensemble", "random"]
Precision = Literal["fp32", "int8"]
Device = Literal["cpu", "cuda"]

VARIANTS: Final[tuple[Variant, ...]] = get_args(Variant)
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
DEVICES: Final[tuple[Device, ...]] = get_args(Device)
VARIANT_OF_MODE: Final[dict[str, Variant]] = {"single": "single", "ensemble": "ensemble", "random": "gated"}

INT8: Final = "-int8"
"""What the variant of a result or a lint ends in if it was measured on the int8 graph: "single-int8"."""
MEASURED_VARIANTS: Final = (*VARIANTS, *(f"{variant}{INT8}" for variant in VARIANTS))

PROTOCOLS: Final = (
    "clean",
    "whitebox",
    "blackbox",
    "transfer-matrix",
    "diversity",
    "autoattack",
    "random-gates",
    "corruptions",
    "exits",
    "queries",
)
"""What `manygates evaluate` measures; `zoo.evaluation.registry` has the code of each."""
ATTACKS: Final = ("fgsm", "pgd", "mi-fgsm", "m-di2-fgsm", "apgd", "apgd-t", "square", "rays")
"""What `manygates attack` runs; `zoo.attacks.registry` has the code of each."""

NAME: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A model's name in full, and a file's name in a bundle."""
NAME_MEANING: Final = "letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit, without '..'"
