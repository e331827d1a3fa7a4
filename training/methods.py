"""The table of methods, from the registry: what each was published as, what it needs and costs, and its recipes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from training.objectives import OBJECTIVES
from training.recipes import RECIPES

# What costs are stated for: the members of the published ensembles, the exits of the CIFAR-10 networks.
MEMBERS, EXITS = 3, 3


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    title: str
    """What the method minimises, in one sentence."""
    paper: str
    needs: str
    forwards: float
    """Of one network over the batch per step, a backward counted as two: predicted for the method's defaults, three
    members or exits where it needs several."""
    relative: float
    """To standard training of one such network."""
    recipes: tuple[str, ...]
    """Those that end with this method, or with a wrapper around it."""


def methods() -> list[Method]:
    """Return a row per method in the order of the registry."""
    trained: dict[str, list[str]] = {name: [] for name in OBJECTIVES}
    for name, make in RECIPES.items():
        trained[make().method.split("+")[-1].partition("-")[0]].append(name)
    standard = OBJECTIVES["standard"]().forwards()
    found = []
    for name, kind in OBJECTIVES.items():
        objective = kind()
        members = MEMBERS if objective.needs == "several members" else 1
        exits = EXITS if objective.needs == "several exits" else 1
        forwards = objective.forwards(members, exits)
        method = Method(
            name=name,
            title=(kind.__doc__ or "").strip().splitlines()[0].rstrip("."),
            paper=objective.published,
            needs=objective.needs,
            forwards=round(forwards, 1),
            relative=round(forwards / standard, 1),
            recipes=tuple(trained[name]),
        )
        found.append(method)
    return found


def markdown_table(rows: Iterable[Method]) -> str:
    """Return the rows as the Markdown table of docs/methods/README.md."""
    lines = ["| method | paper | needs | forward passes | x standard | train it |", "|---|---|---|---|---|---|"]
    for row in rows:
        commands = "<br>".join(f"`manygates train {recipe} --out RUN`" for recipe in row.recipes) or "--"
        cells = (f"[`{row.name}`]({row.name}.md)", row.paper, row.needs, f"{row.forwards:g}", f"{row.relative:g}")
        lines.append("| " + " | ".join((*cells, commands)) + " |")
    return "\n".join(lines) + "\n"
