"""What people hand to an attack: every kind of model, image and label is taken, or refused in one sentence."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attacks import (
    InputDiversity,
    L2Budget,
    LinfBudget,
    RandomModel,
    apgd,
    apgd_eot,
    apgd_targeted,
    arc,
    average_exits,
    eot_pgd,
    fgsm,
    max_average_exits,
    path_model,
    path_sampler,
    pgd,
    rays,
    square,
    unchecked,
)
from zoo.attacks.autoattack import autoattack, fab
from zoo.attacks.budget import Budget
from zoo.attacks.distillation import distil
from zoo.data.corruptions import corrupt
from zoo.errors import BadInput, UnknownName
from zoo.evaluation.run import correct
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build
from zoo.weights.models import RandomGates

EPS = 8 / 255
LINF = LinfBudget(eps=EPS, steps=3)
Attack = Callable[..., Tensor]

ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "pgd, momentum": functools.partial(pgd, momentum=1.0),
    "m-di2": functools.partial(pgd, momentum=1.0, diversity=InputDiversity()),
    "apgd": apgd,
    "apgd-t": functools.partial(apgd_targeted, loss="margin"),
    "square": functools.partial(square, queries=40),
    "rays": functools.partial(rays, queries=40),
    "eot": lambda model, *rest, **more: eot_pgd(lambda: model, *rest, draws=2, momentum=1.0, **more),
    "eot, probability": lambda model, *rest, **more: eot_pgd(
        lambda: model, *rest, draws=2, average="probability", **more
    ),
    "apgd-eot": lambda model, *rest, **more: apgd_eot(lambda: model, *rest, draws=2, **more),
    "arc": lambda model, *rest, **more: arc([model, model], *rest, **more),
}
GRADIENTS = [name for name in ATTACKS if name not in ("square", "rays")]
EXITS: dict[str, Attack] = {
    "average": lambda model, *rest: average_exits(lambda pixels: [model(pixels)], *rest),
    "max-average": lambda model, *rest: max_average_exits(lambda pixels: [model(pixels)], *rest),
}


class Small(nn.Module):
    """Five classes; BatchNorm and dropout depend on the mode."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.linear = nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.linear(self.drop(self.norm(self.conv(images)).relu().mean((2, 3))))
        return hidden


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def labels(model: Small, images: Tensor) -> Tensor:
    return model(images).argmax(1)


@pytest.fixture
def rgn() -> RandomGatedNetwork:
    torch.manual_seed(0)
    network = build("resnet8", images=ImageFormat(height=8, width=8)).eval()
    return randomly_gate(network, candidates=3, generator=torch.Generator().manual_seed(0)).eval()


# --- NaN ---


@pytest.mark.parametrize("attack", GRADIENTS)
def test_a_gradient_that_is_nan_is_refused(attack: str, model: Small, images: Tensor, labels: Tensor) -> None:
    def rooted(pixels: Tensor) -> Tensor:
        largest = pixels.amax((1, 2, 3))
        return model(pixels) + 0 * (largest - largest.detach()).abs().sqrt()[:, None]

    with pytest.raises(BadInput, match="gradient of 6 of 6 images is NaN"):
        ATTACKS[attack](rooted, images, labels, LINF)


def test_a_gradient_that_is_nan_makes_no_euclidean_image_of_nan(model: Small, images: Tensor, labels: Tensor) -> None:
    def rooted(pixels: Tensor) -> Tensor:
        return model(pixels) + 0 * (pixels - pixels.detach()).abs().sqrt().sum((1, 2, 3))[:, None]

    for attack in (pgd, fgsm):
        with pytest.raises(BadInput, match="NaN"):
            attack(rooted, images, labels, L2Budget(steps=2))


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
def test_nan_is_no_class_0(attack: str, model: Small, images: Tensor) -> None:
    model.linear.weight.data[0, 0] = torch.nan
    zeros = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(BadInput, match="NaN"):
        (ATTACKS | EXITS)[attack](model, images, zeros, LINF)
    with pytest.raises(BadInput, match="NaN"):
        correct(model, images, zeros)


