"""Training mode, wherever it hides in a model, is refused before a statistic moves."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attacks import (
    LinfBudget,
    apgd_eot,
    eot_pgd,
    path_model,
    path_sampler,
    pgd,
    unchecked,
)
from zoo.attacks.budget import Budget
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork

EPS = 8 / 255
LINF = LinfBudget(eps=EPS, steps=3)
Attack = Callable[..., Tensor]
Inside = Callable[[Tensor, Tensor, Budget], None]


def small() -> nn.Sequential:
    """Return a network in training mode; its BatchNorm and its dropout depend on it."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 5)
    )


class Functional(nn.Module):
    """Drops by the functional, with what it is told."""

    def __init__(self, part: nn.Module, **options: bool) -> None:
        super().__init__()
        self.part, self.options = part, options

    def forward(self, images: Tensor) -> Tensor:
        return self.part(F.dropout(images, **self.options))  # type: ignore[no-any-return]


class ByMode(nn.Module):
    """Drops by the functional, as its own mode says."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, images: Tensor) -> Tensor:
        return self.part(F.dropout(images, training=self.training))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention that drops always: the functional knows no mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8 * 24, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.reshape(len(images), 8, 24)
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.2)
        return self.linear(seen.flatten(1))  # type: ignore[no-any-return]


class Unregistered(nn.Module):
    """Members in a plain list, which `eval` does not reach."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.kept = [*members]

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.kept]).mean(0)


class Holder:
    """An object with a network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def answer(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]


HIDDEN = small()


def by_global(images: Tensor) -> Tensor:
    return HIDDEN(images)  # type: ignore[no-any-return]


def by_list(images: Tensor) -> Tensor:
    return torch.stack([HIDDEN(part) for part in images.split(1)]).flatten(0, 1)


def frozen_in(training: nn.Module) -> Callable[[Tensor], Tensor]:
    def answer(images: Tensor) -> Tensor:
        return training(images)  # type: ignore[no-any-return]

    return answer


TRAINING: dict[str, Callable[[], Any]] = {
    "a module": small,
    "one layer": lambda: nn.ModuleDict({"a": small().eval(), "b": small()})["b"],
    "a scripted module": lambda: torch.jit.script(small()),
    "a traced module": lambda: torch.jit.trace(small(), torch.rand(2, 3, 8, 8), check_trace=False),
    "a bound method": lambda: small().forward,
    "a method of an object": lambda: Holder(small()).answer,
    "a partial": lambda: functools.partial(lambda network, images: network(images), small()),
    "a closure": lambda: frozen_in(small()),
    "a closure over a scripted one": lambda: frozen_in(torch.jit.script(small())),
    "a global": lambda: by_global,
    "a global in a list": lambda: by_list,
    "an object's attribute": lambda: (lambda holder: lambda images: holder.network(images))(Holder(small())),
    "a plain list": lambda: Unregistered(small()).eval(),
    "an ensemble": lambda: Ensemble([small().eval(), small()]),
    "F.dropout by default": lambda: Functional(small().eval()).eval(),
    "F.dropout by the mode": lambda: ByMode(small().eval()),
    "attention": lambda: Attention().eval(),
    "multi-head attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 32, batch_first=True), nn.Flatten(), nn.Linear(192, 5)
    ),
}


@pytest.mark.parametrize("kind", TRAINING)
def test_a_model_in_training_mode_is_refused_and_left_alone(kind: str, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is on its way out
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = TRAINING[kind]()
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(BadInput, match=r"training mode"):
        pgd(model, images, torch.zeros(6, dtype=torch.int64), LINF)
    if kind != "a traced module":  # its counter stands before what shows the mode
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_every_attack_refuses_training_mode(every_attack: Attack, images: Tensor) -> None:
    model = small()
    with pytest.raises(BadInput, match=r"\.eval\(\)"):
        every_attack(model, images, torch.zeros(6, dtype=torch.int64), LINF)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("attack", ["fgsm", "m-di2", "apgd", "square", "rays", "arc"], indirect=True)
def test_dropout_by_the_functional_is_refused_by_attacks_on_deterministic_models(
    attack: Attack, images: Tensor
) -> None:
    with pytest.raises(BadInput, match="training mode"):
        attack(Attention().eval(), images, torch.zeros(6, dtype=torch.int64), LINF)


class StochasticDepth(nn.Module):
    """Leaves a branch out at random in training mode, as the layer of torchvision's ConvNeXt does."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, images: Tensor) -> Tensor:
        return images + self.dropped(self.part(images))

    def dropped(self, branch: Tensor) -> Tensor:
        return branch * torch.empty(len(branch), 1, 1, 1).bernoulli_(0.5) if self.training else branch


def test_stochastic_depth_is_refused_by_name_in_training_mode_alone(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    network = nn.Sequential(StochasticDepth(nn.Conv2d(3, 3, 3, padding=1)), model).eval()
    assert pgd(network, images, labels, LINF).shape == images.shape
    network[0].train()
    with pytest.raises(BadInput, match=r"StochasticDepth '0' is in training mode"):
        pgd(network, images, labels, LINF)


def test_layers_that_have_no_mode_may_be_in_training_mode(images: Tensor) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(144, 5))
    assert plain.training
    labels = plain(images).argmax(1)
    assert pgd(plain, images, labels, LINF).shape == images.shape


