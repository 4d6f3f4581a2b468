"""`RankGroup`: the ranks of a process group, and exchanges between them that end within a bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from ..errors import ArgumentError, ArgumentTypeError, DisagreementError
from ..raised import error_text
from ..table import ranges

_LONGEST = 1e6
"""Seconds of a wait: longer ones overflow in PyTorch."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a process group, as one of them has it.

    Attributes:
        group: The process group.
        ranks: The ranks in it, by their numbers in the job.
        me: The number of this rank.
        device: The device of the tensors that are exchanged.
        timeout: Seconds that each exchange may take.
    """

    group: Any
    ranks: tuple[int, ...]
    me: int
    device: torch.device
    timeout: float

    @classmethod
    def of(cls, group: Any, device: torch.device | None, timeout: float) -> RankGroup:
        """Check a group that a caller has given.

        Args:
            group: A process group, a device mesh of one dimension, or None for all ranks of the job.
            device: The device of the model, for a group that exchanges tensors of that type only, such as NCCL's.
            timeout: Seconds that each exchange may take.

        Raises:
            ArgumentError: If there is no such group, or this rank is not in it.
            ArgumentTypeError: If it is no group, or the time is no number.
        """
        if isinstance(timeout, bool) or not isinstance(timeout, int | float):
            raise ArgumentTypeError(f"timeout is a number of seconds, not {timeout!r}.")
        if not 0 < timeout <= _LONGEST:  # nan is not, either
            raise ArgumentError(f"timeout is a positive number of seconds, at most {_LONGEST:.0f}, not {timeout!r}.")
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "Ranks can only agree in a process group, and there is none: call "
                "torch.distributed.init_process_group(...) before, on every rank."
            )
        from torch.distributed.device_mesh import DeviceMesh  # takes a moment, and not every PyTorch has it

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ArgumentError(
                    f"A device mesh of {group.ndim} dimensions has several groups of ranks: name the one whose ranks "
                    "hold the same layers, as with mesh['tp']."
                )
            outside = group.get_coordinate() is None
            group = dist.GroupMember.NON_GROUP_MEMBER if outside else group.get_group()
        group = dist.group.WORLD if group is None else group
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ArgumentError(
                f"Rank {dist.get_rank()} is not in this process group, and has no part in its decisions: call this "
                "only on the ranks that torch.distributed.new_group(...) was given."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentTypeError(f"group is a process group, a device mesh or None, not {group!r}.")
        try:
            ranks, config = dist.get_process_group_ranks(group), dist.get_backend_config(group)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ArgumentError("The process group was destroyed: make a new one, on every rank.") from error
        kinds = [part.partition(":")[0] for part in config.split(",")]
        where = torch.device("cpu" if "cpu" in kinds else kinds[0])
        if device is not None and device.type == where.type:
            where = device
        return cls(group, tuple(ranks), dist.get_rank(), where, float(timeout))

    def name(self, numbers: Iterable[int]) -> str:
        """Name ranks by their places in the group: `"rank 3"`, `"ranks 0-2,4"`."""
        numbers = [self.ranks[number] for number in numbers]
        return f"rank{'s' * (len(numbers) > 1)} {ranges(map(str, numbers))}"

    def gather(self, content: bytes) -> list[bytes]:
        """Return the contents of all ranks, which have equal lengths: one collective."""
        if len(self.ranks) == 1:
            return [content]
        mine = self._tensor(content)
        found = [torch.empty_like(mine) for _ in self.ranks]
        self._wait(lambda: dist.all_gather(found, mine, group=self.group, async_op=True))
        return list(map(_bytes, found))

    def send(self, content: bytes, source: int) -> bytes:
        """Return the content of one rank, by its place in the group, on all of them: two collectives."""
        size = self._tensor(len(content).to_bytes(8, "big"))
        self._broadcast(size, source)
        whole = self._tensor(content)
        if self.ranks[source] != self.me:
            whole = self._tensor(bytes(int.from_bytes(_bytes(size), "big")))
        self._broadcast(whole, source)
        return _bytes(whole)

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        self._wait(lambda: dist.broadcast(tensor, self.ranks[source], group=self.group, async_op=True))

    def _tensor(self, content: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)

    def _wait(self, start: Any) -> None:
        """Start an exchange, and wait for it: a rank that is late, has died, or does something else is an error."""
        try:
            # NCCL waits on the device by itself; with a time, it waits here, and raises rather than end the process.
            start().wait(timedelta(seconds=self.timeout))
        except (RuntimeError, ValueError) as error:
            raise DisagreementError(
                f"Rank {self.me} could not compare its decisions with {self.name(range(len(self.ranks)))} of its "
                f"process group within {self.timeout:g} seconds: {error_text(error)}. Another rank has died, is late, "
                "or does not call agree(...) or kernelize(..., group=...) here, as all ranks of the group must. Look "
                "at the logs. The group cannot be used any more: start the ranks again, or raise timeout=."
            ) from error


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())
