"""The hub's model card: a README generated from the card, so that no number is typed twice."""

import json
from collections.abc import Iterator
from typing import Any

from zoo.bundle.card import INT8, Card, Check, Int8, Result, Table

TAG = "manygates"
"""By which the hub's list of models finds ours."""
_HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "mnist": "ylecun/mnist"}
_GATED_VARIANTS = {
    "single": "one derived path, as a plain network",
    "ensemble": "several derived paths; the mean of their probabilities",
    "gated": "all candidates, the path an input; for random gates",
}
_PLAIN_VARIANTS = {"single": "one network", "ensemble": "several networks; the mean of their probabilities"}


def model_card(card: Card, source: str | None = None) -> str:
    """Return the README of a bundle: the hub's YAML front matter, the measured results, how to use it, its limits.

    Args:
        card: of the bundle.
        source: how a reader names the model in a command, like `hf-hub:ORGANISATION/NAME`; its bare name by default.
    """
    parts = [
        "\n".join(_front_matter(card)),
        f"# {card.name}\n\n{card.description}",
        _facts(card),
        "## Measured results\n\n" + "\n\n".join(filter(None, (_lint(card), _results(card)))),
        *([] if card.int8 is None else [_int8(card, card.int8)]),
        _usage(card, source or card.name),
        _training(card),
        _limits(card),
    ]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """Quote for YAML; a JSON string is one."""
    return json.dumps(text, ensure_ascii=False)


def _front_matter(card: Card) -> Iterator[str]:
    dataset = _HUB_DATASETS.get(card.dataset, card.dataset)
    yield "---"
    yield f"license: {_quoted(card.license)}"
    yield "library_name: manygates"
    yield "pipeline_tag: image-classification"
    yield "tags:"
    for tag in (TAG, "adversarial-robustness", "onnx", card.method, card.architecture.name):
        yield f"- {_quoted(tag)}"
    yield "datasets:"
    yield f"- {_quoted(dataset)}"
    if card.results:
        yield "model-index:"
        yield f"- name: {_quoted(card.name)}"
        yield "  results:"
        for result in card.results:
            yield "  - task:"
            yield "      type: image-classification"
            yield "    dataset:"
            yield f"      name: {_quoted(card.dataset)}"
            yield f"      type: {_quoted(dataset)}"
            yield "      split: test"
            yield "    metrics:"
            yield "    - type: accuracy"
            yield f"      name: {_quoted(_metric_name(result))}"
            yield f"      value: {result.accuracy}"
            yield f"      args: {json.dumps(_terms(result))}"
    yield "---"


def _terms(result: Result) -> dict[str, Any]:
    """Return what tells this result from others of the model, for programs that read the front matter."""
    return {
        "variant": result.variant,
        "protocol": result.protocol,
        "attack": result.attack,
        "norm": result.norm,
        "eps": result.eps_fraction,
        "images": result.images,
        "interval": list(result.interval),
    }


def _metric_name(result: Result) -> str:
    if result.attack == "none":
        return f"clean accuracy ({result.variant}, {result.protocol})"
    return f"accuracy under {result.attack}, eps {result.eps_fraction} ({result.variant}, {result.protocol})"


def _facts(card: Card) -> str:
    architecture, images = card.architecture, card.input
    size = f"{images.channels}x{images.height}x{images.width}"
    rows = [
        ("Method", card.method),
        ("Data set", card.dataset),
        ("Architecture", architecture.name),
        ("Parameters", _parameters(card)),
    ]
    if architecture.gated_layers:
        gates, candidates = len(architecture.gated_layers), architecture.candidates
        rows.append(("Gates", f"{gates} layers with {candidates} candidates each: {candidates}^{gates} paths"))
    if card.exits:
        costs = ", ".join(f"{found.macs / 1e6:,.2f}" for found in card.exits)
        rows.append(("Exits", f"{len(card.exits)}, at {costs} million multiply-accumulates"))
    rows += [
        ("Input", f"{size} images with pixels in [{images.range[0]:g}, {images.range[1]:g}]"),
        ("Classes", ", ".join(card.classes)),
        (
            "Variants",
            "; ".join(f"`{variant}` ({_variant(card, variant)})" for variant in card.variants) or "none exported",
        ),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)


def _parameters(card: Card) -> str:
    total, one = card.architecture.parameters, card.architecture.single_path_parameters
    if card.architecture.gated_layers:
        return f"{total:,} ({one:,} in one path)"
    return f"{total:,}" if total == one else f"{total:,} ({one:,} in one network)"


def _variant(card: Card, variant: str) -> str:
    if card.exits:
        return "the network; its last exit answers"
    return (_GATED_VARIANTS if card.architecture.gated_layers else _PLAIN_VARIANTS)[variant]


