"""Training networks on what the others confuse: DVERGE and Ensemble-in-One (Cai et al., AAAI 2023).

For a layer l each network i distils the non-robust features of target images into source images (DVERGE, Yang et al.
2020, arXiv:2009.14720, equation 1),

    x'_i = argmin |f_i^l(x) - f_i^l(x_t)|_2^2    subject to  |x - x_s| <= eps,

and then learns to classify what the *others* distilled as the source's class: sum_{j != i} CE(f_i(x'_j), y_s).
The methods differ in what the networks are, in when l is drawn and in the details of distillation, which are fields.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from training.objectives.adversarial import TrainingAttack
from training.objectives.base import Batch, Needs, Objective, Step, check_choice, check_weights
from training.objectives.network import Network, check_members, check_one_exit, networks_of
from training.randomness import gate_generator
from zoo.attacks.budget import LinfBudget
from zoo.attacks.distillation import distil
from zoo.attacks.training_mode import unchecked
from zoo.errors import BadInput
from zoo.gates import graphs, self_check
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork, fold
from zoo.paths import sample_distinct

DistillationNorm = Literal["eval", "train"]
LayerDrawn = Literal["batch", "epoch"]

PREFIX_SHARE = 0.52
"""How much of a network runs up to its layer, on average over layers (ResNet-20)."""


@dataclass(frozen=True, kw_only=True)
class DistilledObjective(Objective):
    """Cross-entropy of each network on what the other networks distilled."""

    streams: ClassVar[int] = 2

    paths: int = 3
    """Paths of a random gated network per step, p; fewer where the first l gates do not allow that many distinct
    prefixes."""
    eps: float = 0.07
    """Radius of the distillation, in pixel units (0.03 for VGG-16)."""
    distillation_steps: int = 10
    step_size: float | None = None
    """Length of a distillation step; eps / distillation_steps if None."""
    random_start: bool = False
    """Start uniformly in the ball (released Ensemble-in-One) instead of at the source image (DVERGE)."""
    momentum: float = 0.0
    """Momentum on the L1-normalised gradient; DVERGE uses 1, released Ensemble-in-One none."""
    batch_norm: DistillationNorm = "eval"
    """BatchNorm in distillation: "eval" uses and keeps the running statistics (released Ensemble-in-One); "train" uses
    batch statistics and updates the running ones at every step (DVERGE)."""
    activated: bool = False
    """Compare features behind the activation (released Ensemble-in-One) instead of before it (DVERGE)."""
    layer_drawn: LayerDrawn = "batch"
    """How long a layer is kept: for one batch (Ensemble-in-One) or for an epoch (DVERGE)."""
    adversarial: TrainingAttack | None = None
    """Each network also learns PGD examples against itself; no attack if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 1 or self.distillation_steps < 1:
            raise BadInput(f"need at least 1 path and 1 step, got {self.paths} and {self.distillation_steps}")
        if not 0 <= self.eps <= 1:
            raise BadInput(f"need 0 <= eps <= 1, got {self.eps}; pixels are in [0, 1], so write 0.07, not 18")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise BadInput(f"need 0 < step_size <= 1, got {self.step_size}; pixels are in [0, 1]")
        check_weights(momentum=self.momentum)
        check_choice("batch_norm", self.batch_norm, DistillationNorm)
        check_choice("layer_drawn", self.layer_drawn, LayerDrawn)

    @abstractmethod
    def combined(self, distilled: Tensor, adversarial: Tensor | None, networks: int) -> Tensor:
        """Return what each of `networks` networks minimises.

        Args:
            distilled: its cross-entropy on what the others distilled, summed over them.
            adversarial: its cross-entropy on its own adversarial examples, if there are any.
            networks: how many are trained in this step.
        """

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`; members must have the same number of layers to compare."""
        check_one_exit(model, "distillation")
        members = list(model.members) if isinstance(model, Ensemble) else []
        found = sorted({num_features(member) for member in members})
        if len(found) > 1:
            raise BadInput(
                f"distillation compares one layer of every member, and they have {found} layers; "
                "use members of one architecture"
            )

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; of a random gated network `paths` are counted, fewer run where l allows fewer."""
        number = networks if networks > 1 else self.paths
        # In evaluation mode the target's feature is computed once, else at every step; gradients are for images alone.
        prefixes = 2.0 * self.distillation_steps + (1 if self.batch_norm == "eval" else self.distillation_steps)
        attacked = 0.0 if self.adversarial is None else self.adversarial.forwards + 3.0
        return number * (PREFIX_SHARE * prefixes + 3.0 * max(number - 1, 1) + attacked)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; `batches` are the source and the target, from independent shuffles."""
        self.check(model)
        source, target = batches
        layer, networks = self.drawn(model, step)
        # All images are made before any gradient is accumulated: they must come from one state of the weights.
        distilled = [self.distil(network, layer, source.images, target.images) for network in networks]
        attacked = []
        if self.adversarial is not None:
            attacked = [self.adversarial.on(network, source.images, source.labels) for network in networks]
        losses, adversarial_losses = [], []
        for number, network in enumerate(networks):
            others = [images for other, images in enumerate(distilled) if other != number] or distilled
            adversarial = None
            with step.autocast(source.images.device):  # one context: autocast casts the weights once
                # One forward per distiller: concatenated batches would share BatchNorm statistics.
                loss = self.cross_entropies([network(images) for images in others], source.labels).sum()
                if attacked:
                    adversarial = self.cross_entropy(network(attacked[number]), source.labels)
                    adversarial_losses.append(adversarial.detach())
            self.combined(loss, adversarial, len(networks)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach() / len(others))
        measured = {"loss": torch.stack(losses).mean(), "layer": torch.tensor(float(layer))}
        if adversarial_losses:
            measured["adversarial_loss"] = torch.stack(adversarial_losses).mean()
        return measured

    def drawn(self, model: nn.Module, step: Step) -> tuple[int, list[Network]]:
        """Return the layer that a step distils at and what it trains: members, or paths that differ up to there."""
        rng = step.rng("gates")
        chooser = rng if self.layer_drawn == "batch" else gate_generator(step.seed, "layer", step.epoch)
        if not isinstance(model, RandomGatedNetwork):
            networks = networks_of(model, step)
            return chooser.randint(1, num_features(networks[0].module)), networks
        layer = chooser.randint(1, model.num_features)
        within = min(layer, model.num_gates)
        number = min(self.paths, model.candidates**within)
        chosen = sample_distinct(number, model.num_gates, model.candidates, rng, within=within)
        return layer, [Network(model.template, step, index, model, path) for index, path in enumerate(chosen)]

    def distil(self, network: Network, layer: int, source: Tensor, target: Tensor) -> Tensor:
        """Return images within eps of `source`, in [0, 1], whose feature `layer` of `network` imitates the target's.

        Only the prefix up to the layer runs, the target's feature is computed once (where the BatchNorm mode keeps it
        valid), and gradients are taken for the images alone.
        """
        budget = LinfBudget(
            eps=self.eps,
            steps=self.distillation_steps,
            step_size=self.step_size or self.eps / self.distillation_steps or None,
            random_start=self.random_start,
        )
        feature = self._feature(network, layer)
        with network.statistics(self.batch_norm):
            return distil(
                unchecked(feature),
                source,
                target,
                budget,
                momentum=self.momentum,
                fixed=self.batch_norm == "eval",  # else statistics move with every forward, as in DVERGE
                generator=network.step.generator("distil", network.index),
            )

    def _feature(self, network: Network, layer: int) -> Callable[[Tensor], Tensor]:
        """Return the prefix as a function of images alone, its tensors bound and detached."""
        step, folded = network.step, self.batch_norm == "eval"
        prefixes = network.rgn or Prefixes.of(network.module)
        prefix = prefixes.prefix(layer, activated=self.activated, folded=folded)
        chosen = {} if network.rgn is None or network.path is None else network.rgn.select(network.path)
        if folded:
            dtype = None if step.precision == torch.float32 else step.precision
            run = graphs.bound(prefix, fold(network.module, prefixes.convolutions, chosen, dtype=dtype))
            return lambda images: run(images.to(step.precision))
        own = {**dict(network.module.named_parameters()), **dict(network.module.named_buffers()), **chosen}
        run = graphs.bound(prefix, {name: tensor.detach() for name, tensor in own.items()})

        def in_precision(images: Tensor) -> Tensor:
            with step.autocast(images.device):
                return run(images)

        return in_precision


class Prefixes:
    """A plain network cut off at every layer that distillation may compare, as a random gated one of it would be.

    Its layers are the convolutions of the main branch, and the logits. Graphs share the network's layers; their tensors
    are bound at each call, so it may move to another device. A network that got other layers must be asked for anew.
    """

    _known: ClassVar[WeakKeyDictionary[nn.Module, Prefixes]] = WeakKeyDictionary()

    def __init__(self, network: nn.Module) -> None:
        self._graph = self_check.trace(network)
        self.convolutions = graphs.convolutions(self._graph)
        self.layers = [layer for layer in self.convolutions if layer.main]
        self._cut: dict[tuple[int, bool, bool], fx.GraphModule] = {}

    @classmethod
    def of(cls, network: nn.Module) -> Prefixes:
        """Return the prefixes of `network`, traced at the first call and kept for as long as the network is."""
        if network not in cls._known:
            cls._known[network] = cls(network)
        return cls._known[network]

    def prefix(self, layer: int, *, activated: bool, folded: bool) -> fx.GraphModule:
        """Return the network up to `layer`; see `RandomGatedNetwork.prefix`."""
        key = (layer, activated, folded)
        if key not in self._cut:
            self._cut[key] = graphs.prefix(
                self._graph, self.layers, layer, activated=activated, folded=self.convolutions if folded else ()
            )
        return self._cut[key]


def num_features(network: nn.Module) -> int:
    """Return how many layers of a network distillation may compare: its convolutions off the shortcuts, and the logits.

    Raises:
        BadInput: a plain network that `torch.fx` cannot trace.
    """
    if isinstance(network, RandomGatedNetwork):
        return network.num_features
    return len(Prefixes.of(network).layers) + 1


@dataclass(frozen=True, kw_only=True)
class Dverge(DistilledObjective):
    """Cross-entropy of each member on what the other members distilled.

    There is no clean term: training starts from networks that were trained on their own (`standard`). The defaults are
    the released code's. Of a random gated network `paths` random paths stand for the members.
    """

    method: ClassVar[str] = "dverge"
    published: ClassVar[str] = "Yang et al., NeurIPS 2020"
    needs: ClassVar[Needs] = "several members"

    momentum: float = 1.0
    """Momentum on the L1-normalised gradient of distillation."""
    batch_norm: DistillationNorm = "train"
    """BatchNorm in distillation: "train" uses batch statistics and updates the running ones at every step; "eval" uses
    and keeps the running ones, and costs less."""
    layer_drawn: LayerDrawn = "epoch"
    """How long a layer is kept: for an epoch, or for one batch."""
    coefficient: float = 1.0
    """Weight of the loss on distilled images; that on adversarial ones, if there are any, counts 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 2:
            raise BadInput(f"need at least 2 paths to train against each other, got {self.paths}")
        check_weights(coefficient=self.coefficient)
        if self.coefficient == 0 and self.adversarial is None:
            raise BadInput("with coefficient 0 and no adversarial attack there is nothing to learn; set one of them")

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        check_members(model, "dverge")
        if isinstance(model, RandomGatedNetwork) and model.candidates < 2:
            raise BadInput(f"dverge needs candidates >= 2 per gated layer, got {model.candidates}: there is one path")
        super().check(model)

    def combined(self, distilled: Tensor, adversarial: Tensor | None, networks: int) -> Tensor:
        """See `DistilledObjective.combined`."""
        loss = self.coefficient * distilled
        return loss if adversarial is None else loss + adversarial


@dataclass(frozen=True, kw_only=True)
class EnsembleInOne(DistilledObjective):
    """Cross-entropy of each path on what the other paths distilled.

    Algorithm 1 of the paper: the paths of a step differ within the first l gates. The paper and the authors' released
    code differ: `paper()` and `release()` are the two readings, and each disputed detail is a field.
    """

    method: ClassVar[str] = "ensemble_in_one"
    published: ClassVar[str] = "Cai et al., AAAI 2023"
    needs: ClassVar[Needs] = "gates"

    divide_by_paths: bool = True
    """Divide each path's loss by p (release); the paper does not."""

    @classmethod
    def paper(cls, **changes: Any) -> EnsembleInOne:
        """Return the paper's reading: distillation by DVERGE's rules, losses not divided by p."""
        return replace(cls(momentum=1.0, batch_norm="train", divide_by_paths=False), **changes)

    @classmethod
    def release(cls, **changes: Any) -> EnsembleInOne:
        """Return the released code's reading: random start, no momentum, running statistics, activated features."""
        return replace(cls(random_start=True, activated=True), **changes)

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        if not isinstance(model, RandomGatedNetwork):
            raise BadInput(
                f"ensemble_in_one trains a random gated network, got a plain {type(model).__name__}; "
                "set candidates=2 in the recipe, or train an ensemble with dverge"
            )
        super().check(model)

    def combined(self, distilled: Tensor, adversarial: Tensor | None, networks: int) -> Tensor:
        """See `DistilledObjective.combined`; the released code divides the adversarial term too."""
        loss = distilled if adversarial is None else distilled + adversarial
        return loss / networks if self.divide_by_paths else loss
