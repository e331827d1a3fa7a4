"""Attacks on models that answer at random: expectation over gates (EOT), and ARC for randomised ensembles.

A random model is a *sampler*: a function without arguments that returns one deterministic draw of it, for example a
random gated network along a fresh path. An attack is judged on draws that it has not seen. An attack that stops at the
first draw it fools only reports its luck.

    EOT  Athalye et al. 2018, arXiv:1707.07397
    ARC  Dbouk and Shanbhag, ICML 2022, arXiv:2206.06737, algorithm 2
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo import paths
from zoo.attacks.budget import Budget, LinfBudget, check_budget, check_generator, check_momentum, linf_of, number, whole
from zoo.attacks.gradient import accumulated
from zoo.attacks.images import check_batch, differentiable, full_precision
from zoo.attacks.losses import Loss, ascent, loss_named
from zoo.attacks.models import CheckedModel, checked_model
from zoo.attacks.outputs import Model, Output, check_logits, check_numbers, gradient_of
from zoo.attacks.training_mode import check_mode
from zoo.errors import BadInput, UnknownName
from zoo.gates.derive import mean_probability
from zoo.gates.rgn import RandomGatedNetwork

Sampler = Callable[[], Model]
Average = Literal["gradient", "loss", "probability", "sign"]


def path_sampler(rgn: RandomGatedNetwork, rng: random.Random, *, folded: bool = True) -> Sampler:
    """Return the sampler of a random gated network: each draw is one fresh path, in evaluation mode.

    Args:
        rgn: the network; its weights must not change while draws of it are in use.
        rng: draws the gates.
        folded: fold the BatchNorms into the convolutions, the same function at less cost.
    """

    def draw() -> Model:
        return path_model(rgn, paths.sample(rgn.num_gates, rgn.candidates, rng), folded=folded)

    return draw


def path_model(rgn: RandomGatedNetwork, path: Sequence[int], *, folded: bool = True) -> Model:
    """Return one path of a random gated network as a function of images, its weights detached.

    Raises:
        BadInput: the network is in training mode and its BatchNorms are not folded.
    """
    if folded:
        return rgn.runner(rgn.num_features, rgn.folded(path), folded=True)
    check_mode(rgn)
    tensors = {name: tensor.detach() for name, tensor in rgn.select(path).items()}
    return rgn.runner(rgn.num_features, tensors)


def checked_draws(sampler: Sampler, output: Output | None = None) -> Callable[[], CheckedModel]:
    """Return the sampler with each draw as attacks see it; the operations of the first one are looked at.

    Raises:
        BadInput: the sampler cannot be called; what it returns raises it for a draw in training mode.
    """
    if not callable(sampler):
        raise BadInput(f"a sampler must be a function that returns a model, got {type(sampler).__name__}")
    operations_checked = False

    def draw() -> CheckedModel:
        nonlocal operations_checked
        checked = checked_model(sampler(), output, randomness="expect", operations_checked=operations_checked)
        operations_checked = True
        return checked

    return draw


def relaxed_model(rgn: RandomGatedNetwork) -> Model:
    """Return the deterministic network in which every gated layer averages the outputs of its candidates.

    A convolution with its BatchNorm folded in is affine, so the average of the outputs is the output of the averaged
    weights: one network at the price of one path, differentiable in the image. A surrogate for random gates.
    """
    folded = [rgn.folded([candidate] * rgn.num_gates) for candidate in range(rgn.candidates)]
    mean = {name: torch.stack([tensors[name] for tensors in folded]).mean(0) for name in folded[0]}
    return rgn.runner(rgn.num_features, mean, folded=True)


def eot_pgd(
    sampler: Sampler,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    draws: int = 20,
    average: Average = "gradient",
    loss: str | Loss = "cross_entropy",
    targets: Tensor | None = None,
    momentum: float = 0.0,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> Tensor:
    """PGD on a random model: every step averages over fresh draws, and the best iterate is chosen by its mean loss.

    Args:
        sampler: returns one deterministic draw of the model at each call.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: radius, steps, restarts; no attempt stops early, because one fooled draw proves nothing.
        draws: draws per step, k. One draw and `average="gradient"` is PGD with fresh gates at every step.
        average: what is averaged over the draws: "gradient" of the loss; "loss", the same with one backward pass (and
            k times the memory); "probability", the loss of the mean probability, what an averaging server answers by;
            "sign", the signs of the gradients.
        loss: one of `LOSSES` or a function like them.
        targets: int64 (batch,) for a targeted attack.
        momentum: as in `pgd`.
        generator: draws the random starts, on the CPU.
        output: where the logits are in what a draw returns; see `outputs.Output`.

    Returns:
        For each image the iterate of all attempts with the highest mean loss over the draws of its own step. With one
        draw, where that would select lucky draws, the last iterate of the last attempt.

    Raises:
        BadInput: fewer than one draw; see `pgd` for the rest.
    """
    check_budget(budget)
    check_generator(generator)
    draws, momentum = whole(draws, "draws"), check_momentum(momentum)
    if draws < 1:
        raise BadInput(f"EOT needs at least 1 draw per step, got {draws}")
    if average not in get_args(Average):
        raise UnknownName(average, get_args(Average), kind="average")
    rise = _expectation(checked_draws(sampler, output), draws, average, loss)
    images, labels, targets = check_batch(images, labels, targets)
    best = images.clone()
    if not len(images):
        return best
    ball = budget.around(images)
    best_loss = torch.full((len(images),), -torch.inf, device=images.device, dtype=full_precision(images).dtype)
    for _ in range(budget.restarts):
        adversarial = budget.start(images, generator) if budget.random_start else images
        velocity = torch.zeros_like(full_precision(images))
        for step in range(budget.steps + 1):
            last = step == budget.steps
            if last and draws == 1:
                best = adversarial
                break
            gradient, losses = rise(adversarial, labels, targets)
            better = losses > best_loss
            best_loss = torch.where(better, losses, best_loss)
            best = torch.where(better[:, None, None, None], adversarial, best)
            if last:
                break
            if momentum:
                gradient = velocity = accumulated(velocity, gradient, momentum)
            adversarial = ball.project(adversarial + budget.step * budget.direction(gradient))
    return best


def _expectation(
    sampler: Callable[[], CheckedModel], draws: int, average: Average, loss: str | Loss
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Return the function that gives the averaged gradient and the mean loss of each image."""
    chosen = loss_named(loss)

    def separately(images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(full_precision(images))
        losses = torch.zeros(len(images), device=images.device, dtype=total.dtype)
        for _ in range(draws):
            gradient, one, _ = ascent(sampler(), chosen)(images, labels, targets)
            total += gradient.sign() if average == "sign" else gradient
            losses += one.to(losses.dtype)
        return total / draws, losses / draws

    def together(images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = differentiable(images)
            drawn = [sampler() for _ in range(draws)]
            logits = torch.stack([one(images) for one in drawn])
            check_logits(logits[0].detach(), labels, targets)
            if average == "probability":
                losses = chosen(mean_probability(logits), labels, targets)
            else:
                losses = torch.stack([chosen(one, labels, targets) for one in logits]).mean(0)
            with drawn[0].explained_errors(images):
                gradient = gradient_of(losses.sum(), images)
        losses = losses.detach()
        check_numbers(logits.detach()[0], losses, gradient)
        return gradient, losses.to(gradient.dtype)

    return separately if average in ("gradient", "sign") else together


def arc(
    models: Sequence[Model],
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    weights: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> Tensor:
    """Attack a randomised ensemble of known members so that its *expected* accuracy falls, member by member.

    PGD on the expected loss may fool no member although each can be fooled; ARC steps towards the nearest boundary of
    one member after the other, long enough not to undo the steps before, and keeps a step only where the expected
    accuracy did not rise.

    Args:
        models: the members, deterministic. For random gates: a sample of 4 to 16 paths, judged afterwards on others.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: `eps`, `steps` (rounds over the members; 20 in the paper), `restarts` and `random_start`; the length of
            a local step is `step_size`, or eps if None, as in the paper's l_inf runs.
        weights: how often each member answers; alike if None.
        generator: draws the random starts, on the CPU.
        output: where the logits are in what every member returns; see `outputs.Output`.

    Returns:
        The images with the lowest expected accuracy found, within `budget.eps` and [0, 1].

    Raises:
        BadInput: no member, or weights that are not one positive, finite number per member.
    """
    budget = linf_of(budget, "ARC")
    check_generator(generator)
    if not models:
        raise BadInput("ARC needs at least one member, got none")
    weights = [1.0] * len(models) if weights is None else [number(weight, "a weight") for weight in weights]
    if len(weights) != len(models) or not all(weight > 0 for weight in weights) or not sum(weights) < math.inf:
        raise BadInput(
            f"ARC needs one positive weight per member, got {weights} for {len(models)} members; none may be infinite"
        )
    share = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(models)), key=lambda index: -share[index])
    images, labels, _ = check_batch(images, labels)
    if not len(images):
        return images.clone()
    members = [checked_model(model, output) for model in models]

    def expected(adversarial: Tensor) -> Tensor:
        total = torch.zeros(len(images), device=images.device)
        with torch.no_grad():
            for member, weight in zip(members, share, strict=True):
                total += weight * (member(adversarial).argmax(1) == labels)
        return total

    ball = budget.around(images)
    best, best_accuracy = images.clone(), expected(images)
    length = budget.eps if budget.step_size is None else budget.step_size
    for _ in range(budget.restarts):
        adversarial = budget.start(images, generator) if budget.random_start else images
        accuracy = expected(adversarial)
        for _round in range(budget.steps):
            local = torch.zeros_like(full_precision(images))
            local_accuracy = accuracy
            for position, index in enumerate(order):
                candidate = _towards_boundary(members[index], adversarial, local, labels, length, budget.eps, position)
                found = expected(ball.project(adversarial + candidate))
                kept = (found <= local_accuracy)[:, None, None, None]
                local = torch.where(kept, candidate, local)
                local_accuracy = torch.minimum(found, local_accuracy)
            moved = ball.project(adversarial + local)
            found = expected(moved)
            kept = found <= accuracy
            adversarial = torch.where(kept[:, None, None, None], moved, adversarial)
            accuracy = torch.where(kept, found, accuracy)
        better = accuracy < best_accuracy
        # the image itself gives way to an attempt that is no worse: it has at least used the budget
        better |= (accuracy == best_accuracy) & (best == images).flatten(1).all(1)
        best = torch.where(better[:, None, None, None], adversarial, best)
        best_accuracy = torch.minimum(accuracy, best_accuracy)
    return best


def _towards_boundary(
    model: CheckedModel, adversarial: Tensor, local: Tensor, labels: Tensor, length: float, eps: float, position: int
) -> Tensor:
    """Return the local step extended towards the nearest linearised boundary of one member, of l_inf norm `length`."""
    point = (adversarial + local).to(adversarial.dtype)
    with torch.enable_grad():
        point = differentiable(point)
        logits = model(point)
        check_logits(logits.detach(), labels)
        predicted = logits.detach().argmax(1)
        nearest = torch.full((len(labels),), torch.inf, device=logits.device, dtype=logits.dtype)
        direction, normal = torch.zeros_like(local), torch.zeros_like(local)
        classes = logits.shape[1]
        top = logits.gather(1, predicted[:, None])[:, 0]
        for other in range(classes):
            difference = top - logits[:, other]
            with model.explained_errors(point):
                gradient = gradient_of(difference.sum(), point, retain_graph=other < classes - 1)
            check_numbers(logits.detach(), difference.detach(), gradient)
            size = gradient.flatten(1).abs().sum(1).clamp_min(1e-12)
            distance = difference.detach().abs() / size
            nearer = (distance < nearest) & (predicted != other)
            nearest = torch.where(nearer, distance, nearest)
            mask = nearer[:, None, None, None]
            direction = torch.where(mask, -gradient.sign(), direction)
            normal = torch.where(mask, gradient / size[:, None, None, None], normal)
    # a member that is wrong already needs no step of its own
    wrong = predicted != labels
    if position == 0:
        reach = torch.full_like(nearest, length)
    else:
        # far enough that, rescaled to `length`, the sum still crosses this boundary (section 4.2 of the paper)
        undone = (nearest + (normal * local).flatten(1).sum(1)).abs()
        close = nearest < length
        reach = torch.where(
            close, length / (length - nearest).clamp_min(1e-12) * undone + 0.05 * eps, torch.full_like(nearest, length)
        )
    step = torch.where(wrong, torch.zeros_like(reach), reach)[:, None, None, None] * direction
    candidate = local + step.to(local.dtype)
    size = candidate.flatten(1).abs().amax(1).clamp_min(1e-12)[:, None, None, None]
    return candidate * (length / size)
