"""How attacks ask a model: it gets copies, and whether it answers at random is noticed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoo.attacks import (
    LinfBudget,
    RandomModel,
    apgd_eot,
    eot_pgd,
    path_model,
    path_sampler,
    pgd,
    square,
)
from zoo.attacks.budget import Budget
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork
from zoo.weights.models import RandomGates

EPS = 8 / 255
LINF = LinfBudget(eps=EPS, steps=3)
Attack = Callable[..., Tensor]
Inside = Callable[[Tensor, Tensor, Budget], None]


def test_a_model_that_normalises_in_place_gets_a_copy(
    every_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    def apart(pixels: Tensor) -> Tensor:
        return model((pixels - 0.5) / 0.2)  # type: ignore[no-any-return]

    def in_place(pixels: Tensor) -> Tensor:
        return model(pixels.sub_(0.5).div_(0.2))  # type: ignore[no-any-return]

    def run(asked: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(5)
        return every_attack(asked, images, labels, LINF)

    given = images.clone()
    found = run(in_place)
    assert torch.equal(images, given)
    assert torch.equal(found, run(apart))
    assert float((found.double() - images.double()).abs().max()) <= EPS


def test_members_of_an_ensemble_do_not_see_what_another_did_to_the_images(images: Tensor) -> None:
    class InPlace(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, images: Tensor) -> Tensor:
            return self.part(images.sub_(0.5).div_(0.2))  # type: ignore[no-any-return]

    members = [nn.Sequential(nn.Flatten(), nn.Linear(192, 5)) for _ in range(3)]
    with torch.no_grad():
        expected = Ensemble(members)((images - 0.5) / 0.2)
        assert torch.equal(Ensemble([InPlace(member) for member in members])(images.clone()), expected)


def random_models(rgn: RandomGatedNetwork) -> dict[str, Callable[[Tensor], Tensor]]:
    sampler = path_sampler(rgn, random.Random(0))
    members = [path_model(rgn, [choice] * rgn.num_gates) for choice in range(2)]
    return {
        "the variant gated": RandomGates(rgn, random.Random(1)).eval(),
        "a fresh path per call": lambda images: sampler()(images),
        "one of two members": lambda images: random.choice(members)(images),
        "noise": lambda images: members[0](images + 0.1 * torch.randn_like(images)),
    }


@pytest.mark.parametrize(
    ("kind", "attack"),
    [
        *((kind, "pgd") for kind in ("the variant gated", "a fresh path per call", "one of two members", "noise")),
        *(("one of two members", attack) for attack in ("fgsm", "m-di2", "apgd", "apgd-t", "rays")),
    ],
    indirect=["attack"],
)
def test_a_random_model_is_attacked_draw_by_draw_and_said_to_be_one_once(
    kind: str, attack: Attack, rgn: RandomGatedNetwork, images: Tensor, assert_inside: Inside
) -> None:
    random.seed(0)
    model = random_models(rgn)[kind]
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.warns(RandomModel, match="eot_pgd") as caught:
        found = attack(model, images, labels, LinfBudget(eps=0.1, steps=3))
    assert len(caught) == 1
    assert_inside(found, images, LinfBudget(eps=0.1))


def test_attacks_on_random_models_do_not_warn_of_them(rgn: RandomGatedNetwork, images: Tensor) -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in random_models(rgn).values():
            eot_pgd(lambda model=model: model, images, labels, LINF, draws=2)  # type: ignore[misc]
            apgd_eot(lambda model=model: model, images, labels, LINF, draws=2)  # type: ignore[misc]
            square(model, images, labels, LINF, draws=2, queries=6)
    assert caught == []


def test_a_deterministic_model_with_random_numbers_at_hand_is_not_warned_of(
    rgn: RandomGatedNetwork, images: Tensor
) -> None:
    rng = random.Random(0)
    path = [0] * rgn.num_gates
    model = path_model(rgn, path)
    labels = model(images).argmax(1)
    assert pgd(lambda pixels: model(pixels) if rng else pixels, images, labels, LINF).shape == images.shape


def test_a_random_gated_network_without_a_path_is_refused_in_a_sentence(
    rgn: RandomGatedNetwork, images: Tensor
) -> None:
    with pytest.raises(BadInput, match="path_sampler"):
        pgd(rgn, images, torch.zeros(6, dtype=torch.int64), LINF)