def test_nan_that_comes_later_is_refused_as_well(model: Small, images: Tensor, labels: Tensor) -> None:
    asked: list[int] = []

    def tiring(pixels: Tensor) -> Tensor:
        asked.append(len(pixels))
        return model(pixels) * (torch.nan if len(asked) > 3 else 1.0)

    for attack in ("pgd", "apgd", "square", "rays"):
        asked.clear()
        with pytest.raises(BadInput, match="NaN"):
            ATTACKS[attack](tiring, images, labels, LinfBudget(eps=1e-4, steps=5))


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "eot, probability"])
def test_logits_of_probability_0_are_no_nan(attack: str, model: Small, images: Tensor, labels: Tensor) -> None:
    def masked(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels)
        return logits.index_fill(1, torch.tensor([(int(labels[0]) + 1) % 5]), -torch.inf)

    chosen = labels == labels[0]
    found = ATTACKS[attack](masked, images[chosen], labels[chosen], LINF)
    assert bool(found.isfinite().all())


# --- training mode ---


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


HIDDEN = Small()


def by_global(images: Tensor) -> Tensor:
    return HIDDEN(images)  # type: ignore[no-any-return]


def by_list(images: Tensor) -> Tensor:
    return torch.stack([HIDDEN(part) for part in images.split(1)]).flatten(0, 1)


def frozen_in(training: nn.Module) -> Callable[[Tensor], Tensor]:
    def answer(images: Tensor) -> Tensor:
        return training(images)  # type: ignore[no-any-return]

    return answer


TRAINING: dict[str, Callable[[], Any]] = {
    "a module": Small,
    "one layer": lambda: nn.ModuleDict({"a": Small().eval(), "b": Small()})["b"],
    "a scripted module": lambda: torch.jit.script(Small()),
    "a traced module": lambda: torch.jit.trace(Small(), torch.rand(2, 3, 8, 8), check_trace=False),
    "a bound method": lambda: Small().forward,
    "a method of an object": lambda: Holder(Small()).answer,
    "a partial": lambda: functools.partial(lambda network, images: network(images), Small()),
    "a closure": lambda: frozen_in(Small()),
    "a closure over a scripted one": lambda: frozen_in(torch.jit.script(Small())),
    "a global": lambda: by_global,
    "a global in a list": lambda: by_list,
    "an object's attribute": lambda: (lambda holder: lambda images: holder.network(images))(Holder(Small())),
    "a plain list": lambda: Unregistered(Small()).eval(),
    "an ensemble": lambda: Ensemble([Small().eval(), Small()]),
    "F.dropout by default": lambda: Functional(Small().eval()).eval(),
    "F.dropout by the mode": lambda: ByMode(Small().eval()),
    "attention": lambda: Attention().eval(),
    "multi-head attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 32, batch_first=True), nn.Flatten(), nn.Linear(192, 5)
    ),
}


@pytest.mark.parametrize("attack", ["pgd", "m-di2", "apgd", "square", "rays"])
@pytest.mark.parametrize("kind", TRAINING)
def test_a_model_in_training_mode_is_refused_and_left_alone(kind: str, attack: str, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is on its way out
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = TRAINING[kind]()
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(BadInput, match=r"training mode"):
        ATTACKS[attack](model, images, torch.zeros(6, dtype=torch.int64), LINF)
    if kind != "a traced module":  # its counter stands before what shows the mode
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


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
    model: Small, images: Tensor, labels: Tensor
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
    model: Small, images: Tensor, labels: Tensor
) -> None:
    trainer = Holder(model)
    trainer.trained = Small()  # type: ignore[attr-defined]
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
    model = Small()
    moved = pgd(unchecked(model), images, torch.zeros(6, dtype=torch.int64), LINF)
    assert int(model.norm.num_batches_tracked) == LINF.steps  # type: ignore[arg-type]
    assert bool((moved != images).any())


