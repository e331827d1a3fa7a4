"""Networks as strangers write them: gated, derived and exported they answer as torch does, or are refused."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from unsettled import unsettle

from zoo import paths
from zoo.errors import BadInput, GatingWarning
from zoo.export import assembly, onnx_graphs
from zoo.export.stencil import Stencil
from zoo.gates import graphs, self_check
from zoo.gates.derive import derive, folded_copy
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.runtime import session
from zoo.weights.checkpoint import Architecture, load, load_network_state, network_state, save_network

SIZE = 12
BATCHES = (1, 2, 5)


class Parts(nn.Module):
    """Two convolutions, a norm and a classifier, wired by the test."""

    image_shape = (3, SIZE, SIZE)

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = norm(6)
        self.other_norm = norm(6)
        self.classifier = nn.Linear(6, 5)

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(features.flatten(2).mean(-1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.other_norm(self.b(F.relu(self.norm(self.a(images))))))


class OneNormTwice(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.norm(self.b(F.relu(self.norm(self.a(images))))))


class OneConvolutionTwice(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.norm(self.b(F.relu(self.b(F.relu(self.a(images)))))))


class NormThatActivates(nn.BatchNorm2d):
    def forward(self, features: Tensor) -> Tensor:
        return F.relu(super().forward(features) + 0.1)


class ExpressionOfAWeight(Parts):
    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.a(images))
        mixed = F.conv2d(images, self.a.weight.sum((2, 3), keepdim=True))
        return self.classify(self.norm(self.b(features + mixed)))


class WeightReadBesideItsNorm(Parts):
    """The weight of a convolution whose norm is its own is used once more: folding would change what that reads."""

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.a(images)))
        return self.classify(self.b(features + F.conv2d(images, self.a.weight, padding=1)))


class StatisticsRead(Parts):
    """A gated norm's buffer takes part in the answer."""

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.a(images)))
        return self.classify(self.b(features * (1 + self.norm.running_var[:, None, None])))


class FirstColumn(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.b(F.relu(self.norm(self.a(images)))).flatten(2)[:, :, 0])


class FirstPixel(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(images))))[:, :, 0, 0]


class MeanOfThreeDimensions(Parts):
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.b(F.relu(self.norm(self.a(images)))).flatten(2)
        scaled = tokens * (1 + 5 * tokens.mean((-2, -1), keepdim=True))
        return self.classifier(scaled.mean(-1))


class IsTensor(Parts):
    def forward(self, images: Tensor) -> Tensor:
        features = self.a(images) if isinstance(images, torch.Tensor) else self.a(images) * 0.5
        return self.classify(self.norm(self.b(F.relu(features))))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.sign() * values.abs().sqrt()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class OwnGradient(Parts):
    """Has a function with a gradient of its own, and puts pieces together again."""

    def forward(self, images: Tensor) -> Tensor:
        features = StraightThrough.apply(self.norm(self.a(images)))
        return self.classify(self.b(torch.cat(features.chunk(2, 1)[::-1], 1)))


class OptionalArgument(Parts):
    def forward(self, images: Tensor, mask: Tensor | None = None, scale: float = 1.5) -> Tensor:
        features = self.a(images) if mask is None else self.a(images) * mask
        return self.classify(self.norm(self.b(F.relu(features * scale))))


class ReadsWeights(Parts):
    """Asks a gated weight for its type and shape."""

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.a.weight.dtype).to(self.b.weight.device)
        return self.classify(self.norm(self.b(F.relu(self.a(images))))) * self.a.weight.shape[0]


class Strided(nn.Conv2d):
    """A convolution that pads on one side, as TensorFlow's do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.pad(images, (0, 1, 0, 1)))


class ScaledWeight(nn.Conv2d):
    """A convolution whose weight has mean 0 and deviation 1, as in networks without norms."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-4)
        return F.conv2d(images, weight, self.bias, padding=self.padding)


class KernelByAnotherName(nn.Conv2d):
    def __init__(self, *arguments: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kernel = nn.Parameter(self.weight.detach().clone())
        self.register_parameter("weight", None)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.kernel, self.bias, padding=1)


