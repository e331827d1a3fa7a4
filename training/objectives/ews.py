"""Enhancing weak subnets (Guo, Stutz and Schiele, ECCV 2022, arXiv:2201.12765), around the loss of any one network.

    min_w  L(w) + lambda * sum over views v of weight_v * KL( f_w(v), detached || f_{w, a}(v) )

a is a subnet of the residual network f_w: some paths of each block and some of the channels inside it
(`training.objectives.subnets`). An LSTM proposes it, and is trained every few steps to propose subnets of low accuracy,
so that the weakest parts of the network are pulled up to the whole. The subnet normalises with the statistics of its
own batch and leaves the running ones alone.

The views are those of the loss within: the image (standard), each augmentation of it (AugMix), the adversarial example
(adversarial training), or both with their weights (TRADES), which gives the paper's

    [CE(x) + lambda KL_sub(x)] + beta [KL(x, x') + lambda KL_sub(x')]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.adversarial import Awp
from training.objectives.base import Batch, Needs, check_choice, check_positive, check_weights
from training.objectives.network import Network
from training.objectives.single import Loss, NetworkObjective, Standard, View, Wrapper, kl_divergence
from training.objectives.subnets import (
    PATHS,
    Choice,
    Rounding,
    Space,
    applied,
    kept_of,
    lowest_norm_choice,
    random_choice,
    space_of,
)
from zoo.errors import BadInput, CheckpointError
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork

LogProb = Literal["plackett_luce", "sum"]

HIDDEN = 100
INITIAL = 0.1
"""Weights start uniformly in +-0.1."""
BASELINE_DECAY = 0.99


@dataclass(frozen=True)
class Sample:
    """A proposed subnet, the logarithm of its probability and the entropy of the decisions that led to it (0-dim)."""

    choice: Choice
    log_prob: Tensor
    entropy: Tensor


def draw(scores: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw `number` indices without replacement, each in proportion to exp(score) among those left, in that order.

    The largest of scores plus Gumbel noise are such a draw (Yellott 1977), without a loop. `scores` are float (n,), on
    the CPU as the generator is, and `number` is 1 to n.
    """
    waiting = torch.empty_like(scores).exponential_(generator=generator)
    return (scores.detach() - waiting.log()).topk(number).indices


def plackett_luce(scores: Tensor, drawn: Tensor) -> Tensor:
    """Return the log-probability of drawing `drawn` (k,) in this order without replacement, given scores (n,).

    sum_j ( s_j - log sum over what is left before draw j of exp s )    Plackett 1975, Luce 1959
    """
    taken = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, drawn, True)
    rest = scores.masked_fill(taken, -torch.inf).logsumexp(0, keepdim=True) if len(drawn) < len(scores) else scores[:0]
    chosen = scores[drawn]
    # from the last draw back, each adds itself to what was left
    left = torch.cat([rest, chosen.flip(0)]).logcumsumexp(0)[len(rest) :]
    return chosen.sum() - left.sum()