# --- what a model returns ---


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "a dict": lambda logits: {"logits": logits},
    "a tuple": lambda logits: (logits, 1),
    "a list": lambda logits: [logits],
    "an object": Answer,
    "classes": lambda logits: logits.argmax(1),
    "whole numbers": lambda logits: (100 * logits).long(),
    "numpy": lambda logits: logits.detach().numpy(),
    "nothing": lambda logits: None,
    "a row less": lambda logits: logits[1:],
    "a row more": lambda logits: torch.cat([logits, logits[:1]]),
    "one column": lambda logits: logits[:, :1],
    "no classes": lambda logits: logits[:, 0],
    "a map": lambda logits: logits[:, :, None, None],
    "the wrong way": lambda logits: logits.T,
    "complex": lambda logits: logits.to(torch.complex64),
    "text": lambda logits: "cat",
    "an error": lambda logits: logits[:, 99],
}


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
@pytest.mark.parametrize("kind", RETURNED)
def test_what_is_no_tensor_of_logits_is_refused_in_a_sentence(
    kind: str, attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput):
        (ATTACKS | EXITS)[attack](lambda pixels: RETURNED[kind](model(pixels)), images, labels, LINF)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("a dict", "logits"),
        ("a tuple", 0),
        ("a list", -1),
        ("an object", "logits"),
        ("a dict", lambda raw: raw["logits"]),
    ],
)
def test_output_picks_the_logits(
    kind: str, output: Any, attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    def run(asked: Any, **options: Any) -> Tensor:
        torch.manual_seed(5)
        return ATTACKS[attack](asked, images, labels, LINF, **options)

    expected = run(model)
    assert torch.equal(run(lambda pixels: RETURNED[kind](model(pixels)), output=output), expected)


@pytest.mark.parametrize("output", ["logit", 7, lambda raw: raw["logit"], lambda raw: raw])
def test_output_that_is_not_there_is_refused(output: Any, model: Small, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput):
        pgd(lambda pixels: {"logits": model(pixels)}, images, labels, LINF, output=output)


def test_a_model_that_squeezes_one_image_away_is_refused_in_a_sentence(
    model: Small, images: Tensor, labels: Tensor
) -> None:
    def outside(pixels: Tensor) -> Tensor:
        return model(pixels).squeeze()  # type: ignore[no-any-return]

    def inside(pixels: Tensor) -> Tensor:
        return model.linear(model.conv(pixels).mean((2, 3), keepdim=True).squeeze().unflatten(1, (4, 1)).sum(2))  # type: ignore[no-any-return]

    for squeezing in (outside, inside):
        right = squeezing(images).argmax(1)
        assert pgd(squeezing, images, right, LINF).shape == images.shape
        with pytest.raises(BadInput, match="batch"):
            pgd(squeezing, images[:1], right[:1], LINF)


@pytest.mark.parametrize("attack", GRADIENTS)
def test_a_forward_that_is_detached_is_refused_in_a_sentence(
    attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    for detached in (lambda pixels: model(pixels.detach()), torch.no_grad()(model.forward)):
        with pytest.raises(BadInput, match="no gradient"):
            ATTACKS[attack](detached, images, labels, LINF)


# --- models that change their input ---


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
def test_a_model_that_normalises_in_place_gets_a_copy(
    attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    def apart(pixels: Tensor) -> Tensor:
        return model((pixels - 0.5) / 0.2)  # type: ignore[no-any-return]

    def in_place(pixels: Tensor) -> Tensor:
        return model(pixels.sub_(0.5).div_(0.2))  # type: ignore[no-any-return]

    def run(asked: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(5)
        return (ATTACKS | EXITS)[attack](asked, images, labels, LINF)

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

    members = [Small().eval() for _ in range(3)]
    with torch.no_grad():
        expected = Ensemble(members)((images - 0.5) / 0.2)
        assert torch.equal(Ensemble([InPlace(member) for member in members])(images.clone()), expected)


# --- the ball, in every precision ---

PRECISIONS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_inside(found: Tensor, images: Tensor, budget: Budget) -> None:
    """Assert it in the arithmetic of the images and in float64."""
    assert found.dtype == images.dtype
    assert bool(found.isfinite().all())
    for one, other in ((found, images), (found.double(), images.double())):
        difference = (one - other).flatten(1)
        order = torch.inf if budget.norm == "linf" else 2
        assert float(torch.linalg.vector_norm(difference, order, dim=1).max()) <= budget.eps
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-4, 0.01, 2 / 255, 8 / 255, 0.3, 1.0])
def test_every_half_precision_pixel_stays_in_its_ball(dtype: torch.dtype, eps: float) -> None:
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[(every >= 0) & (every <= 1)].reshape(1, 1, 1, -1)
    for far in (torch.zeros_like(every), torch.ones_like(every), every + eps, every - eps):
        assert_inside(LinfBudget(eps=eps).project(far, every), every, LinfBudget(eps=eps))


@settings(max_examples=300, deadline=None)
@given(
    pixel=st.floats(0, 1, width=32),
    eps=st.floats(0, 1),
    dtype=st.sampled_from(PRECISIONS),
    end=st.sampled_from([-1.0, 1.0]),
)
def test_any_pixel_stays_in_any_ball(pixel: float, eps: float, dtype: torch.dtype, end: float) -> None:
    images = torch.full((1, 1, 1, 1), pixel, dtype=dtype)
    budget = LinfBudget(eps=eps)
    found = budget.project(images + end * eps, images)
    assert_inside(found, images, budget)
    # and no further in than one number of the type and the rounding of eps
    reach = min(eps, 1 - float(images) if end > 0 else float(images))
    assert abs(float(found) - float(images)) >= reach - 2 * torch.finfo(dtype).eps


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(1e-3, 3),
    dtype=st.sampled_from(PRECISIONS),
    side=st.sampled_from([1, 8, 64]),
    even=st.booleans(),
)
def test_any_image_stays_in_any_euclidean_ball(
    seed: int, eps: float, dtype: torch.dtype, side: int, even: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, side, side, generator=generator).to(dtype)
    if even:  # where rounding does the same to every pixel
        images = images[:, :1, :1, :1].expand(images.shape).contiguous()
    budget = L2Budget(eps=eps)
    far = torch.full_like(images, eps) if even else torch.randn(images.shape, generator=generator).to(dtype)
    assert_inside(budget.project(images + far, images), images, budget)
    assert_inside(budget.start(images, generator), images, budget)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_attack_ends_in_the_ball_in_every_precision(attack: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3 * 64, 5).to(dtype)
    model = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(16, 3, 8, 8).to(dtype)
    labels = model(images).argmax(1)
    for eps in (EPS, 0.3):
        budget = LinfBudget(eps=eps, steps=4)
        assert_inside(ATTACKS[attack](model, images, labels, budget), images, budget)
    if attack in ("fgsm", "pgd", "pgd, momentum", "m-di2", "eot"):
        euclidean = L2Budget(eps=0.5, steps=4)
        assert_inside(ATTACKS[attack](model, images, labels, euclidean), images, euclidean)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd, momentum", "eot"])
def test_a_gradient_of_zero_makes_no_nan(attack: str, dtype: torch.dtype) -> None:
    def flat(pixels: Tensor) -> Tensor:
        score = 0 * pixels.flatten(1).sum(1)
        return torch.stack([score, score + 1, score - 2], 1)

    images = torch.rand(4, 3, 6, 6).to(dtype)
    labels = torch.ones(4, dtype=torch.int64)
    for budget in (LINF, L2Budget(steps=3)):
        assert_inside(ATTACKS[attack](flat, images, labels, budget), images, budget)


# --- losses and options ---


@pytest.mark.parametrize(
    "attack",
    [
        functools.partial(pgd, loss="dlr"),
        functools.partial(apgd, loss="dlr"),
        apgd_targeted,
        functools.partial(square, loss="dlr", queries=5),
        lambda model, *rest: eot_pgd(lambda: model, *rest, draws=2, loss="dlr"),
        lambda model, *rest: apgd_eot(lambda: model, *rest, draws=2, loss="dlr"),
    ],
)
def test_dlr_among_two_possible_classes_is_refused(attack: Attack, images: Tensor) -> None:
    torch.manual_seed(0)
    plain = Small(2).eval()
    labels = plain(images).argmax(1)
    for classes in (2, 5):
        mask = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, -torch.inf])[:classes]

        def masked(pixels: Tensor, classes: int = classes, mask: Tensor = mask) -> Tensor:
            return F.pad(plain(pixels), (0, classes - 2)) + mask

        with pytest.raises(BadInput, match="margin"):
            attack(masked, images, labels, LINF)