class ClassToken(Parts):
    """Tokens of a convolution behind one that is learnt, which answers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.b(F.relu(self.norm(self.a(images)))).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.classifier(self.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0])


def with_convolution(kind: type[nn.Conv2d]) -> nn.Module:
    network = Parts()
    network.b = kind(6, 6, 3, padding=1)
    return network


def parametrised(by: Callable[..., nn.Module], **options: Any) -> nn.Module:
    network = Parts()
    by(network.a, **options)
    by(network.b, **options)
    return network


def hooked(part: str) -> nn.Module:
    network = Parts()
    network.get_submodule(part).register_forward_hook(lambda _, __, output: output * 1.5 + 0.3)
    return network


calls_of_conv2d = pytest.mark.filterwarnings("ignore:.* convolution.* without a gate:zoo.errors.GatingWarning")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Parts,
    "one norm behind two convolutions": OneNormTwice,
    "one convolution called twice": OneConvolutionTwice,
    "a norm that activates": lambda: Parts(NormThatActivates),
    "a group norm": lambda: Parts(lambda channels: nn.GroupNorm(2, channels)),
    "an expression of a gated weight": ExpressionOfAWeight,
    "a weight read beside its norm": WeightReadBesideItsNorm,
    "statistics that are read": StatisticsRead,
    "a scalar index": FirstColumn,
    "two scalar indices": FirstPixel,
    "a mean over two of three dimensions": MeanOfThreeDimensions,
    "optional arguments": OptionalArgument,
    "type and shape of a gated weight": ReadsWeights,
    "a class token": ClassToken,
    "a subclass of Conv2d": lambda: with_convolution(Strided),
    "a weight of another name": lambda: with_convolution(KernelByAnotherName),
    "a gradient of its own": OwnGradient,
    "scaled weights": lambda: with_convolution(ScaledWeight),
    "weight_norm": lambda: parametrised(parametrizations.weight_norm),
    "spectral_norm": lambda: parametrised(parametrizations.spectral_norm),
    "a hook on a convolution": lambda: hooked("a"),
    "a hook on a norm": lambda: hooked("norm"),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return unsettle(NETWORKS[name]()).eval()


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


def single_graph(network: nn.Module) -> bytes:
    return onnx_graphs.plain_graphs([network])["single"]


def random_path(rgn: RandomGatedNetwork, seed: int = 0) -> paths.Path:
    return paths.sample(rgn.num_gates, rgn.candidates, random.Random(seed))


def answer(content: bytes, batch: Tensor, **feeds: np.ndarray) -> Tensor:
    return torch.from_numpy(session(content).run(["logits"], {"images": batch.numpy(), **feeds})[0])


def assert_equal_answers(found: Tensor, expected: Tensor) -> None:
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * size, rtol=0)


@calls_of_conv2d
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_of_any_kind_answers_alike_gated_derived_folded_and_exported(name: str) -> None:
    rgn = randomly_gate(made(name), candidates=3).eval()
    assert rgn.num_gates == 2
    single, others = random_path(rgn), [random_path(rgn, 1), random_path(rgn, 2)]
    derived = derive(rgn, single)
    exported = onnx_graphs.rgn_graphs(rgn, single, others, gated=True)
    plain = single_graph(derived)
    for batch in map(images, BATCHES):
        expected = rgn(batch, single)
        assert torch.equal(derived(batch), expected)
        assert_equal_answers(folded_copy(derived)(batch), expected)
        assert_equal_answers(answer(exported["single"], batch), expected)
        assert_equal_answers(answer(plain, batch), expected)
        mean = torch.stack([rgn(batch, path).softmax(1) for path in others]).mean(0)
        assert_equal_answers(answer(exported["ensemble"], batch).exp(), mean)
        for path in (single, *others):
            gates = np.array(path, np.int64)
            assert_equal_answers(answer(exported["gated"], batch, gates=gates), rgn(batch, path))


@calls_of_conv2d
@pytest.mark.parametrize("name", NETWORKS)
def test_every_candidate_of_a_network_of_any_kind_changes_the_answer_and_learns(name: str) -> None:
    rgn = randomly_gate(made(name)).eval()
    batch = images(2)
    for gate in range(rgn.num_gates):
        answers = [
            rgn(batch, [int(index == gate) * candidate for index in range(rgn.num_gates)]) for candidate in (0, 1)
        ]
        assert not torch.allclose(*answers, rtol=1e-3)
    rgn.train()
    for candidate in range(2):
        rgn.zero_grad()
        logits = rgn(batch, [candidate] * rgn.num_gates)
        (logits * torch.rand_like(logits)).sum().backward()
        for alternatives in rgn.bank:
            convolution = alternatives[candidate]["conv"]
            gradients = [parameter.grad for name, parameter in convolution.named_parameters() if "bias" not in name]
            assert all(gradient is not None and gradient.any() for gradient in gradients)
            assert all(parameter.grad is None for parameter in alternatives[1 - candidate].parameters())


@calls_of_conv2d
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_of_any_kind_can_change_its_type(name: str) -> None:
    rgn = randomly_gate(made(name)).eval().double()
    path, batch = random_path(rgn), images(2).double()
    derived, last = derive(rgn, path), rgn.num_features
    assert torch.equal(derived(batch), rgn(batch, path))
    assert_equal_answers(rgn.runner(last, rgn.select(path))(batch), derived(batch))
    assert_equal_answers(rgn.runner(last, rgn.folded(path), folded=True)(batch), derived(batch))
    assert_equal_answers(folded_copy(derived)(batch), derived(batch))


# --- which convolutions have a gate ---


class Sum(nn.Module):
    image_shape = (3, SIZE, SIZE)

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.classifier = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        total = self.branches[0](images)
        for branch in self.branches[1:]:
            total = total + branch(images)
        return self.classifier(F.relu(total).mean((2, 3)))


def conv(size: int = 3, channels: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, size, padding=size // 2)


def two(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(), *between, conv(channels=4))


@pytest.mark.parametrize(
    ("branches", "shared"),
    [
        ([conv(), conv(), conv()], []),
        ([conv(), conv(1)], []),
        ([two(nn.ReLU()), conv(1)], ["branches.1"]),
        ([conv(1), two(nn.ReLU())], ["branches.0"]),
        ([two(nn.ReLU()), nn.Sequential(conv(1), nn.BatchNorm2d(4))], ["branches.1.0"]),
        ([two(nn.ReLU()), nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(1))], ["branches.1.1"]),
        ([two(nn.ReLU()), nn.Sequential(conv(), nn.ReLU())], []),  # a second branch, not a shortcut
        ([two(), conv(1)], []),  # both linear: parallel convolutions that a deployment merges
        ([two(nn.ReLU()), two(nn.ReLU()), conv(1)], ["branches.2"]),
    ],
)
def test_only_the_projection_of_a_residual_shortcut_stays_shared(branches: list[nn.Module], shared: list[str]) -> None:
    network = Sum(*copy.deepcopy(branches))
    layers = graphs.convolutions(graphs.trace(network))
    assert [layer.conv for layer in layers if layer.projection] == shared
    assert [layer.conv for layer in randomly_gate(network).layers] == [
        layer.conv for layer in layers if layer.conv not in shared
    ]


def test_branches_of_other_resolutions_that_are_summed_are_no_shortcut() -> None:
    class Resolutions(nn.Module):
        image_shape = (3, SIZE, SIZE)

        def __init__(self) -> None:
            super().__init__()
            self.high, self.low = two(nn.ReLU()), nn.Sequential(conv(), nn.ReLU(), conv(channels=4), nn.ReLU())
            self.up = conv(1, channels=4)

        def forward(self, images: Tensor) -> Tensor:
            high, low = self.high(images), self.low(F.avg_pool2d(images, 2))
            return (high + F.interpolate(self.up(low), scale_factor=2.0)).mean((2, 3))

    assert not any(layer.projection for layer in graphs.convolutions(graphs.trace(Resolutions())))


class Beside(Parts):
    """A convolution that can have no gate beside two that can."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = other

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.b(F.relu(self.a(self.other(images)))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images[:, None])[:, 0]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Functional, "conv2d"),
        (lambda: nn.ConvTranspose2d(3, 3, 3, padding=1), "other (ConvTranspose2d)"),
        (Volume, "other.conv (Conv3d)"),
        (lambda: torch.jit.script(nn.Conv2d(3, 3, 1)), "other (a scripted module)"),
    ],
    ids=["functional", "transposed", "3-d", "scripted"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_convolution_that_can_have_no_gate_is_named_and_counted(other: Callable[[], nn.Module], named: str) -> None:
    network = Beside(other())
    with pytest.warns(GatingWarning) as caught:
        rgn = randomly_gate(network)
    assert rgn.num_gates == 2
    (message,) = [str(warning.message) for warning in caught if warning.category is GatingWarning]
    assert named in message
    assert " 1 convolution " in message


def test_ordinary_networks_are_gated_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        randomly_gate(made("plain"))
    assert caught == []


def test_a_patch_embedding_alone_is_said_to_be_no_ensemble() -> None:
    class Patches(nn.Module):
        image_shape = (3, SIZE, SIZE)

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.classifier = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(F.gelu(self.mix(self.embed(images).flatten(2).transpose(1, 2))).mean(1))

    with pytest.warns(GatingWarning, match="embed"):
        assert randomly_gate(Patches(), candidates=3).num_gates == 1


def test_a_network_whose_only_convolutions_are_of_another_kind_is_refused_with_the_true_reason() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BadInput, match=r"0 \(ConvTranspose2d\)"):
        randomly_gate(network)


