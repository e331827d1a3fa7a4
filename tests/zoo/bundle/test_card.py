import json
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from zoo.bundle.card import Card, check_file_name
from zoo.errors import BundleError

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


def changed_golden(**entries: Any) -> str:
    """Return the golden card with other entries, as a card is written."""
    return json.dumps({**json.loads(GOLDEN), **entries}, indent=2, ensure_ascii=False) + "\n"


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
        (early(10, 0), "exits.macs is 0, expected between 1"),
        (early(20, 10), "exits.macs is [20, 10], expected costs that grow from exit to exit"),
        (early(10, 20, variants=["single", "ensemble"]), "variants is 'ensemble', expected only 'single'"),
        (changed("exits", [{"macs": 1}, {"macs": 2}]), "exits is [1, 2], expected none, because layers are gated"),
        (changed("exits", [{"macs": 1, "name": "first"}]), "unknown key 'exits[0].name' = 'first'"),
        (changed("exits", [{"macs": 1.5}]), "exits[0].macs is 1.5, expected an integer"),
    ],
)
def test_exits_that_make_no_sense_are_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(BundleError) as refusal:
        Card.from_json(text)
    assert said in str(refusal.value)


def test_a_model_is_suspect_where_the_linter_raised_an_alarm() -> None:
    assert Card.from_json(GOLDEN).suspect == ("single",)
    assert Card.from_json(changed("lint.0.findings.1.verdict", "ok")).suspect == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("int8.variants", [], "int8.variants is [], expected at least one variant, or int8 null"),
        ("int8.variants", ["single", "double"], "int8.variants is 'double', expected one of single, ensemble, gated"),
        ("int8.variants", ["ensemble"], "int8.agreement.variant is 'single', expected one of ensemble"),
        ("int8.calibration.images", 0, "int8.calibration.images is 0, expected between 1"),
        ("int8.agreement.0.share", 95.0, "int8.agreement.share is 95.0, expected a share between 0 and 1"),
        ("int8.agreement.0.interval", [0.96, 0.97], r"around the share 0.95"),
        ("int8.agreement.0.eps_fraction", "8/255", "expected the fraction that eps 0.03 is"),
        (
            "results.0.variant",
            "gated-int8",
            "results.variant is 'gated-int8', expected one of the variants that int8 lists",
        ),
        ("lint.0.variant", "ensemble-int8", "lint.variant is 'ensemble-int8', expected one of the variants that int8"),
        (
            "lint.0.variant",
            "single-int4",
            "lint.variant is 'single-int4', expected one of single, ensemble, gated, single",
        ),
    ],
)
def test_what_a_card_says_of_int8_graphs_must_fit_together(path: str, value: Any, message: str) -> None:
    with pytest.raises(BundleError, match=re.escape(message)):
        Card.from_json(changed(path, value))