def test_keep_is_one_of_the_known_words_and_not_for_input_diversity(
    model: Small, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(UnknownName, match="first broken"):
        pgd(model, images, labels, LINF, keep="first_broken")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="diversity"):
        pgd(model, images, labels, LINF, keep="first broken", diversity=InputDiversity())


@pytest.mark.parametrize(
    "eps", [Fraction(8, 255), "8/255", np.float64(8 / 255), torch.tensor(8 / 255, dtype=torch.float64)]
)
def test_a_radius_may_be_written_as_people_write_it(eps: Any) -> None:
    assert LinfBudget(eps=eps, step_size=eps) == LinfBudget(eps=8 / 255, step_size=8 / 255)
    assert type(LinfBudget(eps=eps).eps) is float or isinstance(eps, np.floating)


@pytest.mark.parametrize(
    "options", [{"eps": "8%"}, {"eps": None}, {"eps": [0.1]}, {"eps": "1/0"}, {"steps": 2.5}, {"restarts": "3"}]
)
def test_a_budget_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    for budget in (LinfBudget, L2Budget):
        with pytest.raises(BadInput):
            budget(**options)


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
def test_lists_of_labels_numpy_and_no_images_are_taken(
    attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    def run(pixels: Any, classes: Any) -> Tensor:
        torch.manual_seed(5)
        return (ATTACKS | EXITS)[attack](model, pixels, classes, LINF)

    expected = run(images, labels)
    assert torch.equal(run(images, labels.tolist()), expected)
    assert torch.equal(run(images.numpy(), labels.numpy().astype(np.int32)), expected)
    assert run(images[:0], labels[:0]).shape == (0, 3, 8, 8)
    assert run(images[:0], []).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("pixels", "classes"),
    [
        (torch.rand(2, 3, 8, 8), [0.5, 1.0]),
        (torch.rand(2, 3, 8, 8), ["cat", "dog"]),
        (torch.rand(2, 3, 8, 8), [[0], 1]),
        (torch.rand(2, 3, 8, 8), [0, 1, 2]),
        (torch.rand(2, 3, 8, 8), None),
        ([[0.5]], [0]),
        (np.zeros((2, 3, 8, 8), np.uint8), [0, 1]),
        (torch.rand(2, 3, 0, 8), [0, 1]),
        (torch.full((2, 3, 8, 8), torch.nan), [0, 1]),
    ],
)
def test_other_images_and_labels_are_refused_in_a_sentence(pixels: Any, classes: Any, model: Small) -> None:
    with pytest.raises(BadInput):
        pgd(model, pixels, classes, LINF)


