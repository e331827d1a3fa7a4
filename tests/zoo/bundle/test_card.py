import json
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from zoo.bundle.card import Agreement, Card, Paths, check_file_name
from zoo.errors import BadInput, BundleError

GOLDEN = (Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8")


def changed(path: str, value: Any) -> str:
    """Return the golden card with the entry at a dotted path set, or removed if the value is Ellipsis."""
    document = json.loads(GOLDEN)
    *folders, name = path.split(".")
    holder = document
    for folder in folders:
        holder = holder[int(folder)] if folder.isdigit() else holder[folder]
    if value is ...:
        del holder[name]
    elif isinstance(holder, list):
        holder[int(name)] = value
    else:
        holder[name] = value
    return json.dumps(document)


def refusal(text: str) -> str:
    """Return what is said of a text that is no card."""
    with pytest.raises(BundleError) as refused:
        Card.from_json(text)
    return str(refused.value)


def named(path: str) -> str:
    """Return a dotted path as a message names it: "results.0.eps" is results[0].eps."""
    return re.sub(r"\.(\d+)", r"[\1]", path)


def test_a_card_is_written_back_byte_for_byte() -> None:
    assert Card.from_json(GOLDEN).to_json() == GOLDEN


def test_a_card_that_was_read_equals_the_one_that_was_written() -> None:
    card = Card.from_json(GOLDEN)
    assert Card.from_json(card.to_json()) == card
    assert card.architecture.gated_layers == ("conv1", "layer1.0.conv1", "layer1.0.conv2")
    assert card.results[1].checks[1].held is False
    assert card.input.range == (0.0, 1.0)


def test_whole_numbers_are_accepted_where_fractions_are_meant_and_written_alike() -> None:
    assert Card.from_json(changed("results.0.eps", 0)).to_json() == GOLDEN


def test_a_plain_network_has_no_gates_and_no_paths() -> None:
    document = json.loads(GOLDEN)
    document["architecture"].update(gated_layers=[], candidates=1, sharing=None)
    document.update(paths={"single": None, "ensemble": []}, variants=["single"])
    card = Card.from_json(json.dumps(document))
    assert card.paths.single is None
    assert card.architecture.sharing is None


def test_a_card_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Card.from_json(GOLDEN).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("schema", "advice"), [(5, "export the bundle again"), (7, "pip install --upgrade manygates")])
def test_a_card_of_another_schema_is_refused_with_what_to_do(schema: int, advice: str) -> None:
    with pytest.raises(BundleError, match=f"schema {schema}, this version reads 6.*{advice}"):
        Card.from_json(json.dumps({"schema": schema, "keys": "of another time"}))


def early(*costs: int, **changes: Any) -> str:
    """Return the golden card as one of a plain network with exits of these costs."""
    document = json.loads(GOLDEN)
    document["architecture"].update(gated_layers=[], candidates=1, sharing=None)
    document.update(paths={"single": None, "ensemble": []}, variants=["single"], lint=[])
    document.update(exits=[{"macs": cost} for cost in costs], **changes)
    return json.dumps(document)


def test_the_exits_of_a_card_come_back_with_their_costs() -> None:
    card = Card.from_json(early(10, 25, 25))
    assert [found.macs for found in card.exits] == [10, 25, 25]
    assert json.loads(card.to_json())["exits"] == [{"macs": 10}, {"macs": 25}, {"macs": 25}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (early(10), "exits is [10], expected none, or at least two"),
        (early(10, 0), "exits[1].macs is 0"),
        (early(20, 10), "exits.macs is [20, 10], expected costs that grow from exit to exit"),
        (early(10, 20, variants=["single", "ensemble"]), "variants is 'ensemble', expected only 'single'"),
        (changed("exits", [{"macs": 1}, {"macs": 2}]), "exits is [1, 2], expected none, because layers are gated"),
        (changed("exits", [{"macs": 1, "name": "first"}, {"macs": 2}]), "exits is [1, 2]"),
        (early(10, 20).replace('"macs": 20', '"macs": 20, "name": "last"'), "unknown key 'exits[1].name' = 'last'"),
        (changed("exits", [{"macs": 1.5}]), "exits[0].macs is 1.5, expected an integer"),
    ],
)
def test_exits_that_make_no_sense_are_refused_with_the_reason(text: str, said: str) -> None:
    assert said in refusal(text)