def test_a_network_in_training_mode_beside_the_attacked_one_does_no_harm(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    trainer = Holder(model)
    trainer.trained = small()  # type: ignore[attr-defined]
    assert pgd(lambda pixels: trainer.network(pixels), images, labels, LINF).shape == images.shape


@pytest.mark.parametrize("folded", [False, True])
def test_paths_of_a_network_in_training_mode_are_refused_unless_folded(
    folded: bool, rgn: RandomGatedNetwork, images: Tensor
) -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    sampler = path_sampler(rgn.train(), random.Random(0), folded=folded)
    if folded:
        assert eot_pgd(sampler, images, labels, LINF, draws=2).shape == images.shape
        return
    for attack in (eot_pgd, apgd_eot):
        with pytest.raises(BadInput, match="training mode"):
            attack(sampler, images, labels, LINF, draws=2)
    with pytest.raises(BadInput, match="training mode"):
        path_model(rgn, [0] * rgn.num_gates, folded=False)


def test_training_attacks_its_network_as_it_is(images: Tensor) -> None:
    torch.manual_seed(0)
    model = small()
    moved = pgd(unchecked(model), images, torch.zeros(6, dtype=torch.int64), LINF)
    assert int(model[1].num_batches_tracked) == LINF.steps  # type: ignore[arg-type]
    assert bool((moved != images).any())


class ByProperty(ByMode):
    """Draws by numpy, where no operation shows it, as a property says."""

    @property
    def draws(self) -> bool:
        return self.training

    def forward(self, images: Tensor) -> Tensor:
        return self.part(images * (0.0 if self.draws and np.random.rand() < 0.5 else 1.0))  # type: ignore[no-any-return]


def decorated(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def wrapped(*given: Any) -> Tensor:
        return method(*given)

    return wrapped


class Decorated(ByMode):
    @decorated
    def forward(self, images: Tensor) -> Tensor:
        return self.part(images * (0.0 if self.training and np.random.rand() < 0.5 else 1.0))  # type: ignore[no-any-return]


class ByGetattr(ByMode):
    def forward(self, images: Tensor) -> Tensor:
        draws = getattr(self, "training") and np.random.rand() < 0.5  # noqa: B009 -- people write it
        return self.part(images * (0.0 if draws else 1.0))  # type: ignore[no-any-return]


class Dropping:
    """A hook that is an object."""

    def __call__(self, module: nn.Module, given: Any, hidden: Tensor) -> Tensor:
        return hidden * (0.0 if module.training and np.random.rand() < 0.5 else 1.0)


class Slotted:
    __slots__ = ("network",)

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))


def hooked(hook: Any) -> nn.Module:
    network = plain_network()
    network[1].register_forward_hook(hook)
    return network


def patched() -> nn.Module:
    network = plain_network()
    inner = network.forward

    def forward(images: Tensor) -> Tensor:
        return inner(images * (0.0 if network.training and np.random.rand() < 0.5 else 1.0))  # type: ignore[no-any-return]

    network.forward = forward  # type: ignore[method-assign]
    return network


def by_keyword() -> Callable[[Tensor], Tensor]:
    def answer(images: Tensor, *, network: nn.Module = small()) -> Tensor:  # noqa: B008 -- what is tried
        return network(images)  # type: ignore[no-any-return]

    return answer


HIDDEN_MODE: dict[str, Callable[[], Any]] = {
    "a hook": lambda: hooked(lambda module, given, hidden: hidden * (0.0 if module.training else 1.0)),
    "a hook that is an object": lambda: hooked(Dropping()),
    "a partial of a hook": lambda: hooked(functools.partial(Dropping.__call__, Dropping())),
    "a property": lambda: ByProperty(plain_network()),
    "a decorated method": lambda: Decorated(plain_network()),
    "getattr": lambda: ByGetattr(plain_network()),
    "a forward of its own": patched,
    "a keyword's default": by_keyword,
    "a slot": lambda: Slotted(small()),
}


@pytest.mark.parametrize("kind", HIDDEN_MODE)
def test_training_mode_in_hooks_and_properties_is_refused(kind: str, images: Tensor) -> None:
    with pytest.raises(BadInput, match="training mode"):
        pgd(HIDDEN_MODE[kind](), images, torch.zeros(6, dtype=torch.int64), LINF)


class Counting(nn.Module):
    """Moves a buffer of another module, in a helper that no look at the class finds."""

    def __init__(self) -> None:
        super().__init__()
        self.part = plain_network()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        moving_average(self, images)
        return self.part(images - self.mean)  # type: ignore[no-any-return]


def moving_average(module: Any, images: Tensor) -> None:
    if module.training:
        module.mean = 0.9 * module.mean + 0.1 * images.mean().detach()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("attack", ["pgd", "square", "eot"], indirect=True)
@pytest.mark.parametrize("kind", ["spectral norm", "a buffer by hand"])
def test_a_model_whose_buffers_move_is_refused_and_left_as_it_was(kind: str, attack: Attack, images: Tensor) -> None:
    torch.manual_seed(0)
    network: nn.Module = Counting()
    if kind == "spectral norm":
        network = nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(192, 5)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(BadInput, match="training mode"):
        attack(network, images, labels, LINF)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network.eval()
    assert attack(network, images, labels, LINF).shape == images.shape


def test_a_model_that_is_itself_the_part_in_training_mode_is_not_called_by_an_empty_name(images: Tensor) -> None:
    with pytest.raises(BadInput, match="the model, a ByMode, is in training mode"):
        pgd(ByMode(plain_network()), images, torch.zeros(6, dtype=torch.int64), LINF)
