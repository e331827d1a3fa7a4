"""Weights on disk: one safetensors file whose header says which network they belong to. Pickle is never read.

The tensors of a random gated network are stored under the template's names; those of gated layers have a leading
dimension of n candidates. So `conv1.weight` is (16, 3, 3, 3) in a plain ResNet-20 and (2, 16, 3, 3, 3) in a gated one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from zoo import networks
from zoo.data.datasets import source
from zoo.errors import BadInput, CheckpointError, check_count
from zoo.files import write_bytes_atomic
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork, Sharing, randomly_gate

FORMAT = "manygates-weights-1"
MAX_STACKED = 1024
"""Candidates of a layer, and members of an ensemble."""
MAX_BUILT_COPIES = 16
"""So many times the size of a file's tensors may be built while its network is made."""
MAX_OPTION = 65_536
"""Of a network's options, which are counts of layers and channels, and shares."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What has to be built before weights can be loaded."""

    network: str
    options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "cifar10"
    candidates: int = 1
    sharing: Sharing | None = None
    members: int = 1
    """Separate networks that are trained together, as an `Ensemble`."""

    def __post_init__(self) -> None:
        texts = isinstance(self.network, str) and isinstance(self.dataset, str) and isinstance(self.options, dict)
        if not texts or self.sharing not in (None, *get_args(Sharing)):
            raise BadInput(f"an architecture is described by names and options, got {self.described()}")
        if any(abs(number) > MAX_OPTION for number in _numbers(self.options)):
            raise BadInput(f"the options {self.options} hold a number above {MAX_OPTION}; expected layers or channels")
        for name in ("candidates", "members"):
            check_count(name, getattr(self, name), most=MAX_STACKED)

    @property
    def gated(self) -> bool:
        """Whether this is a random gated network rather than a plain one."""
        return self.sharing is not None

    @property
    def member(self) -> Architecture:
        """One plain network of this kind: what a path or a member is."""
        return replace(self, candidates=1, sharing=None, members=1)

    def described(self) -> dict[str, Any]:
        """Return the fields for a file's header, without `members` for a single network."""
        fields = asdict(self)
        if self.members == 1:
            del fields["members"]
        return fields

    def build(self) -> nn.Module:
        """Build the network, freshly initialised from torch's global generator."""
        if self.members > 1:
            return Ensemble(self.member.build() for _ in range(self.members))
        dataset = source(self.dataset)
        template = networks.build(self.network, images=dataset.format, classes=len(dataset.classes), **self.options)
        if self.sharing is None:
            return template
        return randomly_gate(template, candidates=self.candidates, sharing=self.sharing)


def _numbers(options: object) -> Iterator[float]:
    """Yield the numbers in a JSON document."""
    if isinstance(options, (list, tuple, dict)):
        for entry in options.values() if isinstance(options, dict) else options:
            yield from _numbers(entry)
    elif isinstance(options, (int, float)):
        yield options


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network under the template's names, candidates stacked; see the module's docstring."""
    if not isinstance(network, RandomGatedNetwork):
        return dict(network.state_dict())
    state = dict(network.template.state_dict())
    choices = [network.select([gate] * network.num_gates) for gate in range(network.candidates)]
    for name in choices[0]:
        state[name] = torch.stack([choice[name].detach() for choice in choices])
    return state


def load_network_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `network_state` returned into a network of the same architecture.

    Raises:
        CheckpointError: names or shapes differ; the message says which.
    """
    expected = network_state(network)
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} {_kind(state[name])} instead of {_kind(expected[name])}"
        for name in sorted(expected.keys() & state.keys())
        if _kind(state[name]) != _kind(expected[name])
    ]
    if missing or unknown or shapes:
        raise CheckpointError(
            "these weights belong to another network: "
            f"missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}, shapes {shapes[:3] or 'equal'} "
            f"({len(missing)}, {len(unknown)} and {len(shapes)} in all); check the network's name and options"
        )
    with torch.no_grad():
        if not isinstance(network, RandomGatedNetwork):
            network.load_state_dict(dict(state))
            return
        own = network.template.state_dict()
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for gate in range(network.candidates):
            for name, tensor in network.select([gate] * network.num_gates).items():
                tensor.copy_(state[name][gate])