def test_a_model_is_suspect_where_the_linter_raised_an_alarm() -> None:
    assert Card.from_json(GOLDEN).suspect == ("single",)
    assert Card.from_json(changed("lint.0.findings.1.verdict", "ok")).suspect == ()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("int8.variants", [], "int8.variants is []"),
        (
            "int8.variants",
            ["single", "double"],
            "int8.variants[1] is 'double', expected one of single, ensemble, gated",
        ),
        ("int8.variants", ["single", "single"], "int8.variants is ['single', 'single'], expected no name twice"),
        ("variants", ["ensemble", "gated"], "int8.variants is 'single', expected one of ensemble, gated"),
        ("int8.calibration.images", 0, "int8.calibration.images is 0"),
        (
            "results.0.variant",
            "gated-int8",
            "results[0].variant is 'gated-int8', expected one of the variants that int8",
        ),
        (
            "lint.0.variant",
            "ensemble-int8",
            "lint[0].variant is 'ensemble-int8', expected one of the variants that int8",
        ),
        ("lint.0.variant", "single-int4", "lint[0].variant is 'single-int4', expected one of single, ensemble, gated"),
    ],
)
def test_what_a_card_says_of_int8_graphs_must_fit_together(path: str, value: Any, said: str) -> None:
    assert said in refusal(changed(path, value))


def agreeing(share: float, interval: list[float], variant: str = "single-int8") -> str:
    """Return the golden card with an agreement in its first result."""
    document = json.loads(changed("results.0.agreement", {"share": share, "interval": interval}))
    document["results"][0]["variant"] = variant
    return json.dumps(document)


def test_a_result_of_an_int8_graph_says_how_often_it_agrees_with_the_weights() -> None:
    agreement = Card.from_json(agreeing(0.95, [0.9, 1])).results[0].agreement
    assert agreement == Agreement(share=0.95, interval=(0.9, 1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (agreeing(95.0, [0.9, 1]), "results[0].agreement.share is 95.0"),
        (agreeing(0.95, [0.96, 0.97]), "results[0].agreement.interval is (0.96, 0.97), expected [low, high] around"),
        (agreeing(0.95, [0.9, 1.1]), "results[0].agreement.interval[1] is 1.1"),
        (agreeing(0.95, [0.9, 1], "single"), "expected null for the variant 'single', which is no int8 graph"),
    ],
)
def test_an_agreement_that_makes_no_sense_is_refused(text: str, said: str) -> None:
    assert said in refusal(text)


def test_a_result_of_an_int8_graph_has_a_variant_of_its_own() -> None:
    card = Card.from_json(changed("results.0.variant", "single-int8"))
    assert card.results[0].variant == "single-int8"


@pytest.mark.parametrize(
    "path", ["exits", "name", "training.seed", "results.1.checks.0.held", "results.0.norm", "input.width", "schema"]
)
def test_a_missing_key_is_named_even_where_a_card_made_in_python_may_leave_it_out(path: str) -> None:
    assert f"lacks the key {named(path)!r}" in refusal(changed(path, ...))


def test_a_missing_key_of_a_file_is_named() -> None:
    entries = {"a.onnx": {"sha256": "0" * 64, "size": 1}, "b.onnx": {"size": 1}, "c.onnx": {"sha256": "A", "size": 1}}
    assert "lacks the key 'files.b.onnx.sha256'" in refusal(changed("files", entries))