# --- what belongs together stays together ---


class Tied(Parts):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.c.weight = self.b.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.c(F.relu(self.b(F.relu(self.norm(self.a(images)))))))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Tied has a single gated layer")
def test_convolutions_that_share_a_weight_go_on_sharing_it_and_are_named() -> None:
    with pytest.warns(GatingWarning, match="b, c"):
        rgn = randomly_gate(unsettle(Tied())).eval()
    path, batch = random_path(rgn), images(3)
    derived: Any = derive(rgn, path)
    assert [layer.conv for layer in rgn.layers] == ["a"]
    assert derived.b.weight is derived.c.weight
    assert torch.equal(derived(batch), rgn(batch, path))
    assert_equal_answers(answer(onnx_graphs.rgn_graphs(rgn, path, [], gated=True)["single"], batch), rgn(batch, path))
    assert_equal_answers(answer(single_graph(derived), batch), derived(batch))
    members = [derive(rgn, [gate]) for gate in (0, 1)]
    mean = torch.stack([member(batch).softmax(1) for member in members]).mean(0)
    assert_equal_answers(answer(onnx_graphs.plain_graphs(members)["ensemble"], batch).exp(), mean)


@pytest.mark.filterwarnings("ignore:Tied has:zoo.errors.GatingWarning")
@pytest.mark.parametrize("gated", [False, True])
def test_tied_weights_survive_being_written_and_read(gated: bool, tmp_path: Path) -> None:
    def built() -> Any:
        return randomly_gate(Tied()) if gated else Tied()

    network, read = built(), built()
    save_network(tmp_path / "weights.safetensors", network, Architecture(network="resnet8"))
    tensors, _ = load(tmp_path / "weights.safetensors")
    load_network_state(read, tensors)
    state = network_state(network)
    assert {"b.weight", "c.weight"} <= state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network_state(read).items())
    template = read.template if gated else read
    assert template.b.weight is template.c.weight


