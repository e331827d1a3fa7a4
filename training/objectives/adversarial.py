"""Adversarial training of one network: PGD, fast, free and TRADES, and weight perturbation on top (AWP)."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, check_choice
from training.objectives.network import Network, Statistics, statistics_of, together
from training.objectives.single import Loss, NetworkObjective, View, Wrapper, kl_divergence
from zoo.attacks import LinfBudget, pgd, unchecked
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class TrainingAttack:
    """PGD in an l_inf ball around each image; radii and steps in pixel units ([0, 1])."""

    eps: float = 8 / 255
    steps: int = 10
    step_size: float = 2 / 255
    random_start: bool = True
    """Start uniformly in the ball."""
    batch_norm: Statistics = "train"
    """Statistics while the examples are made: "train" as in the reference codes of Madry et al. and of AWP, where every
    forward moves the running statistics; "train_frozen" leaves those alone; "eval" as TRADES."""

    def __post_init__(self) -> None:
        self.budget()  # checks the numbers
        if self.steps < 1:
            raise BadInput(f"need at least 1 attack step, got {self.steps}; train with standard for none")
        check_choice("batch_norm", self.batch_norm, Statistics)

    def budget(self) -> LinfBudget:
        """Return the budget of the attack."""
        return LinfBudget(
            eps=self.eps, steps=self.steps, step_size=self.step_size, random_start=self.random_start, restarts=1
        )

    def on(self, networks: Network | Sequence[Network], images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial examples, shaped like `images`, against one network or several that answer together."""
        chosen = [networks] if isinstance(networks, Network) else list(networks)
        generator = chosen[0].step.generator("attack", *(network.index for network in chosen))
        with statistics_of(chosen, self.batch_norm):
            return pgd(unchecked(together(chosen)), images, labels, self.budget(), generator=generator)

    @property
    def forwards(self) -> float:
        """The cost in forward passes: per step one, and a backward for the images alone, about one more."""
        return 2.0 * self.steps


Attacked = Literal["ensemble", "member"]


@dataclass(frozen=True, kw_only=True)
class ExamplesObjective(NetworkObjective):
    """A loss on adversarial examples; all are made before any weight has a gradient."""

    attack: TrainingAttack = TrainingAttack()
    attacked: Attacked = "ensemble"
    """Of an ensemble: attack what its members answer together, by their mean probability, or each member by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attacked", self.attacked, Attacked)

    @abstractmethod
    def examples(self, networks: Sequence[Network], batch: Batch) -> Tensor:
        """Return examples, shaped like the batch's images, against networks that answer together."""

    def prepare(self, networks: Sequence[Network], batch: Batch) -> list[Tensor]:
        """See `NetworkObjective.prepare`."""
        if self.attacked == "ensemble":
            return [self.examples(networks, batch)] * len(networks)
        return [self.examples([network], batch) for network in networks]


