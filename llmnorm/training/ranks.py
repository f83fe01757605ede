"""What the ranks of a run tell each other: small sums, small JSON, and who speaks.

Everything here works without a process group too (one process). No pickle crosses a process
border: values travel as numbers or as JSON in byte tensors.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llmnorm.errors import LlmNormError


class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        rank: number of this process.
        world: number of processes.
        device: where collectives' tensors live (the GPU under NCCL).
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank = rank
        self.world = world
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Return each value summed over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor averaged over all ranks, each of which gives one of this shape."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's JSON `value` on every rank."""
        if self.world == 1:
            return value
        payload = json.dumps(value).encode() if self.is_main else b""
        (size,) = self.sums(len(payload))
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_main:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        data = data.to(self.device)
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.cpu().tolist()))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON `value`, in rank order."""
        if self.world == 1:
            return [value]
        payload = json.dumps(value).encode()
        sizes = self.sums(*(len(payload) * (rank == self.rank) for rank in range(self.world)))
        padded = bytearray(payload.ljust(int(max(sizes))))
        data = torch.frombuffer(padded, dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(data) for _ in range(self.world)]
        dist.all_gather(parts, data)
        return [json.loads(bytes(part.cpu().tolist())) for part in parts]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and return its JSON result on every rank.

        Raises:
            LlmNormError: on rank 0, what `work` raised.
            SystemExit: on the other ranks, silently with the same code, so that the user reads
                one line.
        """
        answer: dict[str, Any] = {}
        failure: Exception | None = None
        if self.is_main:
            try:
                answer = {"value": work()}
            except Exception as error:
                failure = error
                answer = {"code": error.exit_code if isinstance(error, LlmNormError) else 1}
        answer = self.broadcast(answer)
        if failure is not None:
            raise failure
        if "code" in answer:
            raise SystemExit(answer["code"])
        return answer["value"]