class _Decision(nn.Module):
    """Which `number` of `count`: a head that scores them and an embedding of each."""

    def __init__(self, count: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.head = nn.Linear(HIDDEN, count)
        self.embedding = nn.Parameter(torch.empty(count, HIDDEN))


class Controller(nn.Module):
    """Proposes subnets of a space and learns from their accuracy.

    Initial weights come from `generator`, on the CPU; `learning_rate` and `betas` are of Adam, `clip` is the largest
    norm of the gradient. With "plackett_luce" the log-probability is exactly that of a draw without replacement and the
    entropy that of the first draw; "sum" adds up log softmax and -p log p of what was drawn, as the released code does.

    After ENAS: one cell walks over the blocks. At each decision (which path, which input channels of a convolution) a
    head of that decision's own turns the hidden state into scores, k of n are drawn without replacement with
    probabilities in proportion to exp(score), and the mean of their embeddings is the cell's next input. Where
    everything is kept (k = n), the cell takes no step. The policy gradient is REINFORCE with a moving baseline; the
    reward is minus the subnet's accuracy. All this lives on the CPU, whatever the network runs on.
    """

    def __init__(
        self,
        space: Space,
        generator: torch.Generator,
        *,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        entropy_weight: float = 0.005,
        clip: float = 3.0,
        log_prob: LogProb = "plackett_luce",
    ) -> None:
        check_choice("log_prob", log_prob, LogProb)
        super().__init__()
        self.space = space
        self.entropy_weight, self.clip, self.log_prob = entropy_weight, clip, log_prob
        self.cell = nn.LSTMCell(HIDDEN, HIDDEN)
        self.paths = nn.ModuleList(_Decision(PATHS, space.paths) for _ in (space.blocks if space.paths < PATHS else ()))
        self.channels = nn.ModuleList()
        for block, numbers in zip(space.blocks, space.channels, strict=True):
            pairs = enumerate(zip(block.channels, numbers, strict=True))
            some = {str(position): _Decision(*pair) for position, pair in pairs if pair[1] < pair[0]}
            self.channels.append(nn.ModuleDict(some))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-INITIAL, INITIAL, generator=generator)
        self.baseline = torch.zeros(())
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, betas=betas)

    def sample(self, generator: torch.Generator) -> Sample:
        """Propose a subnet, with a CPU generator; under `torch.no_grad` it cannot be learnt from."""
        walk = _Walk(self, generator)
        choice = []
        for position, block in enumerate(self.space.blocks):
            paths = walk.decide(self.paths[position]) if len(self.paths) else [0, 1]
            channels = [list(range(count)) for count in block.channels]
            if 0 in paths:
                for name, decision in self.channels[position].named_children():
                    channels[int(name)] = walk.decide(decision)
            choice.append(kept_of(block, paths, channels))
        return Sample(tuple(choice), walk.log_prob, walk.entropy)

    def update(self, sample: Sample, accuracy: float) -> float:
        """Learn from the accuracy, in [0, 1], of a subnet that was sampled with gradients.

        Returns:
            The reward, minus accuracy minus the baseline as it was.
        """
        reward = -accuracy - float(self.baseline)
        self.baseline.mul_(BASELINE_DECAY).add_((1 - BASELINE_DECAY) * -accuracy)
        if not sample.log_prob.requires_grad:  # everything is kept: nothing to decide
            return reward
        loss = -reward * sample.log_prob - self.entropy_weight * sample.entropy
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.optimizer.step()
        return reward

    def state(self) -> dict[str, Tensor]:
        """See `Stateful.state`: weights, the moments of Adam and the baseline, as copies."""
        state = {f"weights/{name}": parameter.detach().clone() for name, parameter in self.named_parameters()}
        for name, parameter in self.named_parameters():
            for kind, moment in self.optimizer.state[parameter].items():
                state[f"adam/{kind}/{name}"] = moment.clone()
        return {**state, "baseline": self.baseline.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Stateful.load`.

        Raises:
            CheckpointError: the state is that of a controller of other subnets.
        """
        weights = {key.removeprefix("weights/"): tensor for key, tensor in state.items() if key.startswith("weights/")}
        own = dict(self.named_parameters())
        shapes = [{name: tensor.shape for name, tensor in named.items()} for named in (own, weights)]
        if "baseline" not in state or shapes[0] != shapes[1]:
            raise CheckpointError(
                "the checkpoint's EWS controller chooses among other subnets than this recipe's; "
                "continue with the recipe, its keep and its paths that the run began with, or train again"
            )
        self.load_state_dict(weights)
        self.baseline.copy_(state["baseline"])
        self.optimizer.state.clear()
        for key, tensor in state.items():
            if key.startswith("adam/"):
                _, kind, name = key.split("/", 2)
                self.optimizer.state[own[name]][kind] = tensor.detach().clone().cpu()


class _Walk:
    """One pass of the cell over the blocks."""

    def __init__(self, controller: Controller, generator: torch.Generator) -> None:
        self.controller, self.generator = controller, generator
        self.input = torch.zeros(1, HIDDEN)
        self.hidden = torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)
        self.log_prob, self.entropy = torch.zeros(()), torch.zeros(())

    def decide(self, decision: nn.Module) -> list[int]:
        """Step once and draw."""
        assert isinstance(decision, _Decision)
        self.hidden = self.controller.cell(self.input, self.hidden)
        scores = decision.head(self.hidden[0]).squeeze(0)
        drawn = draw(scores, decision.number, self.generator)
        self.input = decision.embedding[drawn].mean(0, keepdim=True)
        if torch.is_grad_enabled():
            exact = self.controller.log_prob == "plackett_luce"
            log_probs = F.log_softmax(scores, 0) if exact else F.log_softmax(scores, 0)[drawn]
            self.log_prob = self.log_prob + (plackett_luce(scores, drawn) if exact else log_probs.sum())
            self.entropy = self.entropy - (log_probs.exp() * log_probs).sum()
        return drawn.tolist()


Search = Literal["controller", "random", "l1"]
Reduction = Literal["batchmean", "mean"]


@dataclass(frozen=True, kw_only=True)
class Ews(Wrapper):
    """The loss within, and the divergence of a weak subnet from the whole network."""

    method: ClassVar[str] = "ews"
    published: ClassVar[str] = "Guo et al., ECCV 2022"
    needs: ClassVar[Needs] = "residual blocks"

    inner: NetworkObjective = field(default_factory=Standard)
    search: Search = "controller"
    """How subnets are found: by the controller; uniformly at random; as those of the lowest L1 norms."""
    keep: float = 0.7
    """Share of the channels, and of the paths, that a subnet keeps: the paper's rho; 0.9 for adversarial training."""
    paths: Rounding = "ceil"
    """How many of a block's two paths that is: rounded up, which keeps both for every share above 1/2 (the released
    code), or to the nearest, which keeps one below 3/4 (the paper's figure 2)."""
    weight: float = 1.0
    """Of the divergence: the paper's lambda; 0.1 for adversarial training."""
    kl_reduction: Reduction = "batchmean"
    """Averages the divergence over images, or ("mean", the released script for CIFAR) over images and classes."""
    controller_every: int = 10
    """Steps from one update of the controller to the next."""
    controller_learning_rate: float = 3e-4
    controller_betas: tuple[float, float] = (0.5, 0.999)
    controller_clip: float = 3.0
    """Largest norm of the controller's gradient."""
    entropy_weight: float = 0.005
    """What the entropy of its decisions is worth to the controller; 0.01 for adversarial training."""
    log_prob: LogProb = "plackett_luce"
    """Exactly the probability of a draw without replacement, or the released code's sum of log softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(isinstance(inner, Ews) for inner in self.within):
            raise BadInput("ews cannot go around ews; once enhances the weak subnets already")
        if any(isinstance(inner, Awp) for inner in self.within):
            raise BadInput("ews cannot go around awp, whose perturbation is the whole network's; put awp around ews")
        for name, kind in (("search", Search), ("kl_reduction", Reduction), ("paths", Rounding), ("log_prob", LogProb)):
            check_choice(name, getattr(self, name), kind)
        if not 0 < self.keep <= 1:
            raise BadInput(f"need 0 < keep <= 1, got {self.keep}; it is the share that a subnet keeps")
        if self.controller_every < 1:
            raise BadInput(f"need controller_every >= 1, got {self.controller_every}")
        check_weights(weight=self.weight, entropy_weight=self.entropy_weight)
        check_positive(controller_learning_rate=self.controller_learning_rate, controller_clip=self.controller_clip)
        if len(self.controller_betas) != 2 or not all(0 <= beta < 1 for beta in self.controller_betas):
            raise BadInput(f"controller_betas must be two numbers, 0 <= beta < 1, got {self.controller_betas}")

    @classmethod
    def adversarial(cls, inner: NetworkObjective, **changes: Any) -> Ews:
        """Return it with the numbers that the paper uses around adversarial training."""
        return cls(**{"inner": inner, "keep": 0.9, "weight": 0.1, "entropy_weight": 0.01, **changes})

    @property
    def name(self) -> str:
        """The name of what is within, then "ews", and how subnets are searched for if not by the controller."""
        return super().name + ("" if self.search == "controller" else f"-{self.search}")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`: per view a pass of the subnet and its backward, and the controller's share."""
        rewards = 1 / self.controller_every if self.search == "controller" else 0.0
        return self.inner.forwards(networks, exits) + networks * self.passes * (3.0 + rewards)

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`; every member of an ensemble needs residual blocks."""
        super().check(model)
        members = model.members if isinstance(model, Ensemble) else [model]
        for member in members:
            space_of(member.template if isinstance(member, RandomGatedNetwork) else member, self.keep, self.paths)

    def loss(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; a forward pass of a subnet more, and now and then one for the controller."""
        loss = self.inner.loss(network, inputs, batch)
        space = space_of(network.module, self.keep, self.paths)
        if self.search == "controller" and network.step.number % self.controller_every == 0:
            self._teach(self._controller(network, space), network, loss.views, batch.labels)
        said = answers(network, self.choose(network, space), loss.views)
        value = loss.value
        for view, student in zip(loss.views, said, strict=True):
            value = value + self.weight * view.weight * self._divergence(view.logits.detach(), student)
        return Loss(value, loss.views)

    def choose(self, network: Network, space: Space) -> Choice:
        """Return the subnet of this step; the same on all ranks."""
        if self.search == "l1":
            return lowest_norm_choice(space, network.parameters)
        generator = _generator(network, "subnet")
        if self.search == "random":
            return random_choice(space, generator)
        with torch.no_grad():
            return self._controller(network, space).sample(generator).choice

    def _controller(self, network: Network, space: Space) -> Controller:
        """Return the controller of this network, kept from step to step."""
        return network.step.memory.part(
            f"ews/controller{network.index}",
            lambda: Controller(
                space,
                _generator(network, "controller"),
                learning_rate=self.controller_learning_rate,
                betas=self.controller_betas,
                entropy_weight=self.entropy_weight,
                clip=self.controller_clip,
                log_prob=self.log_prob,
            ),
        )

    def _teach(self, controller: Controller, network: Network, views: Sequence[View], labels: Tensor) -> None:
        """Sample a subnet, measure its accuracy on this batch (over all ranks) and learn from it.

        Views count as they do in the loss.
        """
        sample = controller.sample(_generator(network, "reward"))
        with torch.no_grad():
            said = answers(network, sample.choice, views)
            right = torch.stack([(logits.argmax(1) == labels).float().mean() for logits in said])
            shares = torch.tensor([view.weight for view in views], device=right.device)
            accuracy = network.step.average((right * shares).sum() / shares.sum())
        controller.update(sample, float(accuracy))

    def _divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        divergence = kl_divergence(teacher, student)
        return divergence if self.kl_reduction == "batchmean" else divergence / teacher.shape[1]


def answers(network: Network, choice: Choice, views: Sequence[View]) -> list[Tensor]:
    """Return what the subnet `choice` says of each view, logits (batch, class), on batch statistics.

    Views that went through the network in one batch, and so shared their statistics, do so again.
    """
    together: dict[int, list[int]] = {}
    for position, view in enumerate(views):
        # logits cut out of one forward pass share its memory
        together.setdefault(view.logits.untyped_storage().data_ptr(), []).append(position)
    said: dict[int, Tensor] = {}
    with network.statistics("train_frozen"), applied(network.module, choice):
        for positions in together.values():
            images = [views[position].images.detach() for position in positions]
            logits = network(torch.cat(images) if len(images) > 1 else images[0])
            said.update(zip(positions, torch.split(logits, [len(part) for part in images]), strict=True))
    return [said[position] for position in range(len(views))]


def _generator(network: Network, purpose: str) -> torch.Generator:
    """Return a CPU generator that is the same on all ranks."""
    seed = network.step.rng("ews", purpose, network.index).getrandbits(63)
    return torch.Generator().manual_seed(seed)
