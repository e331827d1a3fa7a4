from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from unsettled import unsettle

from zoo import paths
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card, Training
from zoo.errors import BadInput, BadPath, BundleError
from zoo.export import verify
from zoo.export import write as export
from zoo.export.onnx_graphs import plain_graphs
from zoo.export.verify import sample_images, verify_graphs
from zoo.export.write import Description, export_members, export_rgn
from zoo.gates.cost import macs
from zoo.gates.derive import derive
from zoo.gates.rgn import RandomGatedNetwork
from zoo.runtime import session
from zoo.weights import checkpoint
from zoo.weights.checkpoint import Architecture
from zoo.weights.models import RGN_WEIGHTS

TRAINING = Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none")
DESCRIPTION = Description(name="some", description="made by a test", method="standard", training=TRAINING)
PATHS = [(0, 1, 0, 1, 0, 1, 0), (1, 1, 0, 1, 0, 1, 0)]
EXPECTED_FILES = {"card.json", "README.md", "single.onnx", "ensemble.onnx", "gated.onnx", "rgn.safetensors"}


@dataclass(frozen=True)
class Gated:
    rgn: RandomGatedNetwork
    architecture: Architecture
    folder: Path


def gated_architecture(network: str = "resnet8", **options: object) -> Architecture:
    return Architecture(
        network=network, options=options, dataset="tiny", candidates=2, sharing="independent"
    )  # fmt: skip


