from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from zoo import networks
from zoo.errors import CheckpointError, ManygatesError
from zoo.gates.rgn import RandomGatedNetwork
from zoo.weights import checkpoint
from zoo.weights.checkpoint import Architecture, load, load_network, load_network_state, network_state, save_network
from zoo.weights.models import load_members, save_members

PLAIN = Architecture(network="resnet8", options={"width": 4})
INDEPENDENT = Architecture(network="resnet8", options={"width": 4}, candidates=3, sharing="independent")
SHARED_CONV = Architecture(network="resnet8", options={"width": 4}, candidates=2, sharing="shared_conv")
ARCHITECTURES = {"plain": PLAIN, "independent": INDEPENDENT, "shared_conv": SHARED_CONV}


def built(architecture: Architecture) -> nn.Module:
    """Build a network in which no tensor has its initial value."""
    network = architecture.build()
    for tensor in network.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(7))
    return network.eval()


def answer(network: nn.Module, images: Tensor) -> Tensor:
    if isinstance(network, RandomGatedNetwork):
        return network(images, [index % network.candidates for index in range(network.num_gates)])
    return network(images)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_network_survives_being_written_and_read(architecture: Architecture, tmp_path: Path) -> None:
    network = built(architecture)
    save_network(tmp_path / "rgn.safetensors", network, architecture)
    loaded, read = load_network(tmp_path / "rgn.safetensors")
    assert read == architecture
    assert read.gated == (architecture is not PLAIN)
    assert not loaded.training
    before, after = network_state(network), network_state(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(answer(network, images), answer(loaded, images))


def test_candidates_are_stacked_under_the_templates_names() -> None:
    plain = network_state(PLAIN.build())
    independent = network_state(INDEPENDENT.build())
    shared = network_state(SHARED_CONV.build())
    assert independent.keys() == shared.keys() == plain.keys()
    assert plain["conv1.weight"].shape == (4, 3, 3, 3)
    assert independent["conv1.weight"].shape == (3, 4, 3, 3, 3)
    assert shared["conv1.weight"].shape == (4, 3, 3, 3)
    assert independent["norm1.running_var"].shape == (3, 4)
    assert shared["norm1.running_var"].shape == (2, 4)
    assert independent["norm1.num_batches_tracked"].shape == (3,)
    for name in plain:
        if name.startswith(("classifier", "normalise")) or "shortcut" in name:
            assert independent[name].shape == shared[name].shape == plain[name].shape


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    network = built(INDEPENDENT)
    for name in "abcdefgh":  # the library orders its metadata at random
        save_network(tmp_path / name, network, INDEPENDENT)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("of", "into", "message"),
    [
        (PLAIN, INDEPENDENT, r"conv1.weight \(4, 3, 3, 3\) float32 instead of \(3, 4, 3, 3, 3\)"),
        (INDEPENDENT, SHARED_CONV, r"conv1.weight \(3, 4, 3, 3, 3\) float32 instead of \(4, 3, 3, 3\)"),
        (PLAIN, Architecture(network="resnet14", options={"width": 4}), r"missing \['stages.0.1.conv1.weight'"),
        (Architecture(network="resnet14", options={"width": 4}), PLAIN, r"unknown \['stages.0.1.conv1.weight'"),
        (Architecture(network="resnet8"), PLAIN, r"classifier.weight \(10, 64\) float32 instead of \(10, 16\)"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_tensors_that_differ(
    of: Architecture, into: Architecture, message: str
) -> None:
    network = built(into)
    before = {name: tensor.clone() for name, tensor in network_state(network).items()}
    with pytest.raises(CheckpointError, match=message):
        load_network_state(network, network_state(of.build()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network_state(network).items())


def test_a_pickle_is_refused_because_it_can_run_code(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(PLAIN.build().state_dict(), file)
    with pytest.raises(CheckpointError, match=r"pickled weights .* refused because loading one can run code"):
        load_network(file)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_network(file, PLAIN.build(), PLAIN)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_network(file)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors is not a file"):
        load_network(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_somebody_elses_safetensors_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, file, metadata)
    with pytest.raises(CheckpointError, match="expected 'manygates-weights-1'; it was not written by manygates"):
        load_network(file)


@pytest.mark.parametrize(
    "header", [{}, {"architecture": {}}, {"architecture": {"network": "resnet8", "layers": 3}}, {"architecture": None}]
)
def test_a_header_that_does_not_name_its_network_is_refused(header: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    checkpoint.save(file, {"weight": torch.zeros(2)}, header)
    with pytest.raises(CheckpointError, match="does not say which network its weights belong to"):
        load_network(file)


def test_tensors_and_header_come_back_as_they_went(tmp_path: Path) -> None:
    tensors = {
        "strided": torch.arange(12.0).view(3, 4).t(),
        "scalar": torch.tensor(3),
        "half": torch.ones(2).bfloat16(),
    }
    header = {"epoch": 3, "rows": [{"loss": 0.5}], "name": "grün"}
    checkpoint.save(tmp_path / "file", tensors, header)
    read, read_header = checkpoint.load(tmp_path / "file")
    assert read_header == json.loads(json.dumps(header))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_saving_over_a_file_leaves_no_other_file_behind(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path / "file", {"tensor": torch.tensor(value)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert float(checkpoint.load(tmp_path / "file")[0]["tensor"]) == 2.0


# --- headers that claim more than the file holds ---


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yield a list that gets the size of every parameter that is made in the block."""
    sizes: list[int] = []

    def note(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None:
            sizes.append(parameter.numel())

    hook = register_module_parameter_registration_hook(note)
    try:
        yield sizes
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "claim",
    [
        {"members": 10**6},
        {"members": 1000},
        {"members": True},
        {"members": 0},
        {"candidates": 10**6, "sharing": "independent"},
        {"candidates": 1000, "sharing": "independent"},
        {"candidates": 1000, "sharing": "shared_conv"},
        {"candidates": -2, "sharing": "independent"},
        {"sharing": "none"},
        {"network": "resnet110"},
        {"network": "msdnet", "options": {"exits": 10**9}},
        {"network": "msdnet", "options": {"exits": 60_000}},
        {"network": "msdnet", "options": {"base": 60_000}},
        {"network": "vgg16", "options": {"width": 1e300}},
        {"network": "preact_resnet18", "options": {"width": 60_000}},
        {"network": ["resnet8"]},
        {"options": {"width": 2**62}},
        {"options": {"width": 40_000}},
        {"options": {"width": -4}},
        {"options": {"width": "4"}},
        {"options": [4]},
        {"options": {"widths": 4}},
        {"dataset": "mnist"},
        {"dataset": 7},
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_file_that_claims_another_network_than_it_holds_is_refused_before_it_gets_large(
    claim: dict[str, Any], stacked: bool, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    members = [built(PLAIN), built(PLAIN)]
    if stacked:
        save_members(file, members, PLAIN)
    else:
        save_network(file, members[0], PLAIN)
    tensors, header = load(file)
    checkpoint.save(file, tensors, {**header, "architecture": {**header["architecture"], **claim}})
    held = sum(tensor.numel() for tensor in tensors.values())
    for read in (load_network, load_members):
        with counted() as sizes, pytest.raises(ManygatesError):
            read(file)
        assert sum(sizes[:-1]) <= checkpoint.MAX_BUILT_COPIES * held, "the last one is refused before it is filled"
        assert len(sizes) <= checkpoint.MAX_BUILT_COPIES * len(tensors) + 1


@pytest.mark.parametrize("members", [10**6, 1000, 3, 0, -1, True, "2", None])
def test_a_file_that_claims_other_members_than_it_holds_is_refused_before_anything_is_built(
    members: object, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    save_members(file, [built(PLAIN), built(PLAIN)], PLAIN)
    tensors, header = load(file)
    assert len(load_members(file)[0]) == header["members"] == 2
    checkpoint.save(file, tensors, {**header, "members": members})
    with counted() as sizes:
        with pytest.raises(CheckpointError):
            load_members(file)
        checkpoint.save(file, {}, {**header, "members": members})
        with pytest.raises(CheckpointError):
            load_members(file)
    assert len(sizes) <= 1


@pytest.mark.parametrize("architecture", [INDEPENDENT, SHARED_CONV, Architecture(network="resnet8", members=3)])
def test_several_networks_in_a_file_are_assembled(architecture: Architecture) -> None:
    state = network_state(architecture.build())
    assembled = network_state(checkpoint.assembled(architecture, state))
    assert all(torch.equal(state[name], assembled[name]) for name in state)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_can_be_assembled(name: str) -> None:
    architecture = Architecture(network=name)
    assert not checkpoint.assembled(architecture, network_state(architecture.build())).training