@pytest.mark.parametrize("path", ["extra", "architecture.depth", "results.1.checks.0.extra"])
def test_an_unknown_key_is_named_with_its_value(path: str) -> None:
    assert f"the unknown key {named(path)!r} = 20, expected only" in refusal(changed(path, 20))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("schema", "1", "an integer"),
        ("name", 7, "a string"),
        ("training.seed", True, "an integer"),
        ("training.seed", 0.5, "an integer"),
        ("results.0.accuracy", "80%", "a number"),
        ("results.1.checks.0.held", 1, "true or false"),
        ("results.0.accuracy", False, "a number"),
        ("results.0.agreement", 1, "an object or null"),
        ("classes", "cat", "an array"),
        ("input", [], "an object"),
        ("training.versions", [], "an object"),
        ("training.versions.torch", 2, "a string"),
        ("architecture.sharing", 3, "a string or null"),
        ("input.range", [0.0], "an array of length 2"),
        ("name", "../evil", "letters, digits"),
        ("name", "a..b", "letters, digits"),
        ("name", "", "letters, digits"),
        ("name", "new\n", "letters, digits"),
        ("method", "", "a string of length >= 1"),
        ("classes", ["cat"], "an array of length >= 2"),
        ("classes", ["cat", "cat"], "no name twice"),
        ("architecture.candidates", 0, "an integer >= 1"),
        ("architecture.candidates", 2**40, "an integer <= 1024"),
        ("architecture.sharing", None, "null exactly when gated_layers is empty"),
        ("architecture.sharing", "some", "one of independent, shared_conv"),
        ("architecture.parameters", 0, "an integer >= 1"),
        ("input.height", 0, "an integer >= 1"),
        ("input.resize", "magic", "one of nearest, bilinear, bicubic, lanczos"),
        ("paths.single", None, "the path of the variant 'single'"),
        ("paths.ensemble", [], "the paths of the variant 'ensemble'"),
        ("variants.0", "double", "one of single, ensemble, gated"),
        ("training.date", "21.11.2026", "a date"),
        ("results.0.accuracy", 80.0, "a number <= 1"),
        ("results.0.norm", "l1", "one of linf, l2"),
        ("results.0.images", 0, "an integer >= 1"),
        ("results.0.steps", -1, "an integer >= 0"),
        ("results.1.eps_fraction", "1/0", "the fraction that eps"),
        ("results.1.eps_fraction", "eight", "the fraction that eps"),
        ("results.1.eps_fraction", "1e300000000", "the fraction that eps"),
        ("results.1.eps", -0.1, "a number >= 0"),
        ("lint.0.findings.0.verdict", "fine", "one of ok, alarm, skipped"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_key_value_and_expectation(path: str, value: Any, expected: str) -> None:
    assert f"{named(path)} is {value!r}, expected {expected}" in refusal(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("input.range", [1.0, 0.0], "input.range is (1.0, 0.0), expected [low, high] with low < high"),
        ("input.mean", [0.5], "input.mean is (0.5,), expected 3 values, one per channel"),
        ("input.std", [0.2, 0.0, 0.2], "input.std is (0.2, 0.0, 0.2), expected positive values"),
        ("architecture.gated_layers", ["a", "a", "b"], "gated_layers is ['a', 'a', 'b'], expected no name twice"),
        ("paths.single", "0110", "paths.single: path '0110' has 4 gates, expected 3"),
        ("paths.single", "012", "paths.single: gate 2 at position 2"),
        ("paths.single", "0x1", "paths.single: path '0x1' is not a row of gates"),
        ("paths.ensemble.1", "11", "paths.ensemble[1]: path '11' has 2 gates"),
        ("variants", ["single", "single"], "variants is ['single', 'single'], expected no name twice"),
        ("results.0.interval", [0.81, 0.82], "results[0].interval is (0.81, 0.82), expected [low, high] around"),
        ("results.1.eps", 8.0, "results[1].eps_fraction is '8/255', expected the fraction that eps 8.0 is"),
        ("results.1.eps_fraction", "9" * 5000, "the fraction that eps"),
        ("results.1.eps", 10**400, "an integer of 401 digits"),
        ("description", "half a pair \ud800", "UTF-8"),
        ("training.logs.0.rows", ["one"], "training.logs[0].values is 'rows of"),
        (
            "files",
            {"single.onnx": {"sha256": "AB", "size": 1}},
            "files.single.onnx.sha256 is 'AB', expected 64 hexadec",
        ),
        ("files", {"single.onnx": {"sha256": "0" * 64, "size": -1}}, "files.single.onnx.size is -1, expected"),
        ("classes", ["no - at `$.name`"] * 2, "classes is ['no - at `$.name`', 'no - at `$.name`'], expected"),
    ],
)
def test_entries_that_do_not_fit_together_are_refused_with_the_reason(path: str, value: Any, said: str) -> None:
    assert said in refusal(changed(path, value))


