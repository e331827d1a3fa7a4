"""What a training step minimises. One objective is one frozen dataclass in one file and one line here."""

from training.objectives.base import Batch, Objective, Step
from training.objectives.ensemble_in_one import EnsembleInOne
from training.objectives.standard import Standard

# Read by recipes, JSON and the command line; Python code passes the object.
OBJECTIVES: dict[str, type[Objective]] = {
    "standard": Standard,
    "ensemble_in_one": EnsembleInOne,
}

__all__ = ["OBJECTIVES", "Batch", "EnsembleInOne", "Objective", "Standard", "Step"]
