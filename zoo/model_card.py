"""The hub's model card: a README generated from the card, so that no number is typed twice."""

import json
from collections.abc import Iterator

from zoo.card import Card, Check, Result

_HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "mnist": "ylecun/mnist"}
_GATED_VARIANTS = {
    "single": "one derived path, as a plain network",
    "ensemble": "several derived paths; the mean of their probabilities",
    "gated": "all candidates, the path an input; for random gates",
}
_PLAIN_VARIANTS = {"single": "one network", "ensemble": "several networks; the mean of their probabilities"}


def model_card(card: Card) -> str:
    """Return the README of a bundle: the hub's YAML front matter, the measured results, how to use it, its limits."""
    parts = [
        "\n".join(_front_matter(card)),
        f"# {card.name}\n\n{card.description}",
        _facts(card),
        "## Measured results\n\n" + "\n\n".join(filter(None, (_lint(card), _results(card)))),
        _usage(card),
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
    for tag in ("manygates", "adversarial-robustness", "onnx", card.method, card.architecture.name):
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
    yield "---"


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
    for variant in card.variants:
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


def _failed(result: Result) -> list[Check]:
    return [check for check in result.checks if not check.held]


def _usage(card: Card) -> str:
    blocks = [
        "## Use",
        f"Serve it (no torch needed):\n\n    pip install 'manygates[serve]'\n    manygates serve {card.name}",
        f"Load it in Python:\n\n    import manygates\n    network = manygates.load({card.name!r})",
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
    return (
        f"## Training\n\n{training.summary}. Seed {training.seed}, commit `{training.commit}`, {training.date}"
        f"{', with ' + versions if versions else ''}.\n\nThe resolved recipe:\n\n{indented}"
    )


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