def test_float64_images_are_attacked_in_float64_or_refused(model: Small, images: Tensor, labels: Tensor) -> None:
    for attack in ATTACKS.values():
        assert attack(Small().double().eval(), images.double(), labels, LINF).dtype == torch.float64
        with pytest.raises(BadInput, match="float64"):
            attack(model, images.double(), labels, LINF)


@pytest.mark.parametrize("attack", GRADIENTS)
def test_inference_mode_is_refused_inside_and_taken_outside(
    attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    with torch.inference_mode():
        made, right = images.clone(), labels.clone()
        with pytest.raises(BadInput, match="inference_mode"):
            ATTACKS[attack](model, images, labels, LINF)
    assert ATTACKS[attack](model, made, right, LINF).shape == images.shape


@pytest.mark.parametrize("number", [3.0, 2.5, "3", None, torch.tensor(2.0)])
def test_a_corruption_counts_in_whole_numbers(number: Any) -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(BadInput):
        corrupt(pixels, "fog", number)
    with pytest.raises(BadInput):
        corrupt(pixels, "fog", 3, seed=number)
    with pytest.raises(BadInput):
        corrupt(pixels.numpy(), "fog", 3)  # type: ignore[arg-type]


# --- random models ---


def random_models(rgn: RandomGatedNetwork) -> dict[str, Callable[[Tensor], Tensor]]:
    sampler = path_sampler(rgn, random.Random(0))
    members = [path_model(rgn, [choice] * rgn.num_gates) for choice in range(2)]
    return {
        "the variant gated": RandomGates(rgn, random.Random(1)).eval(),
        "a fresh path per call": lambda images: sampler()(images),
        "one of two members": lambda images: random.choice(members)(images),
        "noise": lambda images: members[0](images + 0.1 * torch.randn_like(images)),
    }


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "m-di2", "apgd", "apgd-t", "rays"])
@pytest.mark.parametrize("kind", ["the variant gated", "a fresh path per call", "one of two members", "noise"])
def test_a_random_model_is_attacked_draw_by_draw_and_said_to_be_one_once(
    kind: str, attack: str, rgn: RandomGatedNetwork, images: Tensor
) -> None:
    random.seed(0)
    model = random_models(rgn)[kind]
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.warns(RandomModel, match="eot_pgd") as caught:
        found = ATTACKS[attack](model, images, labels, LinfBudget(eps=0.1, steps=3))
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