@dataclass(frozen=True, kw_only=True)
class PgdAt(ExamplesObjective):
    """Mean cross-entropy on PGD examples against the network itself.

    Madry et al. 2018, arXiv:1706.06083, equation 2.1:

        min_w  E  max_{|d| <= eps}  CE(f_w(x + d), y)

    The reference is the code of Rice et al. 2020 and of AWP: examples from a uniform start, in training mode. Where an
    ensemble is attacked as a whole, each member learns the same examples (DVERGE's `AdvT`).
    """

    method: ClassVar[str] = "pgd_at"
    published: ClassVar[str] = "Madry et al., ICLR 2018"

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return networks * (self.attack.forwards + 3.0)

    def examples(self, networks: Sequence[Network], batch: Batch) -> Tensor:
        """See `ExamplesObjective.examples`."""
        return self.attack.on(networks, batch.images, batch.labels)

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; one forward pass."""
        logits = network(inputs)
        return Loss(self.cross_entropy(logits, batch.labels), (View(inputs, logits),))


@dataclass(frozen=True, kw_only=True)
class FastAt(PgdAt):
    """Mean cross-entropy on examples of one gradient step.

    Wong, Rice and Kolter 2020, arXiv:2001.03994, algorithm 3: FGSM from a random start.

        d ~ U(-eps, eps);  d <- clip(d + a sign(grad_d CE(f_w(x + d), y)));  min_w CE(f_w(x + d), y),  a = 1.25 eps

    It is Madry's training with one longer step. Robust accuracy may collapse within an epoch while clean accuracy rises
    ("catastrophic overfitting"): watch it on held-out images, and keep the last good state.
    """

    method: ClassVar[str] = "fast_at"
    published: ClassVar[str] = "Wong et al., ICLR 2020"

    attack: TrainingAttack = TrainingAttack(steps=1, step_size=10 / 255)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack.steps != 1:
            raise BadInput(f"fast_at takes 1 attack step, got {self.attack.steps}; train with pgd_at for more")


@dataclass(frozen=True, kw_only=True)
class FreeAt(NetworkObjective):
    """Mean cross-entropy on images moved by what earlier replays and batches left.

    Row i of the perturbation belongs to image i of whatever batch comes. A shorter batch uses and moves the first rows;
    rows that a longer batch is the first to need start at 0. Each member of an ensemble has a perturbation of its own.

    Shafahi et al. 2019, arXiv:1904.12843, algorithm 1: a batch is shown m times in a row. Each backward pass gives both
    the gradient of the weights, for the optimiser's step, and that of the images, for one step of a perturbation that
    is never reset, not even for the next batch:

        d <- clip(d + eps sign(grad_x CE(f_w(x + d), y)))        the perturbation of the next replay

    A weight step costs no more than a standard one; ten passes over the data with m = 8 are as many steps as 80 epochs.
    """

    method: ClassVar[str] = "free_at"
    published: ClassVar[str] = "Shafahi et al., NeurIPS 2019"
    per_image_memory: ClassVar[bool] = True

    eps: float = 8 / 255
    step_size: float | None = None
    """Length of the perturbation's step; eps if None, so that one step reaches from one side of 0 to the bound."""
    replays: int = 8
    """Consecutive weight steps on the same images, m."""

    def __post_init__(self) -> None:
        LinfBudget(eps=self.eps, step_size=self.step_size)  # checks the numbers
        if self.replays < 1:
            raise BadInput(f"need at least 1 replay, got {self.replays}; the paper's is 8")
        super().__post_init__()

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; of one replay."""
        return 3.0 * networks

    def inputs(self, network: Network, batch: Batch) -> Tensor:
        """Return the images, moved: a leaf whose gradient the loss' backward pass turns into the next perturbation.

        A hook does that, so it happens in whatever backward pass the loss takes part in, and only there.
        """
        images, memory, name = batch.images, network.step.memory.tensors, f"free_at/delta/{network.index}"
        budget = LinfBudget(eps=self.eps)
        length = self.eps if self.step_size is None else self.step_size
        stored = memory.get(name)
        delta = torch.zeros_like(images)
        if stored is not None and stored.shape[1:] == images.shape[1:]:
            delta[: len(stored)] = stored[: len(images)]
        else:
            stored = None
        examples = budget.project(images + delta, images).requires_grad_()

        def move(examples: Tensor) -> None:
            assert examples.grad is not None
            moved = budget.project(examples.detach() + length * examples.grad.sign(), images) - images
            examples.grad = None
            rest = [] if stored is None else [stored[len(images) :].to(images.device)]
            memory[name] = torch.cat([moved, *rest])

        examples.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
        return examples

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; one forward pass."""
        logits = network(inputs)
        # detached: terms that a wrapper adds per view train the weights and leave the perturbation alone
        return Loss(self.cross_entropy(logits, batch.labels), (View(inputs.detach(), logits),))