def built(architecture: Architecture, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return unsettle(architecture.build())


SMALL = Architecture(network="lenet", dataset="tiny")


def small() -> nn.Module:
    """A plain network that is quick to export, where it does not matter which."""
    return built(SMALL)


@pytest.fixture(scope="module")
def gated(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Gated:
    architecture = gated_architecture(width=4)
    rgn = built(architecture)
    assert isinstance(rgn, RandomGatedNetwork)
    folder = tmp_path_factory.mktemp("models") / "gated"
    export_rgn(folder, rgn, architecture, DESCRIPTION, single=PATHS[0], ensemble=PATHS)
    return Gated(rgn, architecture, folder)


def changed(gated: Gated, place: Path, change: Callable[[dict[str, bytes]], None]) -> Bundle:
    """Return a bundle with other files, whose card knows them all the same."""
    bundle = Bundle.open(gated.folder)
    files = {name: bundle.read(name) for name in bundle.card.files}
    change(files)
    return write_bundle(place, bundle.card, files)


def test_an_exported_bundle_holds_its_graphs_and_weights_and_verifies(gated: Gated) -> None:
    bundle = Bundle.open(gated.folder)
    assert {entry.name for entry in gated.folder.iterdir()} == EXPECTED_FILES
    assert bundle.card.variants == ("single", "ensemble", "gated")
    checks = verify_graphs(bundle)
    assert [check.name for check in checks] == [
        "the card describes its weights",
        "single.onnx answers as its weights",
        "single.onnx holds one path only",
        "ensemble.onnx answers as its weights",
        "ensemble.onnx counts votes as its weights",
        "gated.onnx answers as its weights",
    ]
    assert all(check.held for check in checks)
    assert "64 real tiny test images" in checks[1].detail
    assert "batches of 1, 3, 64" in checks[1].detail


def test_the_card_says_what_was_exported(gated: Gated, tiny_dataset: str) -> None:
    card = Bundle.open(gated.folder).card
    assert (card.name, card.method, card.dataset) == ("some", "standard", tiny_dataset)
    assert card.classes == ("red", "green", "blue")
    assert (card.input.channels, card.input.height, card.input.width) == (3, 16, 16)
    assert card.architecture.name == "resnet8"
    assert card.architecture.options == {"width": 4}
    assert card.architecture.gated_layers == tuple(layer.conv for layer in gated.rgn.layers)
    assert card.paths.single == "0101010"
    assert card.paths.ensemble == ("0101010", "1101010")
    assert card.results == ()
    count = sum(parameter.numel() for parameter in gated.rgn.parameters())
    single = sum(parameter.numel() for parameter in derive(gated.rgn, PATHS[0]).parameters())
    assert (card.architecture.parameters, card.architecture.single_path_parameters) == (count, single)


def test_the_card_of_a_random_gated_resnet20_counts_as_the_paper_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers_nothing(*_: object, **__: object) -> dict[str, bytes]:
        return {}

    monkeypatch.setattr(export.onnx_graphs, "rgn_graphs", answers_nothing)  # the counts need no graphs
    architecture = Architecture(network="resnet20", candidates=2, sharing="independent")
    rgn = built(architecture)
    assert isinstance(rgn, RandomGatedNetwork)
    path = (0,) * 19
    card = export_rgn(tmp_path / "out", rgn, architecture, DESCRIPTION, single=path, ensemble=[path]).card
    assert card.architecture.parameters == 541_546
    assert card.architecture.single_path_parameters == 272_474
    assert len(card.architecture.gated_layers) == 19


def test_an_export_of_the_same_network_gives_the_same_bytes(gated: Gated, tmp_path: Path) -> None:
    export_rgn(
        tmp_path / "again", gated.rgn, gated.architecture, DESCRIPTION, single=PATHS[0], ensemble=PATHS
    )  # fmt: skip
    for name in EXPECTED_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (gated.folder / name).read_bytes()


@pytest.mark.usefixtures("tiny_dataset")
def test_one_plain_network_becomes_a_bundle_with_one_variant(tmp_path: Path) -> None:
    bundle = export_members(tmp_path / "plain", [small()], SMALL, DESCRIPTION)
    card = bundle.card
    assert card.variants == ("single",)
    assert card.files.keys() == {"single.onnx", "weights.safetensors"}
    assert (card.architecture.gated_layers, card.architecture.candidates, card.architecture.sharing) == ((), 1, None)
    assert card.architecture.parameters == card.architecture.single_path_parameters
    assert all(check.held for check in verify_graphs(bundle))


def test_several_plain_networks_become_an_ensemble(tiny_dataset: str, tmp_path: Path) -> None:
    """Networks whose BatchNorms cannot all be folded, so that members differ in more than their parameters."""
    architecture = Architecture(network="preact_resnet18", options={"width": 2}, dataset=tiny_dataset)
    members = [built(architecture, seed) for seed in range(2)]
    bundle = export_members(tmp_path / "plain", members, architecture, DESCRIPTION)
    assert bundle.card.variants == ("single", "ensemble")
    assert bundle.card.architecture.parameters == 2 * bundle.card.architecture.single_path_parameters
    assert all(check.held for check in verify_graphs(bundle))


def test_members_derived_from_gates_are_exported_as_plain_networks(gated: Gated, tmp_path: Path) -> None:
    members = [derive(gated.rgn, path) for path in PATHS]
    bundle = export_members(tmp_path / "derived", members, gated.architecture, DESCRIPTION)
    assert bundle.card.architecture.sharing is None
    assert bundle.card.paths.single is None
    images = torch.rand(3, 3, 16, 16).numpy()
    for variant in ("single", "ensemble"):
        answers = [
            session(opened.read(f"{variant}.onnx")).run(["probabilities"], {"images": images})[0]
            for opened in (bundle, Bundle.open(gated.folder))
        ]
        np.testing.assert_allclose(*answers, atol=1e-5)


def test_a_bundle_needs_a_network(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least one network, got none"):
        export_members(tmp_path / "none", [], Architecture(network="resnet8"), DESCRIPTION)
    assert not (tmp_path / "none").exists()


def test_a_path_that_does_not_fit_is_refused_before_anything_is_written(gated: Gated, tmp_path: Path) -> None:
    with pytest.raises(BadPath, match="has 3 gates, expected 7"):
        export_rgn(
            tmp_path / "out", gated.rgn, gated.architecture, DESCRIPTION, single=(0, 1, 0), ensemble=[]
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["single", "ensemble", "gated"])
def test_a_graph_that_disagrees_with_its_weights_is_not_written(
    variant: str, gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swap the order of the class scores in one graph; the exporter must notice, whichever graph it is."""

    def crooked(*_: object, **__: object) -> dict[str, bytes]:
        graphs = {name: Bundle.open(gated.folder).read(f"{name}.onnx") for name in ("single", "ensemble", "gated")}
        model = onnx.load_from_string(graphs[variant])
        for tensor in model.graph.initializer:
            if tensor.name.startswith("classifier.bias"):
                moved = numpy_helper.to_array(tensor)[::-1] + 0.01
                tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
        graphs[variant] = model.SerializeToString()
        return graphs

    monkeypatch.setattr(export.onnx_graphs, "rgn_graphs", crooked)
    place = tmp_path / "out"
    with pytest.raises(BundleError, match=rf"so nothing was written: {variant}\.onnx answers as its weights: "):
        export_rgn(place, gated.rgn, gated.architecture, DESCRIPTION, single=PATHS[0], ensemble=PATHS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "held"), [(0.0, True), (1e-4, False)])
def test_large_logits_may_differ_by_what_float32_rounds_away_and_no_more(
    error: float, held: bool, tiny_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = export.onnx_graphs.plain_graphs

    def louder(*arguments: object, **options: object) -> dict[str, bytes]:
        graphs = honest(*arguments, **options)  # type: ignore[arg-type]
        model = onnx.load_from_string(graphs["single"])
        for tensor in model.graph.initializer:
            if tensor.name.startswith("classifier.weight"):
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1 + error), tensor.name)
                )
        return {**graphs, "single": model.SerializeToString()}

    monkeypatch.setattr(export.onnx_graphs, "plain_graphs", louder)
    network = small()
    with torch.no_grad():
        network.get_submodule("classifier").weight.mul_(1e4)
    if held:
        export_members(tmp_path / "plain", [network], SMALL, DESCRIPTION)  # it verifies what it writes
    else:
        with pytest.raises(BundleError, match=r"single\.onnx answers as its weights: "):
            export_members(tmp_path / "plain", [network], SMALL, DESCRIPTION)


def test_a_failed_export_leaves_the_bundle_that_was_there(
    gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    old = changed(gated, place, lambda files: None).card
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)
    with pytest.raises(BundleError, match="nothing was written"):
        export_members(place, [small()], SMALL, DESCRIPTION)
    assert Bundle.open(place).card == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_the_bundle_that_was_there_as_a_whole(gated: Gated, tmp_path: Path) -> None:
    place = tmp_path / "out"
    changed(gated, place, lambda files: None)
    export_members(place, [small()], SMALL, DESCRIPTION)
    names = {"card.json", "README.md", "single.onnx", "weights.safetensors"}
    assert {entry.name for entry in place.iterdir()} == names
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("tiny_dataset")
def test_a_folder_with_anything_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"is not empty and holds no bundle, so its content would be lost"):
        export_members(tmp_path, [small()], SMALL, DESCRIPTION)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_graphs_whose_weights_were_changed_do_not_verify(gated: Gated, tmp_path: Path) -> None:
    def nudge(files: dict[str, bytes]) -> None:
        place = tmp_path / "weights"
        place.write_bytes(files[RGN_WEIGHTS])
        tensors, header = checkpoint.load(place)
        for name in ("classifier.weight", "classifier.bias"):
            tensors[name] *= 1.1
        checkpoint.save(place, tensors, header)
        files[RGN_WEIGHTS] = place.read_bytes()

    checks = verify_graphs(changed(gated, tmp_path / "out", nudge))
    held = {check.name: check.held for check in checks}
    assert held == {
        "the card describes its weights": True,
        "single.onnx answers as its weights": False,
        "single.onnx holds one path only": True,  # it still does
        "ensemble.onnx answers as its weights": False,
        "ensemble.onnx counts votes as its weights": True,  # surer by a tenth, and so of the same opinion
        "gated.onnx answers as its weights": False,
    }
    assert "path 0000000: largest difference" in checks[-1].detail


def test_an_ensemble_graph_that_counts_votes_wrongly_is_found_though_its_answers_are_right(
    gated: Gated, tmp_path: Path
) -> None:
    def miscount(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["ensemble.onnx"])
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "member_count"]
        tensor.CopyFrom(numpy_helper.from_array(np.array([3], np.float32), tensor.name))
        files["ensemble.onnx"] = model.SerializeToString()

    checks = verify_graphs(changed(gated, tmp_path / "out", miscount))
    assert [check.name for check in checks if not check.held] == ["ensemble.onnx counts votes as its weights"]


def test_an_ensemble_graph_that_does_not_count_votes_is_found(gated: Gated, tmp_path: Path) -> None:
    def forget(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["ensemble.onnx"])
        (output,) = [output for output in model.graph.output if output.name == "agreement"]
        model.graph.output.remove(output)
        files["ensemble.onnx"] = model.SerializeToString()

    checks = verify_graphs(changed(gated, tmp_path / "out", forget))
    assert {check.name: check.held for check in checks if "ensemble" in check.name} == {
        "ensemble.onnx answers as its weights": True,
        "ensemble.onnx counts votes as its weights": False,
    }


def test_one_wrong_candidate_in_the_gated_graph_is_found(gated: Gated, tmp_path: Path) -> None:
    def spoil(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["gated.onnx"])
        last = [node for node in model.graph.node if node.op_type == "If"][-1]
        tensor = last.attribute[1].g.initializer[0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.5, tensor.name))
        files["gated.onnx"] = model.SerializeToString()

    checks = verify_graphs(changed(gated, tmp_path / "out", spoil))
    assert [check.name for check in checks if not check.held] == ["gated.onnx answers as its weights"]


def test_a_single_graph_that_carries_more_than_one_path_is_found(gated: Gated, tmp_path: Path) -> None:
    def smuggle(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["single.onnx"])
        ballast = numpy_helper.from_array(torch.zeros(4, 3, 3, 3).numpy(), "ballast")
        model.graph.initializer.append(ballast)
        files["single.onnx"] = model.SerializeToString()

    checks = verify_graphs(changed(gated, tmp_path / "out", smuggle))
    failed = [check for check in checks if not check.held]
    assert [check.name for check in failed] == ["single.onnx holds one path only"]
    count, most = (int(word) for word in failed[0].detail.split() if word.isdigit())
    assert count == most + 108


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 40])
def test_a_graph_that_cannot_be_loaded_is_a_check_that_does_not_hold(
    content: bytes, gated: Gated, tmp_path: Path
) -> None:  # fmt: skip
    bundle = changed(gated, tmp_path / "out", lambda files: files.update({"single.onnx": content}))
    checks = verify_graphs(bundle)
    assert [check.name for check in checks if not check.held] == ["single.onnx answers as its weights"]
    assert "ONNX Runtime cannot" in checks[1].detail


def test_a_graph_of_another_signature_is_a_check_that_does_not_hold(gated: Gated, tmp_path: Path) -> None:
    bundle = changed(gated, tmp_path / "out", lambda files: files.update({"single.onnx": files["gated.onnx"]}))
    _, first, *_ = verify_graphs(bundle)
    assert (first.name, first.held) == ("single.onnx answers as its weights", False)
    assert "ONNX Runtime cannot run the graph" in first.detail


def test_without_the_data_set_seeded_random_images_are_used_and_said(
    gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    card = Bundle.open(gated.folder).card
    images, origin = sample_images(card, 5)
    assert origin == "5 random images (tiny is not on this machine)"
    assert images.shape == (5, 3, 16, 16)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert torch.equal(images, sample_images(card, 5)[0])


def test_a_wide_path_is_written_so_that_it_can_be_read_again(tiny_dataset: str, tmp_path: Path) -> None:
    architecture = replace(gated_architecture(network="lenet"), candidates=11)
    rgn = built(architecture)
    assert isinstance(rgn, RandomGatedNetwork)
    bundle = export_rgn(tmp_path / "wide", rgn, architecture, DESCRIPTION, single=(10, 0), ensemble=[(1, 2), (10, 10)])
    assert bundle.card.paths.single == "10,0"
    assert bundle.card.paths.ensemble == ("12", "10,10")
    assert [paths.parse(text, 2, 11) for text in bundle.card.paths.ensemble] == [(1, 2), (10, 10)]
    assert all(check.held for check in verify_graphs(bundle))


@pytest.mark.usefixtures("tiny_dataset")
def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    broken = small()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(BadInput, match="not finite"):
        export_members(tmp_path / "out", [broken], SMALL, DESCRIPTION)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"classes": True}, {"network": True}])
def test_a_card_that_describes_other_weights_does_not_verify(
    gated: Gated, tmp_path: Path, change: dict[str, bool]
) -> None:
    bundle = Bundle.open(gated.folder)
    card = bundle.card
    if "classes" in change:
        card = replace(card, classes=tuple(reversed(card.classes)))
    else:
        card = replace(card, architecture=replace(card.architecture, name="resnet20"))
    other = write_bundle(tmp_path / "other", card, {name: bundle.read(name) for name in card.files})
    checks = {check.name: check for check in verify_graphs(other)}
    assert not checks["the card describes its weights"].held


# --- networks with several exits ---

EARLY = Architecture(
    network="msdnet", options={"exits": 3, "base": 1, "step": 1, "channels": 4, "growth": 2}, dataset="tiny"
)  # fmt: skip


@pytest.fixture(scope="module")
def early(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early") / "bundle"
    export_members(folder, [built(EARLY)], EARLY, DESCRIPTION)
    return folder


def altered(folder: Path, place: Path, card: Card | None = None, **files: bytes) -> Bundle:
    """Return a copy of a bundle with another card, or other graphs that its card knows all the same."""
    bundle = Bundle.open(folder)
    content = {name: bundle.read(name) for name in bundle.card.files}
    content.update({f"{name}.onnx": graph for name, graph in files.items()})
    return write_bundle(place, card or bundle.card, content)


def test_a_network_with_exits_becomes_a_bundle_with_one_variant_and_the_graph_that_stops_early(early: Path) -> None:
    bundle = Bundle.open(early)
    assert bundle.card.variants == ("single",)
    assert set(bundle.card.files) == {"single.onnx", "early_exit.onnx", "weights.safetensors"}
    assert tuple(found.macs for found in bundle.card.exits) == macs(built(EARLY))
    checks = verify_graphs(bundle)
    assert [check.name for check in checks] == [
        "the card describes its weights",
        "single.onnx answers as its weights",
        "single.onnx answers at every exit as its weights",
        "single.onnx holds one path only",
        "early_exit.onnx answers as its weights",
    ]
    assert all(check.held for check in checks)
    taken = re.search(r"left (\d+), (\d+), (\d+) times", checks[-1].detail)
    assert taken is not None
    assert all(int(times) >= 8 for times in taken.groups())


def test_a_network_with_exits_gives_the_same_bytes_again(early: Path) -> None:
    for name, content in plain_graphs([built(EARLY).eval()]).items():
        assert (early / f"{name}.onnx").read_bytes() == content


def test_networks_with_exits_make_no_ensemble(tiny_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="2 networks with 3 exits each make no ensemble: members may leave at different"):
        export_members(tmp_path / "out", [built(EARLY), built(EARLY, seed=1)], EARLY, DESCRIPTION)
    assert not (tmp_path / "out").exists()


def test_graphs_of_other_weights_with_exits_are_found(early: Path, tmp_path: Path) -> None:
    other = built(EARLY).eval()
    nn.init.normal_(other.exits[0].classifier.weight)
    graphs = plain_graphs([other])
    bundle = altered(early, tmp_path / "one", early_exit=graphs["early_exit"])
    assert [check.name for check in verify_graphs(bundle) if not check.held] == [
        "early_exit.onnx answers as its weights"
    ]  # fmt: skip
    bundle = altered(early, tmp_path / "two", single=graphs["single"])
    (failed,) = [check for check in verify_graphs(bundle) if not check.held]
    assert failed.name == "single.onnx answers at every exit as its weights"
    assert failed.detail.startswith("exit 1: largest difference")


def test_a_graph_that_leaves_elsewhere_is_found_though_its_answers_are_right(early: Path, tmp_path: Path) -> None:
    model = onnx.load_from_string(Bundle.open(early).read("early_exit.onnx"))
    for node in model.graph.node:
        if node.op_type == "GreaterOrEqual":
            node.op_type = "Less"  # it leaves where it is not sure
    bundle = altered(early, tmp_path / "out", early_exit=model.SerializeToString())
    (failed,) = [check for check in verify_graphs(bundle) if not check.held]
    assert failed.name == "early_exit.onnx answers as its weights"
    wrong = re.search(r"(\d+) of them at another exit", failed.detail)
    assert wrong is not None
    assert int(wrong[1]) > 20


def test_a_graph_that_stops_early_and_cannot_be_loaded_is_a_check_that_does_not_hold(
    early: Path, tmp_path: Path
) -> None:
    for name, content in {"broken": b"not a graph", "other": Bundle.open(early).read("single.onnx")}.items():
        (failed,) = [c for c in verify_graphs(altered(early, tmp_path / name, early_exit=content)) if not c.held]
        assert failed.name == "early_exit.onnx answers as its weights"
        assert "ONNX Runtime cannot" in failed.detail


def test_a_card_that_tells_other_costs_of_its_exits_does_not_verify(early: Path, tmp_path: Path) -> None:
    card = Bundle.open(early).card
    cheaper = replace(card, exits=tuple(replace(found, macs=found.macs - 1) for found in card.exits))
    (failed,) = [c for c in verify_graphs(altered(early, tmp_path / "out", card=cheaper)) if not c.held]
    assert failed.name == "the card describes its weights"
    assert failed.detail.startswith("exits is (Exit(macs=")
