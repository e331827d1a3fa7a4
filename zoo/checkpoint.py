"""Weights on disk: one safetensors file whose header says what network they belong to. Pickle is never read.

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
from torch.overrides import TorchFunctionMode

from zoo import networks
from zoo.data import source
from zoo.derive import Ensemble
from zoo.errors import BadInput, CheckpointError
from zoo.files import write_bytes_atomic
from zoo.rgn import RandomGatedNetwork, Sharing, randomly_gate

FORMAT = "manygates-weights-1"
MOST = 1024
"""Candidates of a layer, and members of an ensemble."""
MOST_OPTION = 65_536
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
        if any(abs(number) > MOST_OPTION for number in _numbers(self.options)):
            raise BadInput(f"the options {self.options} hold a number above {MOST_OPTION}; expected layers or channels")
        for name in ("candidates", "members"):
            number = getattr(self, name)
            if type(number) is not int or not 1 <= number <= MOST:
                raise BadInput(f"{name} is {number!r}, expected a whole number from 1 to {MOST}")

    @property
    def gated(self) -> bool:
        """Whether this is a random gated network rather than a plain one."""
        return self.sharing is not None

    @property
    def member(self) -> Architecture:
        """One plain network of this kind: what a path or a member is."""
        return replace(self, candidates=1, sharing=None, members=1)

    def described(self) -> dict[str, Any]:
        """Return the fields for a file's header; a single network does not speak of members."""
        fields = asdict(self)
        if self.members == 1:
            del fields["members"]
        return fields

    def build(self) -> nn.Module:
        """Build the network, freshly initialised from torch's global generator."""
        if self.members > 1:
            return Ensemble(self.member.build() for _ in range(self.members))
        if self.sharing is None:
            return self._template()
        return randomly_gate(self._template(), candidates=self.candidates, sharing=self.sharing)

    def outline(self) -> dict[str, Tensor]:
        """Return what `network_state` returns of such a network, without values: it takes no memory."""
        with torch.device("meta"), _Valueless():
            if self.members > 1:
                return network_state(Ensemble(self.member._template() for _ in range(self.members)))
            if self.sharing is None:
                return network_state(self._template())
            gated = RandomGatedNetwork(self._template(), candidates=self.candidates, sharing=self.sharing)
            return network_state(gated)

    def _template(self) -> nn.Module:
        dataset = source(self.dataset)
        return networks.build(self.network, images=dataset.format, classes=len(dataset.classes), **self.options)


def _numbers(options: object) -> Iterator[float]:
    """Yield the numbers in a JSON document."""
    if isinstance(options, (list, tuple, dict)):
        for entry in options.values() if isinstance(options, dict) else options:
            yield from _numbers(entry)
    elif isinstance(options, (int, float)):
        yield options


class _Valueless(TorchFunctionMode):
    """Does without values what torch would import its compiler for, for seconds: initialising and stacking."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass on everything else."""
        kwargs = kwargs or {}
        if func is torch.stack:
            return args[0][0].new_empty((len(args[0]), *args[0][0].shape))
        if func is Tensor.normal_ or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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
    _check_state(network_state(network), state)
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

    Nothing is built unless the tensors are those of the architecture, so that a file makes nothing larger than itself.

    Raises:
        CheckpointError: they are not; the message says in which names or shapes.
    """
    check_fits(architecture, state)
    network = architecture.build()
    load_network_state(network, state)
    return network.eval()


def check_fits(architecture: Architecture, state: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of tensors with those of an architecture, without memory for any of its own.

    Raises:
        CheckpointError: they differ; the message says in what.
    """
    claimed = "these weights belong to another network than their header claims"
    if architecture.gated and not any(tensor.shape[:1] == (architecture.candidates,) for tensor in state.values()):
        raise CheckpointError(f"{claimed}: no tensor is stacked over {architecture.candidates} candidates")
    most = len(state) * architecture.candidates
    try:
        with _at_most_parameters(2 * most):  # twice: a template, and the candidates made of it
            expected = architecture.outline()
    except _TooManyError as error:
        raise CheckpointError(f"{claimed}: it has far more parameters than the {len(state)} tensors here") from error
    except BadInput as error:
        raise CheckpointError(f"{claimed}: {error}; export the bundle again") from error
    _check_state(expected, state)


class _TooManyError(Exception):
    """A network has more parameters than it should."""


@contextmanager
def _at_most_parameters(most: int) -> Iterator[None]:
    """Stop whatever this thread builds in the block at so many parameters: an option may ask for billions of layers."""
    thread, seen = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal seen
        if threading.get_ident() == thread:
            seen += 1
            if seen > most:
                raise _TooManyError

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
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


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, in one rename; equal contents give equal bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
