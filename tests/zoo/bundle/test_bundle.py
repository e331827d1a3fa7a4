import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Agreement, Calibration, Card, Exit, FileEntry, Int8, Paths
from zoo.bundle.readme import model_card
from zoo.bundle.record import record_results
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile

FILES = {"rgn.safetensors": b"weights", "single.onnx": b"one", "ensemble.onnx": b"many", "gated.onnx": b"all"}


@pytest.fixture
def card() -> Card:
    golden = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
    return replace(golden, int8=None)


@pytest.fixture
def folder(tmp_path: Path, card: Card) -> Path:
    write_bundle(tmp_path / "bundle", card, FILES)
    return tmp_path / "bundle"


def test_a_written_bundle_lists_each_file_with_its_digest_and_size(folder: Path, card: Card) -> None:
    bundle = Bundle.open(folder)
    assert bundle.card == replace(
        card,
        files={
            name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            for name, content in FILES.items()
        },
    )
    for name, content in FILES.items():
        assert bundle.file(name).read_bytes() == content
        assert bundle.read(name) == content
    assert sorted(entry.name for entry in folder.iterdir()) == sorted([*FILES, "README.md", "card.json"])
    assert bundle.has_variant("gated")
    assert not bundle.has_variant("double")


def test_files_are_copied_from_where_they_are(tmp_path: Path, card: Card) -> None:
    graph = tmp_path / "elsewhere.onnx"
    graph.write_bytes(b"graph")
    bundle = write_bundle(tmp_path / "bundle", replace(card, variants=("single",)), {"single.onnx": graph})
    assert bundle.read("single.onnx") == b"graph"
    assert graph.exists()


def test_the_same_bundle_gives_the_same_bytes(tmp_path: Path, card: Card, folder: Path) -> None:
    write_bundle(tmp_path / "again", card, FILES)
    for entry in folder.iterdir():
        assert (tmp_path / "again" / entry.name).read_bytes() == entry.read_bytes()


def test_a_bundle_with_several_exits_holds_the_graph_that_stops_early(tmp_path: Path, card: Card) -> None:
    plain = replace(card.architecture, gated_layers=(), candidates=1, sharing=None)
    early = replace(
        card,
        architecture=plain,
        paths=Paths(single=None, ensemble=()),
        variants=("single",),
        exits=(Exit(macs=9_248_000), Exit(macs=20_804_352)),
    )
    graphs = {"single.onnx": b"all", "weights.safetensors": b"weights"}
    with pytest.raises(MissingFile, match=r"the card has 2 exits but lists no early_exit\.onnx; export it again"):
        write_bundle(tmp_path / "without", early, graphs)
    assert not (tmp_path / "without").exists()
    write_bundle(tmp_path / "with", early, {**graphs, "early_exit.onnx": b"nested"})
    text = (tmp_path / "with" / "README.md").read_text()
    assert "| Exits | 2, at 9.25, 20.80 million multiply-accumulates |" in text
    assert "`single` (the network; its last exit answers)" in text
    assert "`limits`, float32 [1]" in text


def test_a_bundle_replaces_the_one_that_was_there(folder: Path, card: Card) -> None:
    write_bundle(folder, replace(card, variants=("single",)), {"single.onnx": b"new"})
    assert Bundle.open(folder).read("single.onnx") == b"new"
    assert not (folder / "gated.onnx").exists()


