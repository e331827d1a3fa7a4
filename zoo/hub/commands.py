"""The commands that make a model from nothing, as its card tells them. The zoo itself knows no recipes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from zoo.bundle.card import Card

LOCAL_PREFIX = "local-dir:"


def commands_of(card: Card) -> tuple[str, ...]:
    """Return the commands that train a model and write its bundle; none where no recipe of this version makes it."""
    recipe, overrides = card.training.recipe, card.training.overrides
    if overrides is None:
        return ()
    seeds = recipe.get("seeds")
    several = seeds if isinstance(seeds, list) and len(seeds) > 1 else [None]  # networks trained apart
    runs, commands = [], []
    for seed in several:
        run = f"runs/{card.name}" + ("" if seed is None else f"-{seed}")
        changes = [text for text in overrides if seed is None or not text.startswith("seed=")]
        changes += [] if seed is None else [f"seed={seed}"]
        words = ["manygates", "train", str(recipe.get("name", "")), "--out", run]
        for text in changes:
            words += ["--set", text]
        runs.append(run)
        commands.append(shlex.join(words))
    commands.append(shlex.join(_last_step(card, runs)))
    if card.int8 is not None and isinstance(recipe.get("derived"), dict):  # `derive` writes no int8 graphs
        commands.append(f"manygates export {LOCAL_PREFIX}models/{card.name} --int8")
    return tuple(commands)


def _last_step(card: Card, runs: Sequence[str]) -> list[str]:
    """Return the words of the command that writes the bundle of trained runs."""
    derived = card.training.recipe.get("derived")
    target = ["--out", f"models/{card.name}", "--name", card.name]
    if not isinstance(derived, dict):
        best = ["--checkpoint", "best"] if "(best checkpoint)" in card.training.summary else []
        return ["manygates", "export", *runs, *target, *best, *(["--int8"] if card.int8 else [])]
    words = ["manygates", "derive", *runs, *target]
    for option, key in (("--path", "paths"), ("--member", "members")):
        for value in derived.get(key) or []:
            words += [option, str(value)]
    words += ["--recalibrate"] if derived.get("recalibrated") else []
    words += ["--finetune", str(derived["finetune_epochs"])] if derived.get("finetune_epochs") else []
    return [*words, "--seed", str(derived["seed"])] if derived.get("seed") else words
