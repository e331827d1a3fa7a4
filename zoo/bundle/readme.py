"""The hub's model card: a README generated from the card, so that no number is typed twice."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from zoo.bundle import findings
from zoo.bundle.card import Card, Int8, Result, Table
from zoo.bundle.headline import headline
from zoo.vocabulary import INT8

TAG = "manygates"
"""By which the hub's list of models finds ours."""
_HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "mnist": "ylecun/mnist"}
_GATED_VARIANTS = {
    "single": "one derived path, as a plain network",
    "ensemble": "several derived paths; the mean of their probabilities",
    "gated": "all candidates, the path an input; for random gates",
}
_PLAIN_VARIANTS = {"single": "one network", "ensemble": "several networks; the mean of their probabilities"}
_LIMITS = """## Limits

- Robustness is what the table says, against the attacks named there and within their budgets. A stronger or different
  attack may do better, and nothing here is certified.
- Every number is on {dataset} and, where fewer images than the test set are named, on a sample of it.
- An image of anything else gets one of the names of the classes all the same."""


def model_card(card: Card, source: str | None = None) -> str:
    """Return the README of a bundle: the hub's YAML front matter, the measured results, how to use it, its limits.

    `source` is how a reader names the model in a command, like `hf-hub:ORGANISATION/NAME`; None is its bare name.
    """
    parts = [
        f"---\n{_front_matter(card)}\n---",
        f"# {card.name}\n\n{card.description}",
        *_headline(card),
        _facts(card),
        f"## Measured results\n\n{_lint(card)}",
        *_results(card),
        *([] if card.int8 is None else [_int8(card.int8)]),
        *_usage(card, source or card.name),
        *_training(card),
        _LIMITS.format(dataset=card.dataset),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _front_matter(card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # slow to import, and only those who write a README need it

    dataset = _HUB_DATASETS.get(card.dataset, card.dataset)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=card.dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=_metric_name(result),
            metric_value=result.accuracy,
            metric_args=_terms(result),
        )
        for result in card.results
    ]
    data = ModelCardData(
        license=card.license,
        library_name="manygates",
        pipeline_tag="image-classification",
        tags=[TAG, "adversarial-robustness", "onnx", card.method, card.architecture.name],
        datasets=[dataset],
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    return str(data)


def _terms(result: Result) -> dict[str, Any]:
    """Return what tells this result from others of the model, for programs that read the front matter."""
    said = {name: getattr(result, name) for name in ("variant", "protocol", "attack", "norm")}
    return {**said, "eps": result.eps_fraction, "images": result.images, "interval": list(result.interval)}


def _metric_name(result: Result) -> str:
    if result.attack == "none":
        return f"clean accuracy ({result.variant}, {result.protocol})"
    return f"accuracy under {result.attack}, eps {result.eps_fraction} ({result.variant}, {result.protocol})"


def _headline(card: Card) -> list[str]:
    found = headline(card)
    said = [
        f"{result.accuracy:.2%} {_metric_name(result)} on {result.images:,} images"
        for result in (found.clean, found.robust)
        if result is not None
    ]
    return [f"In short: {'; '.join(said)}."] if said else []


def _facts(card: Card) -> str:
    architecture, images = card.architecture, card.input
    one, total = architecture.single_path_parameters, architecture.parameters
    whole = "path" if architecture.gated_layers else "network"
    rows = [
        ("Method", card.method),
        ("Data set", card.dataset),
        ("Architecture", architecture.name),
        ("Parameters", f"{total:,}" if total == one else f"{total:,} ({one:,} in one {whole})"),
    ]
    if architecture.gated_layers:
        gates, candidates = len(architecture.gated_layers), architecture.candidates
        rows.append(("Gates", f"{gates} layers with {candidates} candidates each: {candidates}^{gates} paths"))
    if card.exits:
        costs = ", ".join(f"{found.macs / 1e6:,.2f}" for found in card.exits)
        rows.append(("Exits", f"{len(card.exits)}, at {costs} million multiply-accumulates"))
    size = f"{images.channels}x{images.height}x{images.width}"
    variants = "; ".join(f"`{variant}` ({_variant(card, variant)})" for variant in card.variants)
    rows += [
        ("Input", f"{size} images with pixels in [{images.range[0]:g}, {images.range[1]:g}]"),
        ("Classes", ", ".join(card.classes)),
        ("Variants", variants or "none exported"),
    ]
    return _table(("", ""), rows)


def _variant(card: Card, variant: str) -> str:
    if card.exits:
        return "the network; its last exit answers"
    return (_GATED_VARIANTS if card.architecture.gated_layers else _PLAIN_VARIANTS)[variant]


def _lint(card: Card) -> str:
    """Say per variant what the robustness linter found."""
    lints = {lint.variant: lint for lint in card.lint}
    said = []
    for variant in (*card.variants, *(f"{variant}{INT8}" for variant in (card.int8.variants if card.int8 else ()))):
        lint = lints.get(variant)
        text = findings.sentence(lint)
        said.append(f"- `{variant}`: " + (f"**{text}**" if lint and lint.alarms else text))
        said += [f"  - {_cell(findings.explained(finding))}" for finding in (lint.alarms if lint else ())]
    return "\n".join(said)


def _results(card: Card) -> list[str]:
    if not card.results:
        return ["None yet. `manygates evaluate` measures this model."]
    heads = ["protocol", "variant", "attack", "eps", "steps x restarts", "images", "seed", "accuracy (95 % interval)"]
    rows = [
        [
            result.protocol,
            result.variant,
            result.attack,
            result.eps_fraction,
            f"{result.steps} x {result.restarts}",
            str(result.images),
            str(result.seed),
            _percent(result.accuracy, result.interval),
            *([_agreement(result)] if card.int8 else []),
            result.date,
        ]
        for result in card.results
    ]
    failed = [
        f"- **Check that did not hold:** {check.name}: {check.detail} ({_metric_name(result)})"
        for result in card.results
        for check in result.checks
        if not check.held
    ]
    notes = [f"- {_metric_name(result)}: {result.note}" for result in card.results if result.note]
    commands = dict.fromkeys(" ".join(result.command.split()) for result in card.results)
    return [
        _table([*heads, *(["same class as float32"] if card.int8 else []), "date"], rows),
        "\n".join([*failed, *notes]),
        "These commands measure it again:",
        "\n".join(f"    {command}" for command in commands),
    ]


def _int8(int8: Int8) -> str:
    """Say which graphs have an int8 twin and how it was made."""
    files = ", ".join(f"`{variant}.int8.onnx`" for variant in int8.variants)
    made = int8.calibration
    return (
        f"## Int8 graphs\n\n{files}: {_cell(made.method)}; calibrated on {made.images:,} training images "
        f"(seed {made.seed}) by {_cell(made.tool)}. Inputs, outputs and paths are those of the float32 graphs. Results "
        f"with a variant that ends in `{INT8}` were measured on them. The same class as float32: how often they give "
        "the class that the float32 weights give, on clean images or on what an attack on the weights made of them."
    )


def _usage(card: Card, source: str) -> list[str]:
    images = card.input
    blocks = [
        "## Use",
        f"Serve it (no torch needed):\n\n    pip install 'manygates[serve]'\n    manygates serve {source}",
        f"Load it in Python:\n\n    import manygates\n    network = manygates.load({source!r})",
        "From another place the name is `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`. The graphs are plain ONNX: "
        f"the input `images` is float32 [batch, {images.channels}, {images.height}, {images.width}], the outputs are "
        "`logits` and `probabilities`; normalisation is inside.",
    ]
    if "gated" in card.variants:
        blocks.append(
            f"`gated.onnx` also takes `gates`, int64 [{len(card.architecture.gated_layers)}]: one candidate per layer."
        )
    if card.exits:
        exits = len(card.exits)
        blocks.append(
            f"Of the {exits} exits the last one answers; `exit_logits`, [batch, {exits}, {len(card.classes)}], are "
            f"those of all. `early_exit.onnx` takes one image and `limits`, float32 [{exits - 1}]: it answers at the "
            "first exit whose largest probability reaches its limit, computes nothing behind it, and says which in "
            "`exit`, from 0."
        )
    return blocks


def _training(card: Card) -> list[str]:
    training = card.training
    versions = ", ".join(f"{name} {version}" for name, version in training.versions.items())
    recipe = json.dumps(dict(training.recipe), indent=2, ensure_ascii=False)
    parts = [
        "## Training",
        f"{training.summary}. Seed {training.seed}, commit `{training.commit}`, {training.date}"
        f"{', with ' + versions if versions else ''}.",
    ]
    if training.logs:
        eps = training.recipe.get("validation_eps")
        radius = f" at eps {eps:.3g}" if isinstance(eps, float) else ""
        parts.append(
            "The log of the run. Held-out accuracy is on training images that were kept apart; robust: on fewer of "
            f"them, after 10 steps of PGD{radius} from the image itself, an easier attack than above."
        )
    parts += map(_log, training.logs)
    return [*parts, "The resolved recipe:", "\n".join(f"    {line}" for line in recipe.splitlines())]


def _log(table: Table) -> str:
    heads = [name.replace("_", " ") for name in (table.row_axis, *table.columns)]
    numbers = (
        ["" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}" for value in values]
        for values in table.values
    )
    return _table(heads, ([row, *values] for row, values in zip(table.rows, numbers, strict=True)))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Keep a value inside its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _percent(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.2%} ({interval[0]:.2%} to {interval[1]:.2%})"


def _agreement(result: Result) -> str:
    return "" if result.agreement is None else _percent(result.agreement.share, result.agreement.interval)
