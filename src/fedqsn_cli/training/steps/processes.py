"""Several processes that train one model, as `accelerate launch` and `torchrun` start them.

Each computes its share of every batch; gradients are summed, so that all take the same step. The first one reads the
data, prints and writes. The environment variables are torch.distributed's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from fedqsn_cli import errors
from fedqsn_cli.errors import FedqsnError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # the others wait while the first one evaluates or saves


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all: number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Is it the one that prints and writes?"""
        return self.rank == 0

    def share(self, rows: list[int]) -> list[int]:
        """The part of a batch that this process computes; neighbours, which have similar lengths, are dealt out."""
        return rows[self.rank :: self.count]

    def sums(self, *numbers: float) -> list[float]:
        """The sum over all processes of each number."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=_device())
        distributed.all_reduce(total)
        return [float(number) for number in total.tolist()]

    def sum_gradients(self, leaves: Sequence[Tensor]) -> None:
        """Replace the gradient of each leaf by its sum over all processes; None stays where no process has one."""
        if self.count == 1:
            return
        has = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8, device=_device())
        distributed.all_reduce(has, distributed.ReduceOp.MAX)
        pending = []
        for leaf, known in zip(leaves, has.tolist(), strict=True):
            if known:
                if leaf.grad is None:
                    leaf.grad = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
                pending.append(distributed.all_reduce(leaf.grad, async_op=True))
        for work in pending:
            work.wait()

    def every(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the same shape from every process, in their order, on the CPU."""
        if self.count == 1:
            return [tensor]
        sent = tensor.to(_device())
        received = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.all_gather(received, sent)
        return [one.cpu() for one in received]

    def in_first(self, work: Callable[[], T]) -> T | None:
        """Call a function in the first process; the others have None. An error that it raises is raised in all."""
        if self.count == 1:
            return work()
        result, failed = None, None
        if self.is_first:
            try:
                result = work()
            except FedqsnError as error:
                failed = error
        told = self.from_first(b"" if failed is None else json.dumps(failed.to_plain()).encode())
        if failed is not None or told:
            raise failed or errors.from_plain(json.loads(told))
        return result

    def from_first(self, data: bytes) -> bytes:
        """What the first process gives, in all of them."""
        if self.count == 1:
            return data
        length = torch.tensor([len(data)], device=_device())
        distributed.broadcast(length, 0)
        if not int(length):
            return b""
        sent = torch.empty(int(length), dtype=torch.uint8, device=_device())
        if self.is_first:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        distributed.broadcast(sent, 0)
        return sent.cpu().numpy().tobytes()


ALONE = Processes()


def launched() -> Processes:
    """This process as the environment describes it; nothing is set up."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return Processes(int(os.environ.get("RANK", "0")), count) if count > 1 else ALONE


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Within this block the processes know each other: over NCCL on GPUs, over gloo elsewhere."""
    processes = launched()
    if processes.count == 1:
        yield processes
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield processes
    finally:
        distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where several of a machine share the work."""
    if launched().count == 1 or str(device) != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _device() -> torch.device:
    """Where collective operations compute."""
    if str(distributed.get_backend()) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