def test_a_value_of_many_characters_is_cut_in_the_message() -> None:
    assert len(refusal(changed("name", "n" * 10_000))) < 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the document is [], expected an object"),
        ('{"schema": 1, "schema": 1}', "the key 'schema' twice"),
        (GOLDEN.replace("0.42", "NaN"), "holds NaN, expected finite numbers"),
        (GOLDEN.replace("0.42", "Infinity"), "holds Infinity"),
    ],
)
def test_what_is_no_proper_json_is_refused(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.onnx", "a/b.onnx", "a\\b.onnx", "/etc/passwd", "a..onnx", ".hidden", "a b", "a\n"]
)
def test_a_file_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(BundleError, match="a plain file name"):
        check_file_name(name)


@pytest.mark.parametrize("name", ["card.json", "README.md"])
def test_the_bundles_own_names_are_not_free(name: str) -> None:
    with pytest.raises(BundleError, match="other than the card"):
        check_file_name(name)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "w.pkl", "w.PICKLE", "last.ckpt"])
def test_a_pickle_listed_as_a_weight_is_refused(name: str) -> None:
    entry = {"sha256": "0" * 64, "size": 1}
    with pytest.raises(BundleError, match=r"is a pickle.*weights are safetensors, so export the model again"):
        Card.from_json(changed("files", {name: entry}))


def test_what_does_not_fit_together_cannot_be_made_in_python() -> None:
    with pytest.raises(BadInput, match=r"paths\.single is None"):
        replace(Card.from_json(GOLDEN), paths=Paths(single=None, ensemble=()))


def test_a_card_made_in_python_is_checked_when_it_is_written() -> None:
    with pytest.raises(BundleError, match="name is 'a/b'"):
        replace(Card.from_json(GOLDEN), name="a/b").to_json()


def test_an_infinite_number_is_refused_however_it_is_written() -> None:
    text = changed("results.1.step_size", 0.25)
    assert "holds 1e999, expected finite numbers" in refusal(text.replace('"step_size": 0.25', '"step_size": 1e999'))


def test_an_integer_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(
        BundleError, match="an integer of 5000 digits, 11111111111111111111…, expected at most"
    ) as refused:
        Card.from_json(changed("results.1.steps", 17).replace('"steps": 17', '"steps": ' + "1" * 5000))
    assert "set_int_max_str_digits" not in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"input.{side}", size) for side in ("height", "width") for size in (65_536, 4097, 0, -1)),
        *(("input.channels", channels) for channels in (0, 2, 4, 65_536)),
        ("classes", [str(number) for number in range(70_000)]),
        ("architecture.gated_layers", [str(number) for number in range(5000)]),
        ("architecture.candidates", 65_536),
        ("architecture.parameters", 10**18),
        ("architecture.single_path_parameters", 10**15),
        ("results.0.images", 10**12),
        ("results.0.steps", 10**12),
        ("results.0.draws", 10**12),
        ("training.seed", 10**40),
        ("paths.ensemble", ["000"] * 2000),
        ("files", {"single.onnx": {"sha256": "0" * 64, "size": 10**15}}),
    ],
)
def test_a_size_that_no_model_has_is_refused(path: str, value: Any) -> None:
    with pytest.raises(BundleError):
        Card.from_json(changed(path, value))


def test_an_input_is_no_larger_than_a_picture_may_be() -> None:
    images = Card.from_json(GOLDEN).input
    assert replace(images, height=2000, width=2000).height == 2000
    with pytest.raises(BadInput, match="is 4002000, expected at most 4000000"):
        replace(images, height=2000, width=2001)