# --- training mode in hooks, properties and decorated methods ---


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
    def answer(images: Tensor, *, network: nn.Module = Small()) -> Tensor:  # noqa: B008 -- what is tried
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
    "a slot": lambda: Slotted(Small()),
}


@pytest.mark.parametrize("attack", ["pgd", "square", "rays", "apgd-eot"])
@pytest.mark.parametrize("kind", HIDDEN_MODE)
def test_training_mode_in_hooks_and_properties_is_refused(kind: str, attack: str, images: Tensor) -> None:
    with pytest.raises(BadInput, match="training mode"):
        ATTACKS[attack](HIDDEN_MODE[kind](), images, torch.zeros(6, dtype=torch.int64), LINF)


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
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd", "square", "rays", "eot", "arc"])
@pytest.mark.parametrize("kind", ["spectral norm", "a buffer by hand"])
def test_a_model_whose_buffers_move_is_refused_and_left_as_it_was(kind: str, attack: str, images: Tensor) -> None:
    torch.manual_seed(0)
    network: nn.Module = Counting()
    if kind == "spectral norm":
        network = nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(192, 5)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(BadInput, match="training mode"):
        ATTACKS[attack](network, images, labels, LINF)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network.eval()
    assert ATTACKS[attack](network, images, labels, LINF).shape == images.shape


def test_a_model_that_is_itself_the_part_in_training_mode_is_not_called_by_an_empty_name(images: Tensor) -> None:
    with pytest.raises(BadInput, match="the model, a ByMode, is in training mode"):
        pgd(ByMode(plain_network()), images, torch.zeros(6, dtype=torch.int64), LINF)


# --- options ---


@pytest.mark.parametrize("weights", [[torch.nan, 1], [1, torch.inf], [1, 0], [1, -1], [1e308, 1e308], ["a", 1]])
def test_weights_of_members_are_positive_and_finite(
    weights: list[Any], model: Small, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="weight"):
        arc([model, model], images, labels, LINF, weights=weights)


@pytest.mark.parametrize("momentum", [torch.nan, torch.inf, -torch.inf, -0.5, "fast", None])
def test_a_momentum_is_finite_and_not_negative(momentum: Any, model: Small, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="momentum"):
        pgd(model, images, labels, LINF, momentum=momentum)
    with pytest.raises(BadInput, match="momentum"):
        eot_pgd(lambda: model, images, labels, LINF, draws=2, momentum=momentum)
    with pytest.raises(BadInput, match="momentum"):
        distil(model, images, images, LINF, momentum=momentum)


class TheirError(Exception):
    pass


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
@pytest.mark.parametrize("error", [AssertionError, ZeroDivisionError, OSError, StopIteration, TheirError])
def test_whatever_a_model_raises_is_said_in_a_sentence(
    error: type[Exception], attack: str, images: Tensor, labels: Tensor
) -> None:
    def failing(pixels: Tensor) -> Tensor:
        raise error("no")

    with pytest.raises(BadInput, match=f"the model fails on images .*{error.__name__}"):
        (ATTACKS | EXITS)[attack](failing, images, labels, LINF)