def assembled(architecture: Architecture, state: Mapping[str, Tensor]) -> nn.Module:
    """Build a network and copy what `network_state` returned into it; in evaluation mode.

    The claims are compared with the tensors first, and building stops once it is far larger than they are. So a small
    file cannot fill the memory.

    Raises:
        CheckpointError: they belong to another network; the message says in which names or shapes.
    """
    claimed = "these weights belong to another network than their header claims"
    if architecture.gated and not any(tensor.shape[:1] == (architecture.candidates,) for tensor in state.values()):
        raise CheckpointError(f"{claimed}: no tensor is stacked over {architecture.candidates} candidates")
    if architecture.members > 1 and not any(name.startswith(f"members.{architecture.members - 1}.") for name in state):
        raise CheckpointError(f"{claimed}: there are no tensors of {architecture.members} members")
    try:
        with _no_larger_than(state, architecture.candidates):
            network = architecture.build()
    except _TooLargeError as error:
        raise CheckpointError(f"{claimed}: it is far larger than the {len(state)} tensors here") from error
    except BadInput as error:
        raise CheckpointError(f"{claimed}: {error}; export the bundle again") from error
    load_network_state(network, state)
    return network.eval()


class _TooLargeError(Exception):
    """A network has more parameters than there are."""


@contextmanager
def _no_larger_than(state: Mapping[str, Tensor], candidates: int) -> Iterator[None]:
    """Stop what this thread builds in the block where it gets larger than the tensors of a network.

    An option may ask for billions of layers or channels. A parameter is counted before it is initialised, while its
    memory is only reserved.
    """
    # a gated network is made of a template, of its candidates, and perhaps of copies to check them by
    numbers = sum(map(Tensor.numel, state.values()))
    left = {"parameters": MAX_BUILT_COPIES * len(state) * candidates, "numbers": MAX_BUILT_COPIES * numbers}
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            left["parameters"] -= 1
            left["numbers"] -= parameter.numel()
            if min(left.values()) < 0:
                raise _TooLargeError

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, in one rename; equal contents give equal bytes."""
    # copies, because the library refuses two names for one tensor, as a network with tied layers has
    contiguous = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = {"format": FORMAT, "header": json.dumps(header, sort_keys=True)}
    write_bytes_atomic(file, _in_order(safetensors.torch.save(contiguous, metadata)))


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in a random order.

    The file starts with the length of a JSON header (8 bytes, little-endian), padded with spaces to a multiple of 8.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, content[8 + size :]))


def load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        CheckpointError: not there, not a safetensors file (a pickle, say), truncated, or not one of ours.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file; expected weights as safetensors")
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); pickled weights (.pt, .pth, .bin) are refused because "
            "loading one can run code"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} says format {metadata.get('format')!r}, expected {FORMAT!r}; it was not written by manygates"
        )
    try:
        header = json.loads(metadata["header"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error}); fetch or export it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is no object; fetch or export it again")
    return tensors, header


def save_network(file: Path, network: nn.Module, architecture: Architecture) -> None:
    """Write a network's weights and architecture."""
    save(file, network_state(network), {"architecture": architecture.described()})


def load_network(file: Path) -> tuple[nn.Module, Architecture]:
    """Build the network that a file describes and load its weights; in evaluation mode.

    Raises:
        CheckpointError: see `load` and `load_network_state`.
    """
    tensors, header = load(file)
    architecture = read_architecture(header, file)
    return assembled(architecture, tensors), architecture


def read_architecture(header: Mapping[str, Any], file: Path) -> Architecture:
    """Return the architecture in the header of `file`.

    Raises:
        CheckpointError: it is missing or of a version that this one does not know.
    """
    try:
        return Architecture(**header["architecture"])
    except (KeyError, TypeError, BadInput) as error:
        raise CheckpointError(f"{file} does not say which network its weights belong to ({error})") from error