@pytest.mark.parametrize("stranger", [".git", "notes.txt"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(folder: Path, card: Card, stranger: str) -> None:
    (folder / stranger).mkdir() if stranger == ".git" else (folder / stranger).touch()
    with pytest.raises(BadInput, match=f"holds '{stranger}', which is no part of its bundle"):
        write_bundle(folder, card, FILES)
    assert (folder / stranger).exists()


def test_a_bundle_that_cannot_be_written_leaves_the_old_one(folder: Path, card: Card) -> None:
    with pytest.raises(MissingFile, match=r"'ensemble' but lists no ensemble\.onnx"):
        write_bundle(folder, card, {"single.onnx": b"new"})
    with pytest.raises(BundleError, match="is a pickle"):
        write_bundle(folder, card, {**FILES, "model.pt": b""})
    with pytest.raises(FileNotFoundError):
        write_bundle(folder, card, {**FILES, "gated.onnx": folder / "nowhere"})
    assert Bundle.open(folder).read("single.onnx") == b"one"
    assert [entry.name for entry in folder.parent.iterdir()] == ["bundle"]


def test_a_tampered_file_is_refused_even_at_the_same_size(folder: Path) -> None:
    (folder / "gated.onnx").write_bytes(b"ill")
    with pytest.raises(ChecksumMismatch, match=r"gated\.onnx has sha256 [0-9a-f]{64}, its card says sha256"):
        Bundle.open(folder)
    bundle = Bundle.open(folder, only=("single.onnx",))
    for access in (bundle.file, bundle.read):
        with pytest.raises(ChecksumMismatch):
            access("gated.onnx")


def test_a_file_cut_short_is_refused_even_unverified(folder: Path) -> None:
    (folder / "gated.onnx").write_bytes(b"al")
    with pytest.raises(ChecksumMismatch, match="has 2 bytes, its card says 3 bytes"):
        Bundle.open(folder, verify=False)


def test_a_file_changed_after_the_bundle_was_opened_is_not_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "single.onnx").write_bytes(b"ONE")
    with pytest.raises(ChecksumMismatch):
        bundle.read("single.onnx")


def test_without_verification_only_presence_and_size_count(folder: Path) -> None:
    (folder / "gated.onnx").write_bytes(b"ill")
    assert Bundle.open(folder, verify=False).read("gated.onnx") == b"ill"


def test_only_the_files_asked_for_need_to_be_there(folder: Path) -> None:
    (folder / "rgn.safetensors").unlink()
    bundle = Bundle.open(folder, only=("single.onnx",))
    with pytest.raises(MissingFile, match=r"rgn\.safetensors is listed in the card and not there"):
        bundle.file("rgn.safetensors")
    with pytest.raises(MissingFile, match=r"rgn\.safetensors"):
        Bundle.open(folder)


def test_a_file_that_the_card_does_not_list_is_not_part_of_the_bundle(folder: Path) -> None:
    (folder / "extra.onnx").touch()
    with pytest.raises(MissingFile, match=r"lists no 'extra\.onnx', only rgn\.safetensors"):
        Bundle.open(folder).file("extra.onnx")


def test_what_is_no_bundle_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no folder"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(MissingFile, match=r"holds no card\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "card.json").write_bytes(b"\xff")
    with pytest.raises(BundleError, match="not UTF-8"):
        Bundle.open(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(BundleError, match=f"{tmp_path}.*lacks the key 'name'"):
        Bundle.open(tmp_path)


def test_the_readme_is_a_model_card_that_the_hub_understands(folder: Path, card: Card) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.license == "apache-2.0"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.pipeline_tag == "image-classification"
    assert [result.metric_value for result in data.eval_results] == [0.8, 0.42]
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == card.name
    for result in card.results:
        assert text.count(f"    {result.command}\n") == 1
    assert "42.00% (39.00% to 45.00%)" in text
    assert "Check that did not hold:** a large eps reaches zero" in text
    assert f"manygates serve {card.name}" in text


def test_the_readme_begins_with_the_numbers_that_stand_for_the_model(card: Card) -> None:
    text = model_card(card)
    assert "In short: 80.00% clean accuracy (single, clean) on 10,000 images; 42.00% accuracy under PGD" in text
    assert "In short" not in model_card(replace(card, results=()))


def test_the_readme_says_how_often_int8_graphs_agree_with_the_weights(card: Card) -> None:
    int8 = Int8(
        variants=("single",), calibration=Calibration(images=1024, seed=0, method="min-max", tool="onnxruntime 1")
    )
    agreement = Agreement(share=0.95, interval=(0.9, 1.0))
    measured = replace(card.results[1], variant="single-int8", attack="PGD on the weights", agreement=agreement)
    text = model_card(replace(card, int8=int8, results=(*card.results, measured)))
    assert "| 42.00% (39.00% to 45.00%) | 95.00% (90.00% to 100.00%) | 2026-11-21 |" in text
    assert "same class as float32" not in model_card(card)


def test_the_readme_has_the_log_of_the_run_and_says_what_its_columns_are(card: Card) -> None:
    text = model_card(card)
    assert "| epoch | loss | held out clean | seconds |\n| --- | --- | --- | --- |\n" in text
    assert "| 1 standard | 0.5 |  | 66.5 |\n| 2 ensemble_in_one | 0.25 | 0.875 | 4000 |\n" in text
    assert "10 steps of PGD at eps 0.01 from the image itself" in text
    odd = replace(card.training, recipe={"validation_eps": "much"})
    assert "10 steps of PGD from the image itself" in model_card(replace(card, training=odd))
    assert "log of the run" not in model_card(replace(card, training=replace(card.training, logs=())))


def test_a_hostile_description_stays_text(card: Card, tmp_path: Path) -> None:
    strange = replace(card, description="a\n---\nb: [", dataset='x": y\n- z', results=())
    text = (write_bundle(tmp_path / "bundle", strange, FILES).folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))["datasets"] == ['x": y\n- z']