def test_a_module_under_two_names_has_one_gate() -> None:
    network: Any = Parts()
    network.again = network.b
    rgn = randomly_gate(network)
    derived: Any = derive(rgn, random_path(rgn))
    assert [layer.conv for layer in rgn.layers] == ["a", "b"]
    assert derived.again is derived.b
    exported = onnx_graphs.rgn_graphs(rgn.eval(), (0, 1), [], gated=True)
    assert_equal_answers(answer(exported["single"], images(3)), rgn(images(3), (0, 1)).detach())


def test_frozen_convolutions_stay_frozen() -> None:
    network: Any = Parts()
    network.a.requires_grad_(False)
    rgn = randomly_gate(network)
    derived: Any = derive(rgn, random_path(rgn))
    folded: Any = folded_copy(derived)
    for convolution in (rgn.bank[0][0]["conv"], rgn.bank[0][1]["conv"], derived.a, folded.a):
        assert not any(parameter.requires_grad for parameter in convolution.parameters())
    assert all(parameter.requires_grad for parameter in derived.b.parameters())


def test_a_parametrisation_stays_one_in_the_derived_network() -> None:
    rgn = randomly_gate(made("weight_norm"))
    derived: Any = derive(rgn, random_path(rgn))
    assert parametrize.is_parametrized(derived.a, "weight")
    assert {name for name, _ in derived.a.named_parameters()} == {
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }


# --- what is refused ---


