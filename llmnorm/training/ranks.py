"""What the ranks of a run tell each other: small sums, small JSON, and who speaks.

Everything here works without a process group too (one process). No pickle crosses a process
border: values travel as numbers or as JSON in byte tensors.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, Store, TCPStore

from llmnorm.errors import EnvironmentProblem, LlmNormError


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


def launched(name: str, default: int) -> int:
    """Return a number that the launcher put into the environment.

    Raises:
        EnvironmentProblem: if it is none.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) > 65_535:
        raise EnvironmentProblem(f"the launcher says {name}={text!r}; expected a number; mend it")
    return int(text)


def meet(run: str, seconds: float | None) -> Store | None:
    """Wait until every process that the launcher speaks of is here, or say which is not.

    The engine's process group forms at the same address and would wait for hours.

    Args:
        run: names the run, so that one that uses the same port by mistake is not met.
        seconds: how long to wait for the others; None is 20 on one machine and 300 on several,
            whose processes do not start together.

    Returns:
        The store, to be held while the process group forms (rank 0 serves it); None for a run of
        one process.

    Raises:
        EnvironmentProblem: if some rank does not come, comes twice, or the port is taken.
    """
    world, rank = launched("WORLD_SIZE", 1), launched("RANK", 0)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        launched(name, 0)
    if world == 1:
        return None
    if not 0 <= rank < world:
        raise EnvironmentProblem(f"the launcher says RANK={rank} of WORLD_SIZE={world}; mend it")
    if seconds is None:
        several = launched("LOCAL_WORLD_SIZE", world) < world
        seconds = 300.0 if several else 20.0
    end = time.monotonic() + seconds
    store, place = _store(rank, end)
    key = f"llmnorm/{run}"
    if store.add(f"{key}/{rank}", 1) > 1:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torch would meet the dead
            raise EnvironmentProblem(
                f"the launcher started ranks again at {place}, where they would meet those of "
                "before; set max_restarts to 0 and start the run again"
            )
        raise EnvironmentProblem(f"two processes say RANK={rank} at {place}; mend the launcher")
    try:
        if rank:
            _wait_for_first(store, key, end)
        elif missing := _missing(store, key, world, end):
            raise EnvironmentProblem(
                f"of {world} ranks, {', '.join(map(str, missing[:20]))} did not come to "
                f"{place} in {seconds:.0f} s; start all, or raise faults.meet_seconds"
            )
    except DistNetworkError as error:
        seen = str(error).partition("\n")[0][:120]
        raise EnvironmentProblem(f"rank {rank} lost the others at {place}: {seen}") from error
    return store


def _missing(store: Store, key: str, world: int, end: float) -> list[int]:
    """Wait for all (rank 0) and tell them; return who did not come."""
    missing = list(range(world))
    while missing := [rank for rank in missing if not store.check([f"{key}/{rank}"])]:
        if time.monotonic() > end:
            store.set(f"{key}/all", "missing")
            time.sleep(0.5)  # for the others to see it
            return missing
        time.sleep(0.05)
    store.set(f"{key}/all", "here")
    return []


def _wait_for_first(store: Store, key: str, end: float) -> None:
    """Wait until rank 0 says that all are here.

    Raises:
        DistNetworkError: if it does not come.
        SystemExit: if some rank did not, which rank 0 has said.
    """
    while not store.check([f"{key}/all"]):
        if time.monotonic() > end + 5:
            raise DistNetworkError("rank 0 of this run does not come")
        time.sleep(0.05)
    if store.get(f"{key}/all") != b"here":
        raise SystemExit(EnvironmentProblem.exit_code)


def _store(rank: int, end: float) -> tuple[Store, str]:
    """Serve the store (rank 0, unless the launcher does) or reach it; return it and its address."""
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    place, serves = f"{host}:{port}", rank == 0 and not _agent_serves()
    try:
        if serves:
            socket.create_server(("", port)).close()  # torch says the same in fifty lines
        else:
            _reach(host, port, end)
        left = timedelta(seconds=max(1.0, end - time.monotonic()))
        store = TCPStore(
            *(host, port, None, serves, left), wait_for_workers=False, multi_tenant=serves
        )
    except (OSError, DistNetworkError, ValueError) as error:
        seen = str(error).partition("\n")[0][:120]
        raise EnvironmentProblem(
            f"rank {rank} cannot {'listen' if serves else 'meet the others'} at {place}: {seen}; "
            "choose a free MASTER_PORT on rank 0's machine, the same for all"
        ) from error
    return store, place


def _reach(host: str, port: int, end: float) -> None:
    """Wait until somebody listens."""
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _agent_serves() -> bool:
    """Whether torchrun (or accelerate launch) holds the store itself."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
