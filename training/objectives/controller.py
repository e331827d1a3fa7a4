"""The controller of EWS: an LSTM that proposes subnets and learns which are weak (Guo et al. 2022; after ENAS).

One cell walks over the blocks. At each decision (which path, which input channels of a convolution) a head of that
decision's own turns the hidden state into scores, k of n are drawn without replacement with probabilities in proportion
to exp(score), and the mean of their embeddings is the cell's next input. Where everything is kept (k = n), the cell
takes no step. The policy gradient is REINFORCE with a moving baseline; the reward is minus the subnet's accuracy.

The controller is small and sequential and lives on the CPU whatever the network runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import check_choice
from training.objectives.subnets import PATHS, Choice, Space, kept_of
from zoo.errors import CheckpointError

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
            paths = walk.decide(cast(_Decision, self.paths[position])) if len(self.paths) else [0, 1]
            decisions = cast(nn.ModuleDict, self.channels[position])
            channels = [list(range(count)) for count in block.channels]
            if 0 in paths:
                for name, decision in decisions.items():
                    channels[int(name)] = walk.decide(cast(_Decision, decision))
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

    def decide(self, decision: _Decision) -> list[int]:
        """Step once and draw."""
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
