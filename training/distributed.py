"""Data parallelism under `torchrun`: every rank runs the same gates on its share of the batch.

Gates follow from (seed, step), so they agree without communication, and the parameters that a step leaves without a
gradient are the same on every rank. Gradients and BatchNorm statistics are averaged in one message per step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from zoo.errors import BadInput


@dataclass(frozen=True)
class World:
    """The processes of a run and which of them this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: str) -> World:
        """Join the process group that `torchrun` describes in the environment; a world of one without it.

        On "cuda" each process takes the CUDA device of its local rank.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if on_gpu else "gloo")
        return cls(distributed.get_rank(), size, local_rank)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Return this rank's part of a batch.

        Raises:
            BadInput: the batch cannot be shared evenly.
        """
        if batch_size % self.size:
            shared = f"shared evenly by {self.size} processes"
            raise BadInput(f"batch_size {batch_size} cannot be {shared}; choose a multiple")
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def average(self, model: nn.Module) -> None:
        """Average the gradients that this step produced, and the floating-point buffers, over all ranks."""
        if self.size == 1:
            return
        with torch.no_grad():
            tensors: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
            tensors += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
            distributed.all_reduce(flat)
            flat /= self.size
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over all ranks."""
        if self.size == 1:
            return value
        total = value.detach().float().clone()
        distributed.all_reduce(total)
        return total / self.size

    def agreed(self, value: float) -> float:
        """Return the leading rank's value."""
        if self.size == 1:
            return value
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(shared, src=0)
        return float(shared)

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
