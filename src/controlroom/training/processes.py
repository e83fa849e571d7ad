"""The processes of one run: torchrun, `accelerate launch` or MPI start them, accelerate joins them into a group.

Every process holds the same weights and shows its share of the slots of a step; gradients are averaged, so all take the
same optimizer step. What one alone may do (write, export, validate) the main process does while the others wait; what
one alone notices (a signal, the time box, a loss that is not finite) all agree on before any acts on it.

Gradients are averaged here and not by DistributedDataParallel, because a recipe calls its modules as it likes and DDP
counts on one call through its wrapper. Started without a launcher there is one process, and nothing of this is loaded.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from controlroom.core.errors import ControlRoomError

Made = TypeVar("Made")

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PATIENCE = timedelta(hours=6)  # the others wait while the main process validates, draws or exports
_BUCKET = 1 << 23  # numbers averaged in one message: 32 MB


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of its run. `Processes()` is a run of one, for which every method is free."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def joined(cls, device: str) -> Processes:
        """The group that a launcher started this process for, or a run of one. `device` is that of the settings."""
        if all(int(os.environ.get(name, 1)) <= 1 for name in _COUNTS):
            return cls()
        from accelerate import PartialState

        cpu = torch.device(device).type == "cpu"
        ours = not torch.distributed.is_initialized()
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        if ours and torch.distributed.is_initialized():
            atexit.register(_leave)
        own = torch.device("cpu") if cpu else torch.device(device.split(":")[0], state.local_process_index)
        return cls(state.process_index, state.num_processes, state.local_process_index, own)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """The device that this process trains on: a card each, whichever number the settings name."""
        return name if self.world == 1 else str(self.device)

    # -- one does, all know -------------------------------------------------------------------------------------------

    def by_main(self, work: Callable[[], Made]) -> Made:
        """What `work` gives in the main process, in all of them; an error of ours is raised in all of them."""
        if self.world == 1:
            return work()
        outcome: list[Made | ControlRoomError | None] = [None]
        if self.main:
            try:
                outcome = [work()]
            except ControlRoomError as error:
                outcome = [error]
        torch.distributed.broadcast_object_list(outcome, src=0, device=self.device)
        if isinstance(outcome[0], ControlRoomError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def table(self, row: Sequence[float]) -> list[list[float]]:
        """The rows of all processes, in order of rank; every process gives as many numbers."""
        if self.world == 1:
            return [list(row)]
        own = torch.tensor(row, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(rows, own)
        return [other.tolist() for other in rows]

    def all_say(self, text: str) -> list[str]:
        """A word of each process, in order of rank."""
        if self.world == 1:
            return [text]
        words: list[str] = [""] * self.world
        torch.distributed.all_gather_object(words, text)
        return words

    # -- tensors ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow_main(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of every process the values of the main process's."""
        if self.world > 1:
            for tensor in tensors:
                held = tensor.data if tensor.is_contiguous() else tensor.data.contiguous()
                torch.distributed.broadcast(held, src=0)
                if held.data_ptr() != tensor.data_ptr():
                    tensor.data.copy_(held)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the mean over the processes; one that no process has stays None."""
        if self.world == 1:
            return
        held = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
        moving = [p for p, some in zip(parameters, held.tolist(), strict=True) if some]
        for bucket in _buckets(moving):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= self.world
            pieces = flat.split([p.numel() for p in bucket])
            for parameter, gradient, piece in zip(bucket, gradients, pieces, strict=True):
                parameter.grad = gradient.copy_(piece.view_as(parameter))


def _leave() -> None:
    """Take the group down while the interpreter still stands: gloo's threads, left running, abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, together as many as one message takes."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