def _results(card: Card) -> str:
    if not card.results:
        return "None yet. `manygates evaluate` measures this model."
    lines = [
        "| protocol | variant | attack | eps | steps x restarts | images | seed | accuracy (95 % interval) | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in card.results:
        low, high = result.interval
        cells = (
            result.protocol,
            result.variant,
            result.attack,
            result.eps_fraction,
            f"{result.steps} x {result.restarts}",
            str(result.images),
            str(result.seed),
            f"{result.accuracy:.2%} ({low:.2%} to {high:.2%})",
            result.date,
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    for result in card.results:
        lines += [f"\n{_metric_name(result)}:", f"\n    {' '.join(result.command.split())}"]
        if result.note:
            lines.append(f"\n{result.note}")
        lines += [f"\n- **Check that did not hold:** {check.name}: {check.detail}" for check in _failed(result)]
    return "\n".join(lines)


def _lint(card: Card) -> str:
    """Say per variant what the robustness linter found."""
    said = []
    rounded = () if card.int8 is None else card.int8.variants
    for variant in (*card.variants, *(f"{variant}{INT8}" for variant in rounded)):
        lint = next((lint for lint in card.lint if lint.variant == variant), None)
        if lint is None:
            said.append(f"- `{variant}`: the robustness linter has not looked at it")
        elif not lint.alarms:
            asked = sum(finding.verdict != "skipped" for finding in lint.findings)
            said.append(
                f"- `{variant}`: passed the robustness linter ({asked} checks on {lint.images} images, {lint.date})"
            )
        else:
            said.append(f"- `{variant}`: **failed the robustness linter; its numbers may flatter it**")
            said += [
                f"  - {finding.code} {_cell(finding.name)}: {_cell(finding.figure)}. {_cell(finding.meaning)}"
                for finding in lint.alarms
            ]
    return "\n".join(said)


def _int8(card: Card, int8: Int8) -> str:
    """Say which graphs have an int8 twin, how it was made, and how often it agrees with the weights."""
    files = ", ".join(f"`{variant}.int8.onnx`" for variant in int8.variants)
    made = int8.calibration
    parts = [
        "## Int8 graphs",
        f"{files}: {_cell(made.method)}; calibrated on {made.images:,} training images (seed {made.seed}) by "
        f"{_cell(made.tool)}. Inputs, outputs and paths are those of the float32 graphs. Results with a variant that "
        f"ends in `{INT8}` were measured on them.",
    ]
    if not int8.agreement:
        return "\n\n".join([*parts, "How often they agree with the weights was not measured yet."])
    lines = [
        "How often a graph gives the class that the float32 weights give, on clean images and on what an attack on the "
        "weights made of them:\n",
        "| variant | attack on the weights | eps | images | seed | same class (95 % interval) | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in int8.agreement:
        low, high = entry.interval
        cells = (
            entry.variant,
            entry.attack,
            entry.eps_fraction,
            str(entry.images),
            str(entry.seed),
            f"{entry.share:.2%} ({low:.2%} to {high:.2%})",
            entry.date,
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    commands = dict.fromkeys(" ".join(entry.command.split()) for entry in int8.agreement)
    return "\n\n".join([*parts, "\n".join(lines), *(f"    {command}" for command in commands)])


def _failed(result: Result) -> list[Check]:
    return [check for check in result.checks if not check.held]


def _usage(card: Card, source: str) -> str:
    blocks = [
        "## Use",
        f"Serve it (no torch needed):\n\n    pip install 'manygates[serve]'\n    manygates serve {source}",
        f"Load it in Python:\n\n    import manygates\n    network = manygates.load({source!r})",
        "From another place the name is `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`. The graphs are plain ONNX: "
        f"the input `images` is float32 [batch, {card.input.channels}, {card.input.height}, {card.input.width}], "
        "the outputs are `logits` and `probabilities`; normalisation is inside.",
    ]
    if "gated" in card.variants:
        blocks.append(
            f"`gated.onnx` also takes `gates`, int64 [{len(card.architecture.gated_layers)}]: one candidate per layer."
        )
    if card.exits:
        blocks.append(
            f"Of the {len(card.exits)} exits the last one answers; `exit_logits`, [batch, {len(card.exits)}, "
            f"{len(card.classes)}], are those of all. `early_exit.onnx` takes one image and `limits`, float32 "
            f"[{len(card.exits) - 1}]: it answers at the first exit whose largest probability reaches its limit, "
            "computes nothing behind it, and says which in `exit`, from 0."
        )
    return "\n\n".join(blocks)


def _training(card: Card) -> str:
    training = card.training
    versions = ", ".join(f"{name} {version}" for name, version in training.versions.items())
    recipe = json.dumps(dict(training.recipe), indent=2, ensure_ascii=False)
    indented = "\n".join(f"    {line}" for line in recipe.splitlines())
    logs = "".join(f"\n\n{_log(table)}" for table in training.logs)
    if logs:
        eps = training.recipe.get("validation_eps", 0.01)  # a recipe without it is of a time when it was fixed
        radius = f"{eps:.3g}" if isinstance(eps, float) else "of the recipe"
        logs = (
            "\n\nThe log of the run. Held-out accuracy is on training images that were kept apart; robust: on fewer of "
            f"them, after 10 steps of PGD at eps {radius} from the image itself, an easier attack than above.{logs}"
        )
    return (
        f"## Training\n\n{training.summary}. Seed {training.seed}, commit `{training.commit}`, {training.date}"
        f"{', with ' + versions if versions else ''}.{logs}\n\nThe resolved recipe:\n\n{indented}"
    )


def _log(table: Table) -> str:
    lines = [
        "| " + " | ".join(_cell(name.replace("_", " ")) for name in (table.row_axis, *table.columns)) + " |",
        "|" + "---|" * (1 + len(table.columns)),
    ]
    for row, values in zip(table.rows, table.values, strict=True):
        cells = ("" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}" for value in values)
        lines.append("| " + " | ".join((_cell(row), *cells)) + " |")
    return "\n".join(lines)


def _limits(card: Card) -> str:
    return (
        "## Limits\n\n"
        "- Robustness is what the table says, against the attacks named there and within their budgets; a stronger or "
        "different attack may do better, and nothing here is certified.\n"
        f"- Every number is on {card.dataset} and, where fewer images than the test set are named, on a sample of it.\n"
        "- Images of anything else than the classes above get one of their names all the same."
    )


def _cell(text: str) -> str:
    """Keep a value inside its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