def test_weights_and_a_readme_of_somebody_else_are_not_overwritten(tmp_path: Path, card: Card) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "other-model.safetensors").write_bytes(b"precious")
    (mine / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="is not empty and holds no bundle, so its content would be lost"):
        write_bundle(mine, card, FILES)
    assert (mine / "other-model.safetensors").read_bytes() == b"precious"


def test_a_file_beside_a_bundle_that_its_card_does_not_list_is_not_lost(folder: Path, card: Card) -> None:
    (folder / "other-model.safetensors").write_bytes(b"precious")
    with pytest.raises(BadInput, match=r"other-model\.safetensors"):
        write_bundle(folder, card, FILES)


def test_the_working_folder_is_not_replaced(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="choose a folder inside it"):
        write_bundle(Path.cwd(), card, FILES)


def test_another_card_of_the_same_files_leaves_the_weights_alone(folder: Path) -> None:
    written = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    bundle = Bundle.open(folder)
    changed = bundle.with_card(replace(bundle.card, description="Better."))
    assert changed.card == Bundle.open(folder).card
    assert "\nBetter.\n" in (folder / "README.md").read_text(encoding="utf-8")
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == written
    assert {place.name for place in folder.iterdir()} == {*FILES, "card.json", "README.md"}


def test_a_card_of_other_files_or_out_of_range_is_not_put_beside_these(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with pytest.raises(BadInput, match=str(folder)):
        bundle.with_card(replace(bundle.card, files={}))
    with pytest.raises(BundleError, match=r"method is ''"):
        bundle.with_card(replace(bundle.card, method=""))
    assert Bundle.open(folder).card == bundle.card


def test_a_small_measurement_does_not_replace_a_large_one(folder: Path, card: Card) -> None:
    large = card.results[0]
    small = replace(large, images=10, accuracy=1.0, interval=(0.7, 1.0))
    kept = record_results(folder, [small]).card.results
    assert large in kept
    assert small in kept


def test_the_model_card_of_plain_networks_speaks_of_no_paths(card: Card) -> None:
    plain = replace(
        card.architecture,
        gated_layers=(),
        candidates=1,
        sharing=None,
        parameters=3 * card.architecture.single_path_parameters,
    )
    members = replace(card, architecture=plain, paths=Paths(single=None, ensemble=()), variants=("single", "ensemble"))
    text = model_card(members)
    assert "several networks; the mean of their probabilities" in text
    assert f"({plain.single_path_parameters:,} in one network)" in text
    assert "derived path" not in text
    assert "one derived path" in model_card(card)
