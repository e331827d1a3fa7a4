from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from unsettled import unsettle

from zoo import paths
from zoo.data.vision import torchvision
from zoo.errors import BadInput, BadPath
from zoo.export import onnx_graphs
from zoo.export.onnx_graphs import GatedStencil
from zoo.gates.derive import Ensemble, agreement, derive, folded_copy
from zoo.gates.rgn import RandomGatedNetwork, Sharing, randomly_gate
from zoo.networks import ImageFormat, build
from zoo.runtime import session

SMALL = ImageFormat(height=16, width=16)
GREY = ImageFormat(channels=1, height=16, width=16, mean=(0.1,), std=(0.3,))
UNTRACED = (1, 3, 64)  # the exporter traces a batch of 2


def mobilenet() -> nn.Module:
    """A torchvision network with depth-wise convolutions, dropout and ReLU6, cut down to ten of them."""
    settings = [[1, 16, 1, 1], [6, 24, 1, 2], [6, 24, 1, 1]]
    network = torchvision().models.MobileNetV2(num_classes=4, width_mult=0.25, inverted_residual_setting=settings)
    network.image_shape = (3, 16, 16)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Sharing]] = {
    "two candidates": (lambda: build("resnet8", images=SMALL, width=4), 2, "independent"),
    "three candidates": (lambda: build("resnet8", images=SMALL, width=4), 3, "independent"),
    "shared convolutions": (lambda: build("resnet8", images=SMALL, width=4), 2, "shared_conv"),
    "pre-activation": (lambda: build("preact_resnet18", images=SMALL, width=2), 2, "independent"),
    "grey lenet": (lambda: build("lenet", images=GREY), 3, "independent"),
    "torchvision": (mobilenet, 2, "independent"),
}


