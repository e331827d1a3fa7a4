"""What a training step minimises. One objective is one frozen dataclass, named once here."""

from training.objectives.adversarial import Awp, FastAt, FreeAt, PgdAt, Trades, TrainingAttack
from training.objectives.base import Batch, Memory, Objective, Step
from training.objectives.distilled import Dverge, EnsembleInOne
from training.objectives.ews import Ews
from training.objectives.exits import MultiExit, NeoKd
from training.objectives.members import Adp, Dropen, Gal, Trs
from training.objectives.single import Standard

OF_ONE_NETWORK = (Standard, PgdAt, FastAt, FreeAt, Trades, Awp, Ews)
OF_SEVERAL_NETWORKS = (EnsembleInOne, Adp, Gal, Dverge, Trs, Dropen)
OF_SEVERAL_EXITS = (MultiExit, NeoKd)

# Read by recipes, JSON and the command line; Python code passes the object.
OBJECTIVES: dict[str, type[Objective]] = {
    kind.method: kind for kind in (*OF_ONE_NETWORK, *OF_SEVERAL_NETWORKS, *OF_SEVERAL_EXITS)
}

__all__ = [
    "OBJECTIVES",
    "Adp",
    "Awp",
    "Batch",
    "Dropen",
    "Dverge",
    "EnsembleInOne",
    "Ews",
    "FastAt",
    "FreeAt",
    "Gal",
    "Memory",
    "MultiExit",
    "NeoKd",
    "Objective",
    "PgdAt",
    "Standard",
    "Step",
    "Trades",
    "TrainingAttack",
    "Trs",
]