class FailsBackwards(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Tensor:
        raise TheirError("no")


@pytest.mark.parametrize("attack", GRADIENTS)
def test_what_fails_backwards_is_said_in_a_sentence(attack: str, model: Small, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="TheirError"):
        ATTACKS[attack](lambda pixels: model(FailsBackwards.apply(pixels)), images, labels, LINF)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, UnknownName, KeyboardInterrupt])
def test_what_is_not_the_models_fault_passes(error: Any, images: Tensor, labels: Tensor) -> None:
    raised = error("a", ["b"]) if error is UnknownName else error("no")

    def failing(pixels: Tensor) -> Tensor:
        raise raised

    with pytest.raises(error):
        pgd(failing, images, labels, LINF)


@pytest.mark.parametrize("number", [2.5, "many", None, torch.tensor(1.5)])
def test_counts_are_whole_numbers(number: Any, model: Small, images: Tensor, labels: Tensor) -> None:
    given = (images, labels, LINF)
    asked: list[Callable[[], object]] = [
        lambda: square(model, *given, queries=number),
        lambda: square(model, *given, queries=9, draws=number),
        lambda: rays(model, *given, queries=number),
        lambda: apgd_targeted(model, *given, num_targets=number),
        lambda: apgd_eot(lambda: model, *given, draws=number),
        lambda: eot_pgd(lambda: model, *given, draws=number),
    ]
    for attack in asked:
        with pytest.raises(BadInput, match="whole number"):
            attack()


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
@pytest.mark.parametrize("budget", [8 / 255, "8/255", Fraction(8, 255), None, {"eps": 0.1}, LinfBudget])
def test_a_bare_number_is_no_budget(budget: Any, attack: str, model: Small, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match=r"LinfBudget\(eps="):
        (ATTACKS | EXITS)[attack](model, images, labels, budget)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in ("rays", "arc")])
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda logits, labels, targets=None: F.cross_entropy(logits, labels, reduction="none")[:, None],
        lambda logits, labels, targets=None: 1.0,
        lambda logits, labels: -logits[:, 0],
        lambda logits, labels, targets=None: 1 / 0,
        3,
    ],
)
def test_a_loss_is_one_number_for_each_image(
    loss: Any, attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="loss"):
        ATTACKS[attack](model, images, labels, LINF, loss=loss)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "fgsm"])
def test_a_seed_is_no_generator(attack: str, model: Small, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="generator"):
        ATTACKS[attack](model, images, labels, LINF, generator=3)


@pytest.mark.parametrize("attack", [*ATTACKS, *EXITS])
@pytest.mark.parametrize("layout", ["sparse", "meta"])
def test_logits_without_dense_values_are_refused(
    layout: str, attack: str, model: Small, images: Tensor, labels: Tensor
) -> None:
    def answer(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels)
        return logits.to_sparse() if layout == "sparse" else logits.to("meta")

    with pytest.raises(BadInput, match="dense"):
        (ATTACKS | EXITS)[attack](answer, images, labels, LINF)


# --- AutoAttack ---


@pytest.mark.slow
def test_autoattack_takes_float64_logits_of_float32_images(model: Small, images: Tensor, labels: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    found = autoattack(lambda pixels: model(pixels).double(), images[:2], labels[:2], LinfBudget(eps=1))
    assert found.adversarial.dtype == torch.float32


def test_fab_takes_float64_logits_of_float32_images(model: Small, images: Tensor, labels: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    found = fab(lambda pixels: model(pixels).double(), images, labels, LINF)
    assert torch.equal(found, fab(model, images, labels, LINF))


def test_autoattack_counts_images_and_not_logits(images: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    model = plain_network()

    def infinite(pixels: Tensor) -> Tensor:
        return model(pixels).index_fill(1, torch.tensor([1]), torch.inf)  # type: ignore[no-any-return]

    with pytest.raises(BadInput, match="the loss of 6 of 6 images is NaN"):
        autoattack(infinite, images, torch.ones(6, dtype=torch.int64), LINF)


def test_autoattack_is_for_l_inf_alone(model: Small, images: Tensor, labels: Tensor) -> None:
    pytest.importorskip("pyautoattack")
    for attack in (autoattack, fab):
        with pytest.raises(BadInput, match="l_inf.*l2"):
            attack(model, images, labels, L2Budget())  # type: ignore[operator]