@dataclass(frozen=True)
class Case:
    """A random gated network, the paths chosen from it and its graphs."""

    rgn: RandomGatedNetwork
    single: paths.Path
    ensemble: list[paths.Path]
    graphs: dict[str, bytes]

    def images(self, number: int) -> Tensor:
        shape = tuple(self.rgn.template.image_shape)
        return torch.rand(number, *shape, generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    template, candidates, sharing = NETWORKS[request.param]
    rgn = unsettle(randomly_gate(template(), candidates=candidates, sharing=sharing)).eval()
    assert isinstance(rgn, RandomGatedNetwork)
    first = tuple(gate % candidates for gate in range(rgn.num_gates))
    ensemble = [first, (*first[:-1], (first[-1] + 1) % candidates), tuple((gate + 1) % candidates for gate in first)]
    graphs = onnx_graphs.rgn_graphs(rgn, first, ensemble, gated=True)
    return Case(rgn, first, ensemble, graphs)


@pytest.fixture(scope="module")
def tiny() -> RandomGatedNetwork:
    """Seven gates, two candidates: 128 paths."""
    torch.manual_seed(1)
    template, candidates, sharing = NETWORKS["two candidates"]
    rgn = unsettle(randomly_gate(template(), candidates=candidates, sharing=sharing)).eval()
    assert isinstance(rgn, RandomGatedNetwork)
    return rgn


@pytest.fixture(scope="module")
def exported(tiny: RandomGatedNetwork) -> GatedStencil:
    return GatedStencil.of(tiny)


@pytest.fixture(scope="module")
def tiny_gated(exported: GatedStencil) -> bytes:
    return exported.gated()


def answer(opened: Any, images: Tensor, **more: np.ndarray) -> tuple[Tensor, Tensor]:
    logits, probabilities = opened.run(["logits", "probabilities"], {"images": images.numpy(), **more})
    return torch.from_numpy(logits), torch.from_numpy(probabilities)


def assert_equal_answers(graph: tuple[Tensor, Tensor], expected: Tensor) -> None:
    logits, probabilities = graph
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(probabilities, expected.softmax(1), atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def floats(content: bytes) -> dict[str, np.ndarray]:
    """Every float tensor of a graph, those of its branches included."""
    graphs = list(all_graphs(onnx.load_from_string(content).graph))
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    return {t.name: numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.FLOAT}


def count(content: bytes, kind: str) -> int:
    return sum(node.op_type == kind for node in onnx.load_from_string(content).graph.node)


def distinct_convolutions(rgn: RandomGatedNetwork, chosen: list[paths.Path]) -> int:
    """How many convolutions k paths need: one per set of gates that it, or what it reads, depends on."""
    gate_of = {layer.conv: gate for gate, layer in enumerate(rgn.layers)}
    depends: dict[fx.Node, set[int]] = {}
    needed = set()
    for node in fx.symbolic_trace(rgn.template).graph.nodes:
        depends[node] = set().union(*(depends[source] for source in node.all_input_nodes))
        if node.op != "call_module":
            continue
        if node.target in gate_of:
            depends[node].add(gate_of[node.target])
        if isinstance(rgn.template.get_submodule(node.target), nn.Conv2d):
            # a private BatchNorm is folded into its convolution, whose gate is the BatchNorm's as well
            needed |= {(node.target, tuple(path[gate] for gate in sorted(depends[node]))) for path in chosen}
    return len(needed)


@pytest.mark.parametrize("batch", UNTRACED)
def test_each_graph_answers_as_torch_at_batch_sizes_that_were_not_traced(case: Case, batch: int) -> None:
    images = case.images(batch)
    members = [derive(case.rgn, path) for path in case.ensemble]
    with torch.no_grad():
        assert_equal_answers(answer(session(case.graphs["single"]), images), case.rgn(images, case.single))
        assert_equal_answers(answer(session(case.graphs["ensemble"]), images), Ensemble(members)(images))
        gated = session(case.graphs["gated"])
        for path in case.ensemble:
            assert_equal_answers(answer(gated, images, gates=np.array(path, np.int64)), case.rgn(images, path))


def test_the_ensembles_probabilities_are_the_mean_of_its_members(case: Case) -> None:
    images = case.images(3)
    with torch.no_grad():
        mean = torch.stack([case.rgn(images, path).softmax(1) for path in case.ensemble]).mean(0)
    logits, probabilities = answer(session(case.graphs["ensemble"]), images)
    torch.testing.assert_close(probabilities, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.exp(), mean, atol=1e-5, rtol=0)


def test_a_single_graph_holds_exactly_the_folded_plain_network(case: Case) -> None:
    network = folded_copy(derive(case.rgn, case.single))
    expected = {name: tensor.numpy() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    held = floats(case.graphs["single"])
    bounds = {name: array for name, array in held.items() if name not in expected}
    assert all(array.item() in (0.0, 6.0) for array in bounds.values())  # ReLU6 clips between two constants
    assert held.keys() - bounds.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(held[name], tensor)
    numbers = sum(tensor.size for tensor in expected.values())
    assert onnx_graphs.count_parameters(case.graphs["single"]) == numbers


def test_graphs_hold_no_tensor_of_a_candidate_that_they_do_not_run(case: Case) -> None:
    rgn = case.rgn
    folded = [rgn.folded([candidate] * rgn.num_gates) for candidate in range(rgn.candidates)]
    for variant, chosen in (("single", [case.single]), ("ensemble", case.ensemble)):
        held = list(floats(case.graphs[variant]).values())
        for gate, layer in enumerate(rgn.layers):
            used = {path[gate] for path in chosen}
            for candidate, tensors in enumerate(folded):
                weight = tensors[f"{layer.conv}.weight"].numpy()
                found = any(array.shape == weight.shape and np.array_equal(array, weight) for array in held)
                assert found == (candidate in used), (variant, layer.conv, candidate)


def test_an_ensemble_computes_once_what_its_paths_have_in_common(case: Case) -> None:
    assert count(case.graphs["ensemble"], "Conv") == distinct_convolutions(case.rgn, case.ensemble)
    assert count(case.graphs["single"], "Conv") == distinct_convolutions(case.rgn, [case.single])


def test_a_gated_graph_holds_every_candidate_once(case: Case) -> None:
    rgn = case.rgn
    gated = {f"{layer.conv}.{leaf}" for layer in rgn.layers for leaf in ("weight", "bias")}
    single = floats(case.graphs["single"])
    weights = {name: array for name, array in single.items() if array.ndim}  # a scalar is a bound
    expected = sum(array.size * (rgn.candidates if name in gated else 1) for name, array in weights.items())
    assert onnx_graphs.count_parameters(case.graphs["gated"]) == expected


def test_graphs_are_portable_and_tell_nothing_of_the_machine_that_wrote_them(case: Case) -> None:
    for variant, content in case.graphs.items():
        model = onnx.load_from_string(content)
        assert model.ir_version <= 10
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
        assert (len(model.functions), model.doc_string) == (0, "")
        facts = {"gates": str(case.rgn.num_gates), "candidates": str(case.rgn.candidates)}
        assert {entry.key: entry.value for entry in model.metadata_props} == (facts if variant == "gated" else {})
        for graph in all_graphs(model.graph):
            assert (len(graph.metadata_props), graph.doc_string) == (0, "")
            assert all(not node.metadata_props and not node.doc_string for node in graph.node), variant
            assert {node.domain for node in graph.node} <= {""}
        for secret in (str(Path(__file__).parents[3]), str(Path(torch.__file__).parent), "stack_trace", ".py"):
            assert secret.encode() not in content


def test_graphs_say_what_goes_in_and_what_comes_out(case: Case) -> None:
    shape = list(case.rgn.template.image_shape)
    classes = case.rgn(case.images(1), case.single).shape[1]
    for variant, content in case.graphs.items():
        opened = session(content)
        more = [("gates", "tensor(int64)", [case.rgn.num_gates])] if variant == "gated" else []
        inputs = [(entry.name, entry.type, entry.shape) for entry in opened.get_inputs()]
        assert inputs == [("images", "tensor(float)", ["batch", *shape]), *more]
        outputs = [(name, "tensor(float)", ["batch", classes]) for name in ("logits", "probabilities")]
        outputs += [("agreement", "tensor(float)", ["batch"])] if variant == "ensemble" else []
        assert [(entry.name, entry.type, entry.shape) for entry in opened.get_outputs()] == outputs


@pytest.mark.parametrize("batch", UNTRACED)
def test_agreement_is_the_share_of_members_that_vote_for_the_winner_of_the_mean(case: Case, batch: int) -> None:
    images = case.images(batch)
    with torch.no_grad():
        probabilities = torch.stack([case.rgn(images, path).softmax(1) for path in case.ensemble])
    votes, winner = probabilities.argmax(2), probabilities.mean(0).argmax(1)
    expected = [sum(int(vote == winner[image]) for vote in votes[:, image]) / 3 for image in range(batch)]
    (counted,) = session(case.graphs["ensemble"]).run(["agreement"], {"images": images.numpy()})
    assert counted.dtype == np.float32
    assert counted.tolist() == np.array(expected, np.float32).tolist()  # to the last bit: thresholds compare it


def test_members_that_disagree_are_counted_exactly(tiny: RandomGatedNetwork, exported: GatedStencil) -> None:
    """Seven paths of a small network part ways on noise, and every share that occurs is the nearest float of k/7."""
    chosen = list(itertools.product(range(tiny.candidates), repeat=tiny.num_gates))[:128:19]
    assert len(chosen) == 7
    images = 4 * torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    content = exported.ensemble(chosen)
    (counted,) = session(content).run(["agreement"], {"images": images.numpy()})
    with torch.no_grad():
        expected = agreement(torch.stack([tiny(images, path) for path in chosen]))
    assert torch.equal(torch.from_numpy(counted), expected)
    shares = set(counted.tolist())
    assert len(shares) > 2
    assert shares <= {float(np.float32(votes / 7)) for votes in range(8)}


def test_every_path_of_a_small_network_is_in_its_gated_graph(tiny: RandomGatedNetwork, tiny_gated: bytes) -> None:
    opened = session(tiny_gated)
    images = torch.rand(2, 3, 16, 16)
    answers = []
    for path in itertools.product(range(tiny.candidates), repeat=tiny.num_gates):
        logits, _ = answer(opened, images, gates=np.array(path, np.int64))
        with torch.no_grad():
            torch.testing.assert_close(logits, tiny(images, path), atol=1e-4, rtol=0)
        answers.append(logits)
    assert len(answers) == 128
    distances = torch.cdist(torch.stack(answers).flatten(1), torch.stack(answers).flatten(1))
    assert float(distances.fill_diagonal_(1).min()) > 1e-3  # no two paths are one


@pytest.mark.parametrize("gate", [2, -1, 7])
def test_a_gate_out_of_range_runs_the_last_candidate(tiny_gated: bytes, gate: int) -> None:
    opened = session(tiny_gated)
    images = torch.rand(2, 3, 16, 16)
    odd = answer(opened, images, gates=np.array([gate] + [0] * 6, np.int64))[0]
    assert torch.equal(odd, answer(opened, images, gates=np.array([1] + [0] * 6, np.int64))[0])


def test_equal_paths_cost_one(exported: GatedStencil) -> None:
    path = (0, 1, 0, 1, 0, 1, 0)
    graphs = {"single": exported.single(path), "ensemble": exported.ensemble([path] * 4)}
    for kind in ("Conv", "Gemm", "Relu", "Add"):
        assert count(graphs["ensemble"], kind) == count(graphs["single"], kind)
    images = torch.rand(3, 3, 16, 16)
    expected = answer(session(graphs["single"]), images)[1]
    torch.testing.assert_close(answer(session(graphs["ensemble"]), images)[1], expected, atol=1e-6, rtol=0)


def test_an_ensemble_of_one_path_answers_with_its_own_logits(exported: GatedStencil) -> None:
    path = (1, 1, 0, 1, 0, 1, 1)
    graphs = {"single": exported.single(path), "ensemble": exported.ensemble([path])}
    images = torch.rand(3, 3, 16, 16)
    opened = session(graphs["ensemble"])
    for alone, together in zip(answer(session(graphs["single"]), images), answer(opened, images), strict=True):
        assert torch.equal(alone, together)
    assert opened.run(["agreement"], {"images": images.numpy()})[0].tolist() == [1, 1, 1]  # with itself


def test_the_longer_a_common_prefix_the_smaller_the_ensemble(tiny: RandomGatedNetwork, exported: GatedStencil) -> None:
    zeros = (0,) * tiny.num_gates
    sizes = []
    for common in (0, 6):
        pair = [zeros, (0,) * common + (1,) * (tiny.num_gates - common)]
        content = exported.ensemble(pair)
        sizes.append((len(onnx.load_from_string(content).graph.node), len(content)))
        assert count(content, "Conv") == distinct_convolutions(tiny, pair)
    assert sizes[0] > sizes[1]
    assert sizes[0][1] > sizes[1][1]


def test_paths_that_part_at_the_first_gate_share_nothing_but_the_normalised_images(
    tiny: RandomGatedNetwork, exported: GatedStencil
) -> None:
    pair = [(0,) * tiny.num_gates, (1,) + (0,) * (tiny.num_gates - 1)]
    graphs = {"single": exported.single(pair[0]), "ensemble": exported.ensemble(pair)}
    assert count(graphs["ensemble"], "Conv") == 2 * count(graphs["single"], "Conv")
    assert count(graphs["single"], "Div") == 1
    assert count(graphs["ensemble"], "Div") == 2  # one of the images, and one of the votes by the members
    # the weights of the six layers on which they agree are there once
    first = tiny.layers[0].conv
    apart = sum(t.numel() for name, t in tiny.folded(pair[0]).items() if name.startswith(f"{first}."))
    extra = onnx_graphs.count_parameters(graphs["ensemble"]) - onnx_graphs.count_parameters(graphs["single"])
    assert extra == apart


def test_the_same_network_gives_the_same_bytes(tiny: RandomGatedNetwork, exported: GatedStencil) -> None:
    chosen = [(0,) * 7, (1,) * 7]
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    torch.manual_seed(99)  # nothing is drawn from the global generator
    again = onnx_graphs.rgn_graphs(tiny, chosen[0], chosen, gated=True)
    assert again == {
        "single": exported.single(chosen[0]), "ensemble": exported.ensemble(chosen), "gated": exported.gated()
    }  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_torchs_table_of_functions_is_kept_and_makes_the_same_graph_as_a_new_one(
    tiny: RandomGatedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter below torch's public function is given the table; the public one makes it at every call."""
    from torch.onnx._internal.exporter import _core

    network = derive(tiny, (0,) * 7)
    ours = onnx_graphs.plain_graphs([network])["single"]
    below = _core.export

    def public(model: nn.Module, arguments: tuple[Tensor], *, registry: object, **options: Any) -> object:
        monkeypatch.setattr(_core, "export", below)
        return torch.onnx.export(model, arguments, dynamo=True, **options)

    monkeypatch.setattr(_core, "export", public)
    assert onnx_graphs.plain_graphs([network])["single"] == ours


@pytest.mark.parametrize(("single", "ensemble"), [((0,) * 6, []), ((0,) * 8, []), (None, [(0,) * 6 + (2,)])])
def test_a_path_that_does_not_fit_is_refused(tiny: RandomGatedNetwork, single: Any, ensemble: Any) -> None:
    with pytest.raises(BadPath, match=r"gates, expected 7|gate 2 at position 6 is out of range"):
        onnx_graphs.rgn_graphs(tiny, single, ensemble, gated=False)


def test_a_gated_graph_of_a_single_candidate_is_refused() -> None:
    rgn = unsettle(randomly_gate(build("lenet", images=GREY), candidates=1)).eval()
    assert isinstance(rgn, RandomGatedNetwork)
    with pytest.raises(BadInput, match=r"at least 2 candidates per layer, got 1; export the variant 'single'"):
        onnx_graphs.rgn_graphs(rgn, None, [], gated=True)


def test_a_plain_network_answers_as_torch() -> None:
    network = unsettle(build("resnet8", images=SMALL, width=4, negative_slope=0.1)).eval()
    opened = session(onnx_graphs.plain_graphs([network])["single"])
    for batch in UNTRACED:
        images = torch.rand(batch, 3, 16, 16)
        with torch.no_grad():
            assert_equal_answers(answer(opened, images), network(images))


def test_separate_networks_answer_with_their_mean_probability() -> None:
    """BatchNorms in front of a convolution stay, with the statistics of their own member."""
    members = [unsettle(build("preact_resnet18", images=SMALL, width=2)).eval() for _ in range(3)]
    content = onnx_graphs.plain_graphs(members)["ensemble"]
    opened = session(content)
    for batch in UNTRACED:
        images = torch.rand(batch, 3, 16, 16)
        with torch.no_grad():
            assert_equal_answers(answer(opened, images), Ensemble(members)(images))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in members[0].modules())
    assert count(content, "Conv") == 3 * convolutions
    held = floats(content)
    constants = {name: held.pop(name).size for name in ("normalise.mean", "normalise.std")}
    assert constants == {"normalise.mean": 3, "normalise.std": 3}  # what all members share is there once


def test_a_network_that_does_not_say_the_shape_of_its_images_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BadInput, match=r"set network\.image_shape = \(channel, height, width\)"):
        onnx_graphs.plain_graphs([network.eval()])["single"]


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(BadInput, match=r"CifarResNet is in training mode"):
        onnx_graphs.plain_graphs([build("resnet8", images=SMALL, width=4)])["single"]


# --- networks with several exits ---

INFINITE = float("inf")


@dataclass(frozen=True)
class Early:
    """A multi-exit network and its graphs."""

    network: nn.Module
    single: bytes
    early_exit: bytes

    def images(self, number: int) -> Tensor:
        shape = tuple(self.network.image_shape)
        return torch.rand(number, *shape, generator=torch.Generator().manual_seed(number))


MULTI_EXIT: dict[str, Callable[[], nn.Module]] = {
    "msdnet": lambda: build("msdnet", images=SMALL, exits=3, base=1, step=1, channels=4, growth=2),
    "two exits": lambda: build("msdnet", images=SMALL, exits=2, base=1, step=1, channels=4, growth=2),
    "digits": lambda: build("small_cnn3", images=GREY),
}


@pytest.fixture(scope="module", params=MULTI_EXIT)
def early(request: pytest.FixtureRequest) -> Early:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = unsettle(MULTI_EXIT[request.param]()).eval()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.2)
    made = onnx_graphs.plain_graphs([network])
    return Early(network, made["single"], made["early_exit"])


def at_limits(graph: bytes, image: Tensor, limits: list[float]) -> tuple[np.ndarray, np.ndarray, int]:
    feeds = {"images": image.numpy(), "limits": np.array(limits, np.float32)}
    logits, probabilities, left_at = session(graph).run(["logits", "probabilities", "exit"], feeds)
    assert left_at.shape == (1,)
    return logits, probabilities, int(left_at[0])


@torch.no_grad()
def test_the_single_graph_of_several_exits_answers_at_all_and_its_logits_are_the_last(early: Early) -> None:
    for number in UNTRACED:
        images = early.images(number)
        names = ["logits", "probabilities", "exit_logits"]
        logits, probabilities, every = session(early.single).run(names, {"images": images.numpy()})
        expected = torch.stack(early.network(images), dim=1)
        assert every.shape == expected.shape
        np.testing.assert_allclose(every, expected.numpy(), atol=1e-4)
        np.testing.assert_array_equal(logits, every[:, -1])
        np.testing.assert_allclose(probabilities, expected[:, -1].softmax(1).numpy(), atol=1e-5)


@torch.no_grad()
def test_limits_choose_every_exit_and_its_answer_is_that_of_the_weights(early: Early) -> None:
    image = early.images(1)
    answers = early.network(image)
    last = len(answers) - 1
    for chosen, expected in enumerate(answers):
        for at_it in (0.0, -INFINITE):
            limits = [INFINITE] * chosen + [at_it] * (last - chosen)
            logits, probabilities, left_at = at_limits(early.early_exit, image, limits)
            assert left_at == chosen
            np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
            np.testing.assert_allclose(probabilities, expected.softmax(1).numpy(), atol=1e-5)


@torch.no_grad()
def test_a_limit_is_reached_by_a_confidence_that_equals_it_and_missed_by_one_below(early: Early) -> None:
    image = early.images(1)
    infinite = [INFINITE] * (len(early.network(image)) - 2)
    *_, first = at_limits(early.early_exit, image, [0.0, *infinite])
    assert first == 0
    _, probabilities, _ = at_limits(early.early_exit, image, [0.0, *infinite])
    confidence = probabilities.max()
    assert at_limits(early.early_exit, image, [float(confidence), *infinite])[2] == 0
    above = float(np.nextafter(confidence, np.float32(1)))
    assert at_limits(early.early_exit, image, [above, *infinite])[2] == len(infinite) + 1


def test_an_early_answer_computes_nothing_that_only_later_exits_need(early: Early) -> None:
    """Every tensor behind the first exit is made NaN: an answer there is none of its business."""
    model = onnx.load_from_string(early.early_exit)
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    behind = next(attribute.g for attribute in choice.attribute if attribute.name == "else_branch")
    poisoned = 0
    for tensor in behind.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, np.nan), tensor.name))
            poisoned += array.size
    assert poisoned > 100
    later = len(early.network(early.images(1))) - 2
    content = model.SerializeToString()
    logits, _, left_at = at_limits(content, early.images(1), [0.0] + [0.0] * later)
    assert (left_at, bool(np.isfinite(logits).all())) == (0, True)
    logits, _, left_at = at_limits(content, early.images(1), [INFINITE] * (1 + later))
    assert (left_at, bool(np.isfinite(logits).any())) == (1 + later, False)


