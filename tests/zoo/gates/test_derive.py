from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from zoo import paths
from zoo.errors import BadInput, BadPath
from zoo.gates.derive import Ensemble, derive, folded_copy, mean_probability, recalibrate
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build, num_exits
from zoo.weights.models import AtExit

SMALL = ImageFormat(height=16, width=16)


class Fixed(nn.Module):
    """Answers with the same logits whatever it is shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.get_buffer("logits")


@pytest.fixture
def rgn() -> RandomGatedNetwork:
    network = randomly_gate(build("resnet8", images=SMALL, width=4))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


def some_path(rgn: RandomGatedNetwork, seed: int = 0) -> paths.Path:
    return paths.sample(rgn.num_gates, rgn.candidates, random.Random(seed))


def test_a_derived_network_is_the_templates_plain_self(rgn: RandomGatedNetwork) -> None:
    plain = build("resnet8", images=SMALL, width=4)
    derived = derive(rgn.train(), some_path(rgn))
    assert type(derived) is type(plain)
    assert not any(module.training for module in derived.modules())
    assert [(name, t.shape) for name, t in derived.state_dict().items()] == [
        (name, t.shape) for name, t in plain.state_dict().items()
    ]
    assert [name for name, _ in derived.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.requires_grad for parameter in derived.parameters())


def test_a_derived_network_shares_nothing_with_its_rgn(rgn: RandomGatedNetwork) -> None:
    images, path = torch.rand(2, 3, 16, 16), some_path(rgn)
    derived = derive(rgn.eval(), path)
    before = rgn(images, path)
    for tensor in derived.state_dict().values():
        tensor.zero_()
    assert torch.equal(rgn(images, path), before)


def test_deriving_leaves_the_rgns_mode_and_weights_alone(rgn: RandomGatedNetwork) -> None:
    rgn.train()
    before = {name: tensor.clone() for name, tensor in rgn.state_dict().items()}
    derive(rgn, some_path(rgn))
    assert all(module.training for module in rgn.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in rgn.state_dict().items())


def test_a_path_that_does_not_fit_is_refused(rgn: RandomGatedNetwork) -> None:
    with pytest.raises(BadPath, match="has 1 gates, expected 7"):
        derive(rgn, (0,))


@pytest.mark.parametrize("num_members", [2, 3, 8])
def test_an_ensemble_answers_with_the_log_of_the_mean_probability(num_members: int) -> None:
    logits = torch.randn(num_members, 5, 10, dtype=torch.float64)
    answer = Ensemble([Fixed(member) for member in logits])(torch.zeros(5))
    torch.testing.assert_close(answer, logits.softmax(-1).mean(0).log())
    torch.testing.assert_close(answer.exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_one_member_answers_with_its_own_logits() -> None:
    logits = torch.randn(4, 10) * 50
    assert torch.equal(Ensemble([Fixed(logits)])(torch.zeros(4)), logits)


def test_equal_members_answer_with_their_own_log_probabilities() -> None:
    logits = torch.randn(4, 10)
    torch.testing.assert_close(mean_probability(torch.stack([logits] * 3)), logits.log_softmax(-1))


def test_extreme_logits_do_not_saturate() -> None:
    sure = torch.tensor([[1e4, 0.0, -1e4]])
    contrary = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    answer = mean_probability(torch.stack([sure, contrary]))
    # Closed form: the outer classes have probability 1/2 each, the middle one exp(-10000).
    torch.testing.assert_close(answer, torch.tensor([[0.5, 1.0, 0.5]]).log() + torch.tensor([[0.0, -1e4, 0.0]]))
    (gradient,) = torch.autograd.grad(answer[0, 1], contrary)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_an_ensemble_of_derived_paths_registers_its_members(rgn: RandomGatedNetwork) -> None:
    members = [derive(rgn, some_path(rgn, seed)) for seed in range(3)]
    ensemble = Ensemble(members)
    single = sum(parameter.numel() for parameter in members[0].parameters())
    assert sum(parameter.numel() for parameter in ensemble.parameters()) == 3 * single
    ensemble.train()
    assert all(member.training for member in members)


def test_an_ensemble_of_nobody_is_refused() -> None:
    with pytest.raises(BadInput, match="at least one member, got none"):
        Ensemble([])


def test_a_folded_copy_is_the_same_function_without_norms(rgn: RandomGatedNetwork) -> None:
    derived = derive(rgn, some_path(rgn))
    folded = folded_copy(derived)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(folded(images), derived(images), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in derived.modules())


def test_a_network_in_training_mode_is_not_folded(rgn: RandomGatedNetwork) -> None:
    with pytest.raises(BadInput, match=r"CifarResNet is in training mode; .*call \.eval\(\) first"):
        folded_copy(derive(rgn, some_path(rgn)).train())


def test_recalibrating_on_one_batch_gives_the_datas_exact_mean_and_variance() -> None:
    images = torch.randn(6, 3, 5, 5) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + 4
    network = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(network, [images])
    norm = network[0]
    torch.testing.assert_close(norm.running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, images.var((0, 2, 3), unbiased=True))


def test_recalibrating_on_many_batches_gives_their_plain_average() -> None:
    batches = [torch.randn(4, 2, 3, 3) + shift for shift in (0.0, 1.0, 5.0)]
    network = nn.Sequential(nn.BatchNorm2d(2)).train()
    recalibrate(network, iter(batches))
    norm = network[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert int(norm.num_batches_tracked) == 3


def test_recalibrating_changes_statistics_only(rgn: RandomGatedNetwork) -> None:
    derived = derive(rgn, some_path(rgn))
    momenta = [module.momentum for module in derived.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: parameter.clone() for name, parameter in derived.named_parameters()}
    recalibrate(derived.train(), [torch.rand(8, 3, 16, 16)])
    assert not any(module.training for module in derived.modules())
    assert [module.momentum for module in derived.modules() if isinstance(module, nn.BatchNorm2d)] == momenta
    assert all(torch.equal(parameter, before[name]) for name, parameter in derived.named_parameters())
    assert all(parameter.grad is None for parameter in derived.parameters())


def test_recalibrating_undoes_statistics_of_other_images(rgn: RandomGatedNetwork) -> None:
    derived = derive(rgn, some_path(rgn))
    images = torch.rand(64, 3, 16, 16)
    recalibrate(derived, [images])
    means = []
    hook = derived.get_submodule("norm1").register_forward_hook(
        lambda _, __, output: means.append(output.mean((0, 2, 3)))
    )
    derived(images)
    hook.remove()
    torch.testing.assert_close(means[0], derived.get_submodule("norm1").bias, rtol=0, atol=1e-4)


def test_recalibrating_on_nothing_is_refused_and_changes_nothing(rgn: RandomGatedNetwork) -> None:
    derived = derive(rgn, some_path(rgn))
    before = {name: tensor.clone() for name, tensor in derived.state_dict().items()}
    with pytest.raises(BadInput, match="at least one batch of training images, got none"):
        recalibrate(derived, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in derived.state_dict().items())


@torch.no_grad()
def test_folding_keeps_every_exit_and_says_how_many() -> None:
    network = build("msdnet", images=SMALL, exits=3, base=1, step=1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.rand(3, 3, 16, 16)
    folded = folded_copy(network.eval())
    assert num_exits(folded) == 3
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for found, expected in zip(folded(images), network(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folding_one_exit_leaves_out_what_only_the_others_need() -> None:
    network = build("small_cnn3", images=SMALL).eval()
    folded = folded_copy(AtExit(network, 0))
    expected = [*network.stage1.parameters(), *network.exit1.parameters()]
    assert num_exits(folded) == 1
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in expected)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(folded(images), network(images)[0])
