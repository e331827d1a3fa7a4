"""What a training step minimises. One objective is one frozen dataclass in one file and one line here."""

from training.objectives.adp import Adp
from training.objectives.attack import TrainingAttack
from training.objectives.awp import Awp
from training.objectives.base import Batch, Memory, Objective, Step
from training.objectives.dropen import Dropen
from training.objectives.dverge import Dverge
from training.objectives.ensemble_in_one import EnsembleInOne
from training.objectives.ews import Ews
from training.objectives.fast_at import FastAt
from training.objectives.free_at import FreeAt
from training.objectives.gal import Gal
from training.objectives.multi_exit import MultiExit
from training.objectives.neo_kd import NeoKd
from training.objectives.pgd_at import PgdAt
from training.objectives.standard import Standard
from training.objectives.trades import Trades
from training.objectives.trs import Trs

# Read by recipes, JSON and the command line; Python code passes the object.
OBJECTIVES: dict[str, type[Objective]] = {
    kind.method: kind
    for kind in (
        Standard,
        PgdAt,
        FastAt,
        FreeAt,
        Trades,
        Awp,
        Ews,
        EnsembleInOne,
        Adp,
        Gal,
        Dverge,
        Trs,
        Dropen,
        MultiExit,
        NeoKd,
    )
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