def test_both_graphs_hold_every_weight_once(early: Early) -> None:
    assert onnx_graphs.count_parameters(early.early_exit) == onnx_graphs.count_parameters(early.single)
    folded = folded_copy(early.network)
    weights = sum(parameter.numel() for parameter in folded.parameters())
    assert onnx_graphs.count_parameters(early.single) == weights + sum(b.numel() for b in folded.buffers())


def test_a_graph_that_stops_early_says_what_it_takes(early: Early) -> None:
    opened = session(early.early_exit)
    exits = len(early.network(early.images(1)))
    shape = list(early.network.image_shape)
    assert {given.name: given.shape for given in opened.get_inputs()} == {"images": [1, *shape], "limits": [exits - 1]}
    assert [(given.name, given.shape, given.type) for given in opened.get_outputs()] == [
        ("logits", [1, 10], "tensor(float)"),
        ("probabilities", [1, 10], "tensor(float)"),
        ("exit", [1], "tensor(int64)"),
    ]
    assert opened.get_modelmeta().custom_metadata_map == {"exits": str(exits)}


def test_a_network_with_one_exit_has_no_graph_that_stops_early() -> None:
    assert list(onnx_graphs.plain_graphs([build("resnet8", images=SMALL, width=2).eval()])) == ["single"]
