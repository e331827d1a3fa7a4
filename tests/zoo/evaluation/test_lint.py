from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as grad_by_another_name
from torch.nn import functional as F

from zoo.attacks import LinfBudget, pgd
from zoo.attacks.outputs import Model
from zoo.bundle.card import Finding
from zoo.bundle.findings import lines
from zoo.errors import BadInput
from zoo.evaluation.int8_graph import Int8Network
from zoo.evaluation.intervals import exceeds
from zoo.evaluation.linter import evidence as evidence_module
from zoo.evaluation.linter.bundle import lint_bundle
from zoo.evaluation.linter.checks import attacks
from zoo.evaluation.linter.evidence import Evidence
from zoo.evaluation.linter.lint import CHECKS, lint_model, passed
from zoo.evaluation.linter.trace import Trace
from zoo.hub.source import open_model

EPS = 8 / 255
QUERIES = 100
MASKING = {"G1", "S5", "W1", "G3", "X1"}


def task(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four smooth patterns in noise, on the 8-bit grid; at eps 8/255 a plain network loses nearly all of them."""
    patterns = F.interpolate(torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(7)), 8, mode="bilinear")
    labels = torch.arange(number) % 4
    noise = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ((0.5 + 0.06 * patterns[labels] + 0.07 * noise).clamp(0, 1) * 255).round() / 255, labels


def trained(seed: int, *, adversarially: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )
        images, labels = task(512, seed + 100)
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for start in list(range(0, 512, 128)) * 20:
            batch, wanted = images[start : start + 128], labels[start : start + 128]
            if adversarially:
                batch = pgd(network, batch, wanted, LinfBudget(eps=EPS, steps=3, step_size=EPS / 2))
            optimiser.zero_grad()
            F.cross_entropy(network(batch), wanted).backward()
            optimiser.step()
    optimiser.zero_grad()
    return network.eval()


@pytest.fixture(scope="session")
def networks() -> dict[str, nn.Module]:
    return {"plain": trained(0, adversarially=False), "robust": trained(1, adversarially=True)}


@pytest.fixture(scope="session")
def plain(networks: dict[str, nn.Module]) -> nn.Module:
    return networks["plain"]


@pytest.fixture(scope="session")
def robust(networks: dict[str, nn.Module]) -> nn.Module:
    return networks["robust"]


IMAGES, LABELS = task(60, 1)


CHECK = {check.code: check for check in CHECKS}


def linted(model: Model, *codes: str, **options: object) -> dict[str, Finding]:
    """Return the findings by code: of the checks named, in their usual order, or of all."""
    chosen = [check for check in CHECKS if check.code in codes or not codes]
    given = {"images": IMAGES, "labels": LABELS, "eps": EPS, "queries": QUERIES, **options}
    findings = lint_model(model, **given, checks=chosen)  # type: ignore[arg-type]
    return {finding.code: finding for finding in findings}


def verdict(code: str, model: Model, **options: object) -> str:
    return linted(model, code, **options)[code].verdict


def alarms(findings: dict[str, Finding]) -> set[str]:
    return {code for code, finding in findings.items() if finding.verdict == "alarm"}


# --- planted defects: each wraps a trained network ---


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Scaled(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return 1000 * self.network(images)


class Softmax(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1)


class SaturatedSoftmax(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return (1000 * self.network(images)).softmax(1)


class LogOfSaturatedSoftmax(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return (1000 * self.network(images)).softmax(1).log()


class Quantised(Wrapped):
    levels = 8

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * (self.levels - 1)).round() / (self.levels - 1))


class Rounded(Quantised):
    levels = 256


class Detached(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.detach())


class WithNaNGradient(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + (images - images).sqrt().flatten(1).sum(1, keepdim=True)


class _FalseGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))


class Lying(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(_FalseGradient.apply(images))


class BatchStatistics(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(0.5 + 0.1 * F.batch_norm(images, None, None, training=True))


class Noisy(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + 0.1 * torch.randn(images.shape))


class SeededNoise(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        torch.manual_seed(3)
        return self.network(images + 0.02 * torch.randn(images.shape[1:]))


class Counting(Wrapped):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        return self.network(images)


class SwitchesModes(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        self.network.train()
        return self.network(images)


def by_grad(loss: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(loss, images)[0]


def by_another_name(loss: Tensor, images: Tensor) -> Tensor:
    return grad_by_another_name(loss, images)[0]


def by_backward(loss: Tensor, images: Tensor) -> Tensor:
    loss.backward(inputs=[images])
    assert images.grad is not None
    return images.grad


class Purified(Wrapped):
    """Sharpens the answer by a gradient step on the image before it answers."""

    differentiate: Callable[[Tensor, Tensor], Tensor] = staticmethod(by_grad)

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            copy = images.detach().requires_grad_(True)
            gradient = self.differentiate(self.network(copy).logsumexp(1).sum(), copy)
        return self.network(images + 0.01 * gradient.sign())


class PurifiedWithoutCare(Wrapped):
    """The same, and it fails where gradients are switched off."""

    def forward(self, images: Tensor) -> Tensor:
        copy = images.detach().requires_grad_(True)
        gradient = by_grad(self.network(copy).logsumexp(1).sum(), copy)
        return self.network(images + 0.01 * gradient.sign())


class Decoyed(Wrapped):
    """A class that is always nearly the answer and never is, with a steep slope that leads nowhere."""

    def forward(self, images: Tensor) -> Tensor:
        logits, pixels = self.network(images), images.flatten(1)
        lure = 0.04 * (300 * (pixels[:, ::2].mean(1) - pixels[:, 1::2].mean(1))).sin()
        return torch.cat([logits, (logits.max(1).values - 0.05 + lure)[:, None]], dim=1)


class PartlyRounded(Wrapped):
    """Rounds a part of the image, without a gradient: what an average leaves, the average, a channel, half of it."""

    def __init__(self, network: nn.Module, part: str, size: int = 4, step: float = 0.06) -> None:
        super().__init__(network)
        self.part, self.size, self.step = part, size, step

    def forward(self, images: Tensor) -> Tensor:
        average = F.interpolate(F.avg_pool2d(images, self.size), scale_factor=self.size)
        hidden = {
            "detail": images - average,
            "average": average,
            "channel": images * torch.tensor([0.0, 1, 0])[:, None, None],
            "colour": images - images.mean(1, keepdim=True),
            "grey": images.mean(1, keepdim=True).expand_as(images),
            "half": images * (torch.arange(images.shape[3]) < images.shape[3] // 2),
        }[self.part]
        return self.network(images - hidden + ((hidden / self.step).round() * self.step).detach())


class HalfDetached(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(0.5 * images + 0.5 * images.detach())


@dataclass(frozen=True, kw_only=True)
class Defect:
    plant: Callable[[nn.Module], Model]
    raises: set[str]
    leaves: Sequence[str] = ()
    """Checks that stay silent: the defect is another one."""


DEFECTS = {
    "logits x 1000": Defect(plant=Scaled, raises={"G1", "G2"}, leaves=("O1", "R1", "G3", "W1")),
    "softmax": Defect(plant=Softmax, raises={"O1"}, leaves=("G1", "G2", "R1")),
    "a decoy": Defect(plant=Decoyed, raises={"G2"}, leaves=("O1", "R1", "B1", "M1", "D1")),
    "saturated softmax": Defect(plant=SaturatedSoftmax, raises={"O1", "G1"}, leaves=("R1",)),
    "log of a saturated softmax": Defect(plant=LogOfSaturatedSoftmax, raises={"O1", "G1"}, leaves=("R1",)),
    "8 levels": Defect(plant=Quantised, raises=MASKING, leaves=("O1", "R1", "B1", "M1", "D1")),
    "8-bit rounding": Defect(plant=Rounded, raises=MASKING, leaves=("O1", "R1", "B1", "M1", "D1")),
    "detached": Defect(plant=Detached, raises=MASKING, leaves=("O1", "R1")),
    "NaN gradient": Defect(plant=WithNaNGradient, raises={"G1", "S5"}, leaves=("O1", "R1", "B1")),
    "detail rounded": Defect(plant=lambda net: PartlyRounded(net, "detail"), raises={"G4"}, leaves=("G1", "O1", "R1")),
    "average rounded": Defect(plant=lambda net: PartlyRounded(net, "average"), raises={"G4"}, leaves=("G1", "O1")),
    "half detached": Defect(plant=HalfDetached, raises={"G4"}, leaves=("G1", "G2", "W1", "O1", "R1", "B1", "M1")),
    "false gradient": Defect(plant=Lying, raises={"G3", "W1", "X1"}, leaves=("G1", "O1", "R1", "B1")),
    "batch statistics": Defect(plant=BatchStatistics, raises={"B1"}, leaves=("O1", "R1", "G1")),
    "noise": Defect(plant=Noisy, raises={"R1"}, leaves=("O1", "G1")),
    "noise from a fixed seed": Defect(plant=SeededNoise, raises={"M1"}, leaves=("R1", "O1")),
    "a counting forward": Defect(plant=Counting, raises={"M1"}, leaves=("R1", "G1", "W1")),
    "a forward that switches modes": Defect(plant=SwitchesModes, raises={"M1"}, leaves=("R1", "G1", "W1")),
    "optimises at test time": Defect(plant=Purified, raises={"D1"}, leaves=("R1", "O1")),
    "optimises without care": Defect(plant=PurifiedWithoutCare, raises={"D1"}, leaves=("R1", "O1")),
}


PARTS_OF_NO_SIZE = ("channel", "colour", "grey", "half")


@pytest.mark.parametrize("name", ["plain", "robust"])
def test_an_honest_network_raises_no_alarm(networks: dict[str, nn.Module], name: str) -> None:
    findings = linted(networks[name], surrogate=networks["plain"], served=lambda pixels: served(networks[name], pixels))
    assert alarms(findings) == set(), lines(list(findings.values()))
    assert passed(list(findings.values()))
    assert {code for code, finding in findings.items() if finding.verdict == "skipped"} == {
        *("E1", "E2", "E3"),  # of random models
        *("Q1", "Q2"),  # of int8 graphs
    }


@pytest.mark.parametrize("step", [0.03, 0.06, 0.12])
@pytest.mark.parametrize(
    ("part", "size"),
    [("detail", 2), ("detail", 4), ("average", 2), ("average", 4), *((part, 4) for part in PARTS_OF_NO_SIZE)],
)
def test_a_part_of_the_image_without_a_gradient_raises_an_alarm(
    robust: nn.Module, part: str, step: float, size: int
) -> None:
    """Where the answer depends on it, as that of a network on all of its input does."""
    assert verdict("G4", PartlyRounded(robust, part, size, step)) == "alarm"


@pytest.mark.parametrize(
    ("masked", "value", "expected"),
    [([3], -torch.inf, "ok"), ([2, 3], -torch.inf, "alarm"), ([3], torch.inf, "alarm")],
)
def test_a_class_that_is_masked_is_no_infinity_as_long_as_three_are_left(
    plain: nn.Module, masked: list[int], value: float, expected: str
) -> None:
    chosen = LABELS < 2

    def masking(pixels: Tensor) -> Tensor:
        logits: Tensor = plain(pixels)
        if value == torch.inf:  # of one image
            return logits.index_put((torch.tensor([0]), torch.tensor(masked)), torch.tensor(value))
        return logits.index_fill(1, torch.tensor(masked), value)

    assert verdict("O1", masking, images=IMAGES[chosen], labels=LABELS[chosen]) == expected


@pytest.mark.parametrize("eps", ["8/255", Fraction(8, 255), np.float32(8 / 255), torch.tensor(8 / 255)])
def test_a_radius_is_taken_as_budgets_take_it(eps: Any, plain: nn.Module) -> None:
    few = {"images": IMAGES[:8], "labels": LABELS[:8], "queries": 5}
    assert linted(plain, "S7", eps=eps, **few) == linted(plain, "S7", eps=EPS, **few)


@pytest.mark.parametrize(
    "options",
    [{"queries": 2.5}, {"queries": "many"}, {"eps": "wide"}, {"eps": None}, {"eps": torch.nan}, {"seed": 0.5}],
)
def test_options_that_are_no_numbers_are_refused_before_the_model_is_asked(options: dict[str, Any]) -> None:
    def never(pixels: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(BadInput, match="|".join(options)):
        lint_model(never, IMAGES, LABELS, **options)


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("code", ["S4", "S5"])
@pytest.mark.parametrize(("left", "alarm"), [(0, False), (1, False), (10, True)])
def test_one_image_of_fifty_left_by_an_attack_without_bounds_is_no_alarm(
    classes: int, code: str, left: int, alarm: bool
) -> None:
    """Of a linear model, except for some images that nothing moves."""
    weight = torch.randn(classes, 192, generator=torch.Generator().manual_seed(1))
    images = (torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 255).round() / 255
    images[:left, 0, 0, 0] = 0.123

    def model(pixels: Tensor) -> Tensor:
        flat = (pixels - 0.5).flatten(1)
        fixed = torch.zeros(len(pixels), dtype=torch.bool)
        if len(pixels) == 50:
            fixed[:left] = True
        return torch.where(fixed[:, None], flat.detach() * 0 @ weight.T + stuck, flat @ weight.T)

    stuck = F.one_hot(torch.tensor(0), classes).float()
    labels = model(images).argmax(1)
    assert verdict(code, model, images=images, labels=labels) == ("alarm" if alarm else "ok")


# --- half precision ---


@pytest.mark.parametrize(
    ("dtype", "side", "given"),
    [
        (torch.float16, 16, "half"),
        (torch.bfloat16, 16, "half"),
        (torch.float16, 16, "float"),
        (torch.bfloat16, 16, "float"),
        pytest.param(torch.float16, 224, "half", marks=pytest.mark.slow),
    ],
)
def test_an_honest_model_in_half_precision_raises_no_alarm(dtype: torch.dtype, side: int, given: str) -> None:
    """The sum of an image of 224 x 224 pixels is more than the largest float16, and small probabilities are none."""
    patterns = F.interpolate(torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(7)), side, mode="bilinear")
    labels = torch.arange(12) % 4
    noise = torch.randn(12, 3, side, side, generator=torch.Generator().manual_seed(1))
    images = ((0.5 + 0.06 * patterns[labels] + 0.07 * noise).clamp(0, 1) * 255).round() / 255
    network = nn.Sequential(nn.AvgPool2d(side // 8), nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        weight = F.avg_pool2d(patterns, side // 8).flatten(1)
        network[2].weight.copy_(weight - weight.mean(0))
        network[2].bias.copy_(-network[2].weight.sum(1) / 2)
    network = network.to(dtype).eval()
    model = network if given == "half" else lambda pixels: network(pixels.to(dtype))
    findings = lint_model(model, images.to(dtype) if given == "half" else images, labels, eps=EPS, queries=10)
    assert passed(findings), lines(findings)


def test_a_masked_model_in_half_precision_is_an_alarm_all_the_same(plain: nn.Module) -> None:
    masked = copy.deepcopy(plain).bfloat16()
    findings = linted(Quantised(masked), "G1", "G3", "G4", images=IMAGES.bfloat16())
    assert alarms(findings) == {"G1", "G3", "G4"}


# --- models as people write them ---


class InPlace(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.sub_(0.5).div_(0.25).mul_(0.25).add_(0.5))


def test_a_model_that_begins_in_place_is_linted_like_any_other_and_leaves_the_images_alone(plain: nn.Module) -> None:
    images = IMAGES.clone()
    findings = lint_model(InPlace(plain), images, LABELS, eps=EPS, queries=QUERIES, surrogate=InPlace(plain))
    assert torch.equal(images, IMAGES)
    assert passed(findings), lines(findings)


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (lambda logits: {"logits": logits, "loss": None}, "logits"),
        (lambda logits: (None, logits), 1),
        (lambda logits: [logits], lambda found: found[0]),
    ],
)
def test_logits_are_picked_from_what_a_model_returns(
    plain: nn.Module, answer: Callable[[Tensor], object], output: object
) -> None:
    def model(images: Tensor) -> Tensor:
        return answer(plain(images))  # type: ignore[return-value]

    assert linted(model, "S2", "R1", "M1", output=output) == linted(plain, "S2", "R1", "M1") | {
        "M1": linted(lambda images: plain(images), "M1")["M1"]  # of a function
    }
    assert verdict("E1", model, output=output, sampler=lambda: model) == "ok"
    with pytest.raises(BadInput):
        linted(model)


@pytest.mark.parametrize(
    "broken",
    [
        lambda logits: logits.argmax(1),
        lambda logits: logits.detach().numpy(),
        lambda logits: None,
        lambda logits: logits[:1],
        lambda logits: logits * torch.nan,
        lambda logits: logits.where(torch.arange(4) != 2, torch.nan),
        lambda logits: logits.nothing,
    ],
)
def test_answers_that_are_no_logits_are_refused(plain: nn.Module, broken: Callable[[Tensor], object]) -> None:
    with pytest.raises(BadInput):
        linted(lambda images: broken(plain(images)))  # type: ignore[arg-type, return-value]


def test_dropout_within_a_function_is_refused(plain: nn.Module) -> None:
    with pytest.raises(BadInput, match="dropout"):
        linted(lambda images: plain(F.dropout(images, 0.1)))


def served(network: nn.Module, pixels: np.ndarray) -> np.ndarray:
    assert pixels.dtype == np.float32
    with torch.no_grad():
        return network(torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_raises_its_alarm_and_not_that_of_others(plain: nn.Module, name: str) -> None:
    defect = DEFECTS[name]
    findings = linted(defect.plant(copy.deepcopy(plain)), *defect.raises, *defect.leaves)
    assert defect.raises <= alarms(findings), lines(list(findings.values()))
    assert not alarms(findings) & set(defect.leaves), lines(list(findings.values()))
    assert not passed(list(findings.values()))


@pytest.mark.parametrize("differentiate", [by_grad, by_another_name, by_backward])
def test_a_gradient_in_the_forward_is_seen_by_whatever_name_it_is_called(
    plain: nn.Module, differentiate: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = Purified(copy.deepcopy(plain))
    model.differentiate = differentiate  # type: ignore[method-assign]
    before = torch.autograd._engine_run_backward
    finding = linted(model, "D1")["D1"]
    assert finding.verdict == "alarm"
    assert finding.figure.startswith("1 ")
    assert torch.autograd._engine_run_backward is before


def test_the_watch_on_gradients_ends_when_a_forward_fails() -> None:
    before = torch.autograd._engine_run_backward

    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("no such model")

    with pytest.raises(BadInput, match="no such model"):
        linted(broken)
    assert torch.autograd._engine_run_backward is before


# --- what is served, and surrogates ---


def test_a_served_model_that_answers_otherwise_raises_an_alarm(plain: nn.Module, robust: nn.Module) -> None:
    finding = linted(plain, "P1", served=lambda pixels: served(robust, pixels))["P1"]
    assert finding.verdict == "alarm"
    assert " 177 " in finding.figure  # 59 clean images, and the same after FGSM and after PGD


def test_served_probabilities_are_compared_as_such(plain: nn.Module) -> None:
    assert verdict("P1", plain, served=lambda pixels: served(Softmax(plain), pixels)) == "ok"


def test_a_served_model_of_other_classes_is_refused(plain: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"\(59, 3\).*\(59, 4\)"):
        linted(plain, "P1", served=lambda pixels: np.zeros((len(pixels), 3), np.float32))


def test_a_surrogate_that_its_own_examples_do_not_fool_raises_an_alarm(plain: nn.Module, robust: nn.Module) -> None:
    assert alarms(linted(plain, surrogate=robust)) == {"T1"}


def test_transfer_unmasks_a_model_whose_gradients_are_hidden(plain: nn.Module) -> None:
    finding = linted(Rounded(plain), "W1", surrogate=plain, queries=1)["W1"]
    assert "gradients break 2 of 59; 57 more" in finding.figure  # two fell to random starts
    assert "transfer (PGD-20) 57" in finding.figure
    assert finding.verdict == "alarm"


# --- int8 graphs: another function answers than the one whose gradients are known ---


def int8(weights: nn.Module, answers: nn.Module) -> Model:
    def graph(images: Tensor, path: Sequence[int] | None) -> Tensor:
        with torch.no_grad():
            return answers(images)

    return Int8Network(weights, graph)


def test_a_graph_that_rounds_its_weights_with_care_raises_no_alarm(plain: nn.Module) -> None:
    rounded = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in rounded.parameters():
            step = parameter.abs().amax() / 127
            parameter.copy_((parameter / step).round() * step)
    assert not torch.equal(rounded(IMAGES), plain(IMAGES))
    findings = linted(int8(plain, rounded))
    assert alarms(findings) == set(), lines(list(findings.values()))
    assert findings["Q1"].verdict == findings["Q2"].verdict == "ok"


def test_rounding_that_keeps_what_its_weights_lose_raises_an_alarm(plain: nn.Module, robust: nn.Module) -> None:
    assert verdict("Q1", int8(plain, robust)) == "alarm"


def test_a_graph_that_questions_break_and_its_weights_do_not_raises_an_alarm(
    plain: nn.Module, robust: nn.Module
) -> None:
    assert verdict("Q2", int8(robust, plain)) == "alarm"


def test_a_graph_without_gradients_of_its_own_is_attacked_through_those_of_its_weights(plain: nn.Module) -> None:
    """The same model alone hides its gradients; see the defect "8 levels"."""
    staircase = Quantised(plain)
    assert alarms(linted(staircase, "G1", "S5")) == {"G1", "S5"}
    assert alarms(linted(int8(plain, staircase), "G1", "S5")) == set()


# --- random models ---


class OnePerDraw(nn.Module):
    """Adds the same noise to every image; a draw of a noisy model."""

    def __init__(self, network: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + self.noise)


class _RoughGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, images: Tensor, seed: int) -> Tensor:
        context.seed = seed  # type: ignore[attr-defined]
        return images.clone()

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(context.seed)  # type: ignore[attr-defined]
        size = gradient.flatten(1).std(1)[:, None, None, None]
        return gradient + 3 * size * torch.randn(gradient.shape[1:], generator=generator), None


def choosing(networks: Sequence[nn.Module]) -> tuple[Model, Callable[[], Model]]:
    """Random gates with one layer: every call, or draw, takes one of the networks."""
    rng = random.Random(0)
    return lambda images: rng.choice(networks)(images), lambda: rng.choice(networks)


def noisy(network: nn.Module, size: float) -> tuple[Model, Callable[[], Model]]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Model:
        return OnePerDraw(network, size * torch.randn(3, 8, 8, generator=generator))

    return lambda images: draw()(images), draw


def rough(network: nn.Module) -> tuple[Model, Callable[[], Model]]:
    rng = random.Random(0)

    def draw() -> Model:
        seed = rng.randrange(2**31)
        return lambda images: network(_RoughGradient.apply(images, seed))

    return lambda images: draw()(images), draw


def test_a_random_model_with_a_sampler_is_asked_about_its_draws(networks: dict[str, nn.Module]) -> None:
    model, sampler = choosing(list(networks.values()))
    findings = linted(model, sampler=sampler, served=lambda pixels: served(networks["plain"], pixels))
    assert findings["R1"].verdict == "ok"
    assert "see E1 to E3" in findings["R1"].figure
    for code in ("E1", "E2", "E3"):
        assert findings[code].verdict in ("ok", "alarm")
        assert "n = " in findings[code].figure
    assert findings["P1"].verdict == "skipped"
    assert not alarms(findings) - {"E1", "E2"}, lines(list(findings.values()))


def test_the_same_random_model_without_a_sampler_is_an_alarm(networks: dict[str, nn.Module]) -> None:
    model, _ = choosing(list(networks.values()))
    assert verdict("R1", model) == "alarm"


def test_much_noise_makes_an_attack_report_its_luck(robust: nn.Module) -> None:
    model, sampler = noisy(robust, 0.1)
    findings = linted(model, "E2", "R1", "B1", "G1", sampler=sampler)
    assert alarms(findings) == {"E2"}, lines(list(findings.values()))


def test_averaging_that_finds_more_raises_an_alarm(plain: nn.Module) -> None:
    model, sampler = rough(plain)
    findings = linted(model, "E1", "E3", sampler=sampler, eps=4 / 255)
    assert alarms(findings) == {"E1", "E3"}, lines(list(findings.values()))


def test_a_sampler_of_a_model_that_is_not_random_is_no_alarm(robust: nn.Module) -> None:
    findings = linted(robust, sampler=lambda: robust)
    assert alarms(findings) == set(), lines(list(findings.values()))
    assert "not random" in findings["R1"].figure


# --- checks of the attack itself, which is ours: a broken one is put in its place ---


def test_an_attack_that_leaves_the_ball_raises_an_alarm(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evidence_module, "fgsm", lambda model, images, labels, budget: (images + 2 * budget.eps).clamp(0, 1)
    )
    assert alarms(linted(plain)) == {"S7"}


def test_an_attack_that_makes_nan_raises_an_alarm_and_does_not_count_as_success(
    robust: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_module, "fgsm", lambda model, images, labels, budget: images * torch.nan)
    findings = linted(robust)
    assert alarms(findings) == {"S7"}
    assert "FGSM breaks 0" in findings["S2"].figure


def test_an_attack_that_moves_images_without_a_budget_raises_an_alarm(
    plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(model: Model, images: Tensor, labels: Tensor, budget: LinfBudget, **options: object) -> Tensor:
        adversarial = pgd(model, images, labels, budget, **options)  # type: ignore[arg-type]
        return adversarial if budget.eps else (adversarial + 1 / 255).clamp(0, 1)

    monkeypatch.setattr(attacks, "pgd", careless)
    assert alarms(linted(plain)) == {"S1"}


def traced(wrong: Tensor, losses: Tensor | None = None) -> Trace:
    losses = torch.zeros(wrong.shape) if losses is None else losses
    return Trace(wrong=wrong, losses=losses, first=IMAGES, last=IMAGES)


@pytest.fixture
def evidence(plain: nn.Module) -> Evidence:
    """The evidence on a network that answers every image correctly, to which tests add made-up attacks."""
    return Evidence(
        lambda images: F.one_hot(LABELS, 4).float()[: len(images)] * 5 - 1,
        IMAGES,
        LABELS,
        eps=EPS,
        sampler=None,
        surrogate=None,
        served=None,
        seed=0,
        queries=QUERIES,
    )


def ask(code: str, evidence: Evidence) -> bool | None:
    return CHECK[code].ask(evidence)[0]


@pytest.mark.parametrize(("broken", "alarm"), [(0, False), (2, False), (12, True)])
def test_what_one_step_alone_breaks_is_judged_image_by_image(
    evidence: Evidence, broken: int, alarm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence.trace = traced(torch.zeros(40, 60, dtype=torch.bool))
    evidence.one_step = IMAGES
    monkeypatch.setattr(evidence, "wrong", lambda images: torch.arange(60) < broken)
    assert ask("S2", evidence) == alarm


@pytest.mark.parametrize(("late", "second", "alarm"), [(0, 0, False), (1, 1, False), (6, 0, True), (0, 6, True)])
def test_images_broken_only_by_more_steps_or_another_start_raise_an_alarm(
    evidence: Evidence, late: int, second: int, alarm: bool
) -> None:
    wrong = torch.zeros(40, 60, dtype=torch.bool)
    wrong[30:, :late] = True
    evidence.trace = traced(wrong)
    evidence.second_start = torch.arange(60) < second
    assert ask("S3", evidence) == alarm


@pytest.mark.parametrize(("power", "alarm"), [(0.1, False), (1.0, True)])
def test_a_loss_that_still_rises_at_the_end_raises_an_alarm(evidence: Evidence, power: float, alarm: bool) -> None:
    losses = torch.arange(1, 41.0).pow(power)[:, None].expand(40, 60)
    evidence.trace = traced(torch.zeros(40, 60, dtype=torch.bool), losses)
    evidence.second_start = torch.zeros(60, dtype=torch.bool)
    assert ask("S3", evidence) == alarm


@pytest.mark.parametrize(
    ("curve", "alarm"),
    [([1.0, 0.5, 0.0], False), ([0.5, 0.52, 0.0], False), ([0.2, 0.6, 0.0], True), ([0.9, 0.8, 0.7], True)],
)
def test_a_curve_that_rises_or_ends_above_chance_raises_an_alarm(
    evidence: Evidence, curve: list[float], alarm: bool
) -> None:
    evidence.curve = list(zip((0.1, 0.2, 0.5), curve, strict=True))
    assert ask("S4", evidence) == alarm


@pytest.mark.parametrize(("lost", "alarm"), [(0, False), (1, False), (6, True)])
def test_images_that_were_adversarial_on_the_way_only_raise_an_alarm(
    evidence: Evidence, lost: int, alarm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = torch.ones(40, 60, dtype=torch.bool)
    wrong[-1, :lost] = False
    evidence.trace = traced(wrong)
    monkeypatch.setattr(evidence, "wrong", lambda images: torch.ones(60, dtype=torch.bool))
    assert ask("S6", evidence) == alarm


def test_a_threshold_is_exceeded_only_with_the_whole_interval() -> None:
    assert not exceeds(2, 50, 0.02)
    assert exceeds(5, 100, 0.02)
    assert not exceeds(0, 0, 0.02)


# --- odd models, odd input, and what is left behind ---


@pytest.mark.parametrize("logits", [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0]])
def test_a_constant_model_is_an_alarm_and_no_crash(logits: list[float]) -> None:
    findings = lint_model(
        lambda images: torch.tensor(logits).expand(len(images), -1), IMAGES, LABELS % len(logits), eps=EPS, queries=5
    )
    verdicts = {finding.code: finding.verdict for finding in findings}
    assert (verdicts["G1"], verdicts["S5"], verdicts["G3"]) == ("alarm", "alarm", "skipped")


def test_an_untrained_model_is_linted_like_any_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    findings = linted(model)
    assert set(findings) == {check.code for check in CHECKS}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("eps", [1 / 255, 0.5, 1.0])
def test_every_radius_can_be_asked_about(plain: nn.Module, eps: float) -> None:
    assert not {"S1", "S7", "G1", "G3", "R1", "B1", "M1"} & alarms(linted(plain, eps=eps))


def test_one_image_is_enough(plain: nn.Module) -> None:
    assert linted(plain, images=IMAGES[:1], labels=LABELS[:1], queries=5)["B1"].verdict == "skipped"


def test_more_images_than_a_batch_are_attacked_in_parts(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_module, "BATCH", 16)
    assert alarms(linted(plain, surrogate=plain)) == set()


def test_double_precision_images_are_judged_alike(plain: nn.Module) -> None:
    model = copy.deepcopy(plain).double()
    findings = lint_model(model, IMAGES.double(), LABELS, queries=5)
    assert passed(findings), lines(findings)


def test_a_model_that_is_never_right_is_refused_with_the_likely_reasons(plain: nn.Module) -> None:
    with pytest.raises(BadInput, match="60"):
        lint_model(lambda images: torch.eye(4).repeat(60, 1)[1 : len(images) + 1], IMAGES, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, "8.*8/255"),
        ({"eps": 0}, "0"),
        ({"queries": 0}, "0"),
    ],
)
def test_nonsense_is_refused(plain: nn.Module, options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        linted(plain, **options)


def test_a_label_that_is_no_class_and_a_net_in_training_mode_are_refused(plain: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"label 5 .*3"):
        lint_model(plain, IMAGES, LABELS + 2)
    with pytest.raises(BadInput, match=r"call \.eval\(\) first"):
        linted(nn.Sequential(nn.BatchNorm2d(3), plain).train())


def test_the_same_seed_gives_the_same_findings_and_global_random_states_are_left_alone(robust: nn.Module) -> None:
    model = Noisy(robust)  # draws from torch's global generator
    few: dict[str, object] = {"images": IMAGES[:16], "labels": LABELS[:16]}
    runs = []
    for start in (1, 2):
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        runs.append(linted(model, queries=5, seed=4, **few))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()
    assert runs[0] == runs[1]
    assert runs[0] != linted(model, queries=5, seed=5, **few)


def test_linting_changes_nothing_about_a_model(plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    linted(model, surrogate=model)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_each_finding_is_announced_as_soon_as_it_is_there(plain: nn.Module) -> None:
    seen: list[Finding] = []
    findings = lint_model(plain, IMAGES[:8], LABELS[:8], queries=5, watch=seen.append)
    assert tuple(seen) == findings
    assert [finding.code for finding in findings] == [check.code for check in CHECKS]


def test_a_model_passes_unless_a_check_raises_an_alarm() -> None:
    verdicts = [
        Finding(code="S1", name="", verdict=verdict, figure="", meaning="") for verdict in ("ok", "skipped", "alarm")
    ]
    assert not passed(verdicts)
    assert passed(verdicts[:2])


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard-resnet20-cifar10", "eio-resnet20-cifar10"])
def test_an_undefended_model_and_a_defended_one_pass_on_real_images_and_with_their_graphs(name: str) -> None:
    found = lint_bundle(open_model(name), "single", eps=Fraction(8, 255), images=24, queries=20)
    assert [(finding.code, finding.figure) for finding in found.alarms] == []
    verdicts = {finding.code: finding.verdict for finding in found.findings}
    assert verdicts["P1"] == "ok", "the graph that is served was compared"