def test_a_result_of_an_int8_graph_has_a_variant_of_its_own() -> None:
    card = Card.from_json(changed("results.0.variant", "single-int8"))
    assert card.results[0].variant == "single-int8"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("exits", ..., "lacks the key 'exits', expected an array"),
        ("schema", "1", "schema is '1', expected an integer"),
        ("name", ..., "lacks the key 'name', expected a string"),
        ("training.seed", ..., "lacks the key 'training.seed', expected an integer"),
        ("results.1.checks.0.held", ..., "lacks the key 'results[1].checks[0].held', expected true or false"),
        ("extra", 1, "unknown key 'extra' = 1, expected only schema, name"),
        ("architecture.depth", 20, "unknown key 'architecture.depth' = 20"),
        ("name", 7, "name is 7, expected a string"),
        ("training.seed", True, "training.seed is True, expected an integer"),
        ("training.seed", 0.5, "training.seed is 0.5, expected an integer"),
        ("results.0.accuracy", "80%", "results[0].accuracy is '80%', expected a number"),
        ("results.1.checks.0.held", 1, "held is 1, expected true or false"),
        ("results.0.accuracy", False, "accuracy is False, expected a number"),
        ("classes", "cat", "classes is 'cat', expected an array"),
        ("input", [], "input is [], expected an object"),
        ("training.versions", [], "training.versions is [], expected an object"),
        ("training.versions.torch", 2, "training.versions.torch is 2, expected a string"),
        ("architecture.sharing", 3, "architecture.sharing is 3, expected a string"),
        ("input.range", [0.0], "input.range is [0.0], expected 2 values"),
        ("name", "../evil", "name is '../evil'"),
        ("name", "a..b", "name is 'a..b'"),
        ("name", "", "name is ''"),
        ("name", "n" * 129, "at most 128"),
        ("method", "", "method is ''"),
        ("classes", ["cat"], "at least two class names"),
        ("classes", ["cat", "cat"], "no name twice"),
        ("architecture.candidates", 0, "architecture.candidates is 0, expected between 1 and 1024"),
        ("architecture.sharing", None, "null exactly when gated_layers is empty"),
        ("architecture.sharing", "some", "one of independent, shared_conv"),
        ("architecture.gated_layers", ["a", "a", "b"], "no name twice"),
        ("architecture.parameters", 0, "between 1 and"),
        ("input.height", 0, "input.height is 0"),
        ("input.range", [1.0, 0.0], "low < high"),
        ("input.mean", [0.5], "3 values, one per channel"),
        ("input.std", [0.2, 0.0, 0.2], "positive values"),
        ("input.resize", "magic", "one of nearest, bilinear, bicubic, lanczos"),
        ("paths.single", "0110", "paths.single: path '0110' has 4 gates, expected 3"),
        ("paths.single", "012", "paths.single: gate 2 at position 2"),
        ("paths.single", "0x1", "paths.single: path '0x1' is not a row of gates"),
        ("paths.single", None, "paths.single is None, expected the path of the variant 'single'"),
        ("paths.ensemble", [], "paths.ensemble is [], expected the paths of the variant 'ensemble'"),
        ("paths.ensemble.1", "11", "paths.ensemble: path '11' has 2 gates"),
        ("variants", ["double"], "variants is 'double', expected one of single, ensemble, gated"),
        ("variants", ["single", "single"], "no name twice"),
        ("training.date", "21.11.2026", "training.date is '21.11.2026'"),
        ("results.0.accuracy", 80.0, "a share between 0 and 1, not per cent"),
        ("results.0.interval", [0.81, 0.82], "around the accuracy 0.8"),
        ("results.0.images", 0, "results.images is 0"),
        ("results.0.steps", -1, "results.steps is -1"),
        ("results.1.eps", 8.0, "results.eps_fraction is '8/255', expected the fraction that eps 8.0 is"),
        ("results.1.eps_fraction", "1/0", "results.eps_fraction is '1/0'"),
        ("results.1.eps_fraction", "eight", "results.eps_fraction is 'eight'"),
        ("results.1.eps", -0.1, "results.eps is -0.1"),
        ("files", {"single.onnx": {"sha256": "AB", "size": 1}}, "64 hexadecimal digits"),
        ("files", {"single.onnx": {"sha256": "0" * 64, "size": -1}}, "between 0 and"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_key_value_and_expectation(path: str, value: Any, said: str) -> None:
    with pytest.raises(BundleError) as refusal:
        Card.from_json(changed(path, value))
    assert said in str(refusal.value)


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
    with pytest.raises(BundleError) as refusal:
        Card.from_json(text)
    assert said in str(refusal.value)


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


def test_a_card_made_in_python_is_checked_like_one_that_is_read() -> None:
    with pytest.raises(BundleError, match="name is 'a/b'"):
        replace(Card.from_json(GOLDEN), name="a/b")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("results.1.eps_fraction", "1e300000000", "the fraction that eps"),
        ("results.1.eps_fraction", "9" * 5000, "the fraction that eps"),
        ("results.1.eps", 10**400, "a number of reasonable size"),
        ("description", "half a pair \ud800", "UTF-8"),
        ("architecture.candidates", 2**40, "between 1 and 1024"),
    ],
)
def test_numbers_and_texts_that_would_hang_or_break_a_reader_are_refused(path: str, value: Any, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        Card.from_json(changed(path, value))


def test_an_infinite_number_is_refused_however_it_is_written() -> None:
    with pytest.raises(BundleError, match="a finite number"):
        Card.from_json(changed("results.1.step_size", 0.25).replace('"step_size": 0.25', '"step_size": 1e999'))


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
    with pytest.raises(BundleError, match="is 4002000, expected between 1 and 4000000"):
        replace(images, height=2000, width=2001)