@dataclass(frozen=True, kw_only=True)
class Trades(ExamplesObjective):
    """Cross-entropy on clean images, and the divergence of the answers to images that were moved to make it large.

    Zhang et al. 2019, arXiv:1901.08573:

        min_w  E  CE(f_w(x), y) + beta max_{|d| <= eps} KL(p_w(x) || p_w(x + d)),        beta = 1 / lambda of the paper

    The gradient flows through both sides of the divergence. As in the authors' code, examples are made with running
    BatchNorm statistics, from Gaussian noise around the image, and clean and adversarial images go through the network
    separately, each with its own batch statistics.
    """

    method: ClassVar[str] = "trades"
    published: ClassVar[str] = "Zhang et al., ICML 2019"

    attack: TrainingAttack = TrainingAttack(eps=0.031, step_size=0.007, random_start=False, batch_norm="eval")
    """What maximises the divergence; it starts from Gaussian noise unless `random_start` says uniformly in the ball."""
    start_noise: float = 0.001
    """Standard deviation of that noise, in pixel units; at the image itself the divergence has no gradient."""
    beta: float = 6.0
    """Weight of the divergence."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise BadInput(f"need a finite beta >= 0, got {self.beta}; the paper's are 1 and 6")
        if not 0 < self.start_noise < math.inf:
            raise BadInput(
                f"need start_noise > 0, got {self.start_noise}; at the image itself the divergence has no gradient"
            )
        super().__post_init__()

    @property
    def passes(self) -> int:
        """See `NetworkObjective.passes`: clean images and adversarial ones."""
        return 2

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; what the clean images are answered is computed once per attack."""
        return networks * (1.0 + self.attack.forwards + 6.0)

    def examples(self, networks: Sequence[Network], batch: Batch) -> Tensor:
        """See `ExamplesObjective.examples`."""
        images, model, step = batch.images, together(networks), networks[0].step
        generator = step.generator("attack", *(network.index for network in networks))
        start = None
        if not self.attack.random_start:
            noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
            start = images + self.start_noise * noise
        with statistics_of(networks, self.attack.batch_norm):
            with torch.no_grad():
                clean = model(images).log_softmax(1)

            def divergence(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
                return F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)

            budget, victim = self.attack.budget(), unchecked(model)
            return pgd(victim, images, batch.labels, budget, loss=divergence, start=start, generator=generator)

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; two forward passes, clean images first."""
        clean, moved = network(batch.images), network(inputs)
        value = self.cross_entropy(clean, batch.labels) + self.beta * kl_divergence(clean, moved)
        return Loss(value, (View(batch.images, clean), View(inputs, moved, self.beta)))


@dataclass(frozen=True, kw_only=True)
class Awp(Wrapper):
    """The loss within, at weights that were moved to make it large.

    Tensors with one dimension (biases, BatchNorm's gains) stay. With EWS the order is `Awp(inner=Ews(...))`: weak
    subnets see the moved weights and do not influence the direction.

    Wu et al. 2020, arXiv:2004.05884:

        v = gamma |w| g / |g|,  g = grad_w L(w),        for each weight tensor; one step of ascent, onto the bound
        w <- w - r grad L(w + v)

    Examples are made at w. The optimiser steps after w is restored, bit for bit. The paper's code steps at w + v and
    then subtracts v, which is the same up to rounding and weight decay: a difference of r * decay * v.
    """

    method: ClassVar[str] = "awp"
    published: ClassVar[str] = "Wu et al., NeurIPS 2020"

    inner: NetworkObjective = field(default_factory=PgdAt)
    gamma: float = 0.01
    """Length of a tensor's perturbation relative to the tensor's; the paper's code has 0.005 with TRADES."""
    warm_up: int = 0
    """Epochs of the phase before weights are perturbed; the paper's code has 10 with TRADES."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < math.inf:
            raise BadInput(f"need a finite gamma >= 0, got {self.gamma}; the paper's are 0.01 and 0.005")
        if self.warm_up < 0:
            raise BadInput(f"need warm_up >= 0 epochs, got {self.warm_up}")
        if any(isinstance(inner, Awp) for inner in self.within):
            raise BadInput("awp is within awp, and weights are perturbed once; raise gamma instead")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; one more evaluation of the loss, and its gradient."""
        return self.inner.forwards(networks, exits) + 3.0 * networks * self.passes

    def backward(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """Add the gradients of the loss at w + v; the weights are w again when it returns, or raises."""
        if network.step.epoch < self.warm_up:
            return self.inner.backward(network, inputs, batch)
        with moved(network.parameters, self.perturbation(network, inputs, batch)):
            return self.inner.backward(network, inputs, batch)

    def perturbation(self, network: Network, inputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return v by parameter name; 0 for a weight whose gradient is 0, none for one the loss does not use.

        BatchNorm normalises with the batch and leaves its running statistics alone; dropout is off. No `.grad` is
        filled. Ranks that share a batch agree on v: it follows from the gradient over all of it.
        """
        weights = {name: weight for name, weight in network.parameters.items() if weight.ndim > 1}
        with network.statistics("train_frozen"):
            loss = self.inner.ascended(network, inputs, batch)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}
        # in one message where there are ranks to average over
        flat = network.step.average(torch.cat([gradient.reshape(-1) for gradient in gradients.values()]))
        parts = flat.split([gradient.numel() for gradient in gradients.values()])  # type: ignore[no-untyped-call]
        return {
            name: self.gamma * torch.linalg.vector_norm(weights[name].detach()) * _unit(part).view_as(weights[name])
            for name, part in zip(gradients, parts, strict=True)
        }


@contextlib.contextmanager
def moved(weights: Mapping[str, nn.Parameter], by: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with `weights` moved in place by the tensors named in `by`; afterwards their old values are copied back."""
    kept = {name: weights[name].detach().clone() for name in by}
    try:
        with torch.no_grad():
            for name, perturbation in by.items():
                weights[name].add_(perturbation)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                weights[name].copy_(value)


def _unit(gradient: Tensor) -> Tensor:
    """Return the gradient at length 1; 0 for 0."""
    # by the largest entry first: the square of a small gradient underflows
    scaled = gradient / gradient.abs().amax().clamp_min(1e-30)
    length: Tensor = torch.linalg.vector_norm(scaled)
    return scaled / length.clamp_min(1e-12)