class Hidden(nn.Module):
    """Chooses by the shape of its images: what tracing sees depends on the example."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return (self.a(images) if len(images.shape) == 4 and type(images) is torch.Tensor else self.b(images)).mean(
            (2, 3)
        )


class NoisyInEvaluation(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + torch.rand_like(images))


class Chaotic(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(torch.sin(1e7 * self.a(images))[:, :3])


def chaotic() -> nn.Module:
    network = Chaotic()
    network.register_forward_hook(lambda _, __, output: output * 2)
    return network


class Classes(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).argmax(1, keepdim=True)


class Squeezed(Parts):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


class Borrowing(nn.Conv2d):
    """Convolves with the weight of another layer."""

    def __init__(self, lender: nn.Conv2d, *, bias: bool = False) -> None:
        super().__init__(6, 6, 3, padding=1)
        self.lender, self.biased = (lender,), bias

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.lender[0].weight, self.bias if self.biased else None, padding=1)


class Unused(Parts):
    """Runs a convolution for nothing."""

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.a(images)))
        self.b(features)
        return self.classify(features)


def borrowing() -> nn.Module:
    network = Parts()
    network.b = Borrowing(nn.Conv2d(6, 6, 3))
    return network


def replaced_forward() -> nn.Module:
    network: Any = Parts()
    network.forward = lambda images: Parts.forward(network, images) * images.mean()
    return network


def not_finite() -> nn.Module:
    network = Parts()
    nn.init.constant_(network.classifier.weight, float("nan"))
    return network


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (Hidden, "Hidden"),
        (NoisyInEvaluation, "differently at each call"),
        (Squeezed, "batch of 1"),
        (replaced_forward, "does not answer as Parts"),
        (IsTensor, "does not answer as IsTensor"),
        (lambda: nn.DataParallel(Parts()), "network.module"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()), "no shape yet"),
        (lambda: randomly_gate(Parts()), "gated already"),
        (chaotic, "brighter"),
        (Classes, "int64"),
        (not_finite, "not finite"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1), nn.Flatten()), "0 has a single weight"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 17 * 17, 5)), "image_shape"),
    ],
)
def test_what_would_answer_otherwise_than_torch_is_refused(network: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        randomly_gate(network().eval())


@pytest.mark.parametrize("noise", [float("nan"), float("inf"), -0.1])
def test_noise_that_is_no_amount_is_refused(noise: float) -> None:
    with pytest.raises(BadInput, match=str(noise)):
        randomly_gate(Parts(), start="copy", noise=noise)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*_norm.*:FutureWarning")
@pytest.mark.parametrize("refused", [randomly_gate, folded_copy, single_graph])
@pytest.mark.parametrize(
    "hook",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    ],
)
def test_a_weight_that_a_hook_computes_is_refused_with_the_way_out(
    hook: Callable[[nn.Module], object], refused: Callable[[nn.Module], object]
) -> None:
    network = Parts()
    hook(network.a)
    with torch.no_grad():
        network.eval()(images(1))  # from now on it could be copied
    with pytest.raises(BadInput, match=r"a has its weight from a hook.*parametrizations.*prune\.remove"):
        refused(network)


def test_candidates_that_cannot_be_told_apart_yet_are_named() -> None:
    network = made("plain")
    nn.init.zeros_(network.get_parameter("b.weight"))
    with pytest.warns(GatingWarning, match="candidates of b start equal"):
        randomly_gate(network)


def test_a_weight_that_is_not_the_layers_own_is_found_beside_a_bias_that_is() -> None:
    network = Parts()
    network.b = Borrowing(nn.Conv2d(6, 6, 3), bias=True)
    with pytest.raises(BadInput, match=r"b cannot be gated.*b\.weight"):
        randomly_gate(network.eval())


@pytest.mark.parametrize("made_of", [single_graph, folded_copy])
def test_a_norm_left_in_training_mode_is_named(made_of: Callable[[nn.Module], object]) -> None:
    network: Any = made("plain")
    network.other_norm.train()
    with pytest.raises(BadInput, match="other_norm of Parts is in training mode"):
        made_of(network)


def test_a_hook_that_tracing_cannot_see_is_refused() -> None:
    network = Parts().eval()
    network.register_forward_hook(lambda _, __, output: output * 2)
    with pytest.raises(BadInput, match="does not answer as Parts"):
        randomly_gate(network)
    with pytest.raises(BadInput, match="does not answer as Parts"):
        folded_copy(network)


def test_two_gates_that_meet_in_one_operation_cannot_be_exported() -> None:
    class Mixed(Parts):
        def forward(self, images: Tensor) -> Tensor:
            features = F.relu(self.a(images))
            return self.classify(self.b(F.conv2d(features, self.b.weight * self.a.weight.mean(), padding=1)))

    with pytest.warns(GatingWarning, match="conv2d"):
        rgn = randomly_gate(Mixed().eval())
    with pytest.raises(BadInput, match="gates"):
        onnx_graphs.rgn_graphs(rgn, (0, 0), [], gated=False)


def test_a_forward_that_torch_cannot_export_is_refused_in_a_sentence() -> None:
    class Branching(Parts):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if images.mean() > 0.5 else -super().forward(images)

    with pytest.raises(BadInput, match="Branching"):
        single_graph(Branching().eval())


@pytest.mark.parametrize("shape", [12, (12, 12), "3x12x12", (3, 12.0, 12), (3, -1, 12)])
@pytest.mark.parametrize("asked", [randomly_gate, single_graph])
def test_a_shape_of_images_that_is_none_is_refused(shape: object, asked: Callable[[nn.Module], object]) -> None:
    network: Any = made("plain")
    network.image_shape = shape
    with pytest.raises(BadInput, match="image_shape of Parts"):
        asked(network)


def test_an_ensemble_of_no_networks_or_of_unequal_ones_is_refused() -> None:
    with pytest.raises(BadInput, match="at least one"):
        onnx_graphs.plain_graphs([])
    other: Any = made("plain")
    other.again = nn.Linear(2, 2)
    with pytest.raises(BadInput, match=r"network 2 .*'again\.bias'"):
        onnx_graphs.plain_graphs([made("plain"), other.eval()])


def test_a_member_in_training_mode_is_refused_and_stays_in_it() -> None:
    training = made("plain").train()
    with pytest.raises(BadInput, match="training mode"):
        onnx_graphs.plain_graphs([made("plain"), training])
    assert all(module.training for module in training.modules())


def test_a_tensor_called_like_an_input_of_the_graph_is_refused() -> None:
    network: Any = made("plain")
    network.gates = nn.Parameter(torch.ones(1))
    with pytest.raises(BadInput, match="'gates'"):
        single_graph(network)


@pytest.mark.parametrize("gated", [False, True])
def test_a_graph_too_large_for_one_file_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    rgn = randomly_gate(made("plain")).eval()
    assert assembly.LARGEST == 2**31 - 2**20
    monkeypatch.setattr(assembly, "LARGEST", 2_000)
    with pytest.raises(BadInput, match="GiB"):
        onnx_graphs.rgn_graphs(rgn, None if gated else (0, 0), [], gated=gated)


# --- the checks themselves find a planted defect ---


def spoilt(stencil: Stencil) -> Stencil:
    shared = {name: array * np.float32(1.01) if array.ndim > 1 else array for name, array in stencil.shared.items()}
    return replace(stencil, shared=shared)


@pytest.mark.parametrize(
    "export",
    [
        lambda rgn: onnx_graphs.rgn_graphs(rgn, (0, 1), [], gated=False),
        lambda rgn: onnx_graphs.rgn_graphs(rgn, None, [(0, 1), (1, 1)], gated=False),
        lambda rgn: onnx_graphs.rgn_graphs(rgn, None, [], gated=True),
        lambda rgn: single_graph(derive(rgn, (0, 1))),
    ],
    ids=["single", "ensemble", "gated", "plain"],
)
def test_a_graph_that_differs_from_its_network_is_never_returned(
    monkeypatch: pytest.MonkeyPatch, export: Callable[[RandomGatedNetwork], object]
) -> None:
    rgn = randomly_gate(made("plain")).eval()
    right = onnx_graphs.stencil_of
    monkeypatch.setattr(onnx_graphs, "stencil_of", lambda *arguments: spoilt(right(*arguments)))
    with pytest.raises(BadInput, match="does not answer as"):
        export(rgn)


@pytest.mark.parametrize("entrance", [randomly_gate, folded_copy, self_check.trace])
def test_a_trace_that_differs_from_the_forward_is_found(
    monkeypatch: pytest.MonkeyPatch, entrance: Callable[[nn.Module], object]
) -> None:
    network = made("plain")
    right = graphs.trace

    def wrong(traced: nn.Module) -> Any:
        graph = right(traced)
        (node,) = (node for node in graph.graph.nodes if "relu" in node.name)
        node.replace_all_uses_with(node.args[0])
        graph.recompile()
        return graph

    entrance(network)
    monkeypatch.setattr(graphs, "trace", wrong)
    with pytest.raises(BadInput, match="does not answer as Parts"):
        entrance(network)


@pytest.mark.parametrize("network", [borrowing, Unused])
def test_a_candidate_that_changes_nothing_is_found(network: Callable[[], nn.Module]) -> None:
    with pytest.raises(BadInput, match=r"b cannot be gated.*b\.weight"):
        randomly_gate(network().eval())
