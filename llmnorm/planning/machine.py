"""The machine here: the device a rank would get, its memory, and room on the disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from llmnorm.environment import device_name

RESERVE = {"cpu": 2**29, "cuda": 2**30}
"""Kept free for each rank: the interpreter and libraries; a GPU's context and workspaces."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is.

    Args:
        device: that of rank 0.
        name: the device's name.
        memory: bytes of one device; on a CPU the RAM that all ranks share.
        ram: bytes of RAM that this process may use.
        devices: how many there are.
    """

    device: torch.device
    name: str
    memory: int
    ram: int
    devices: int

    def room(self, ranks: int) -> int:
        """Return the bytes that each of `ranks` ranks may fill."""
        shared = ranks if self.device.type == "cpu" else 1
        return self.memory // shared - RESERVE[self.device.type]


def this_machine() -> Machine:
    """Look at the machine here."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    memory = ram = usable_ram()
    if cuda:
        memory = torch.cuda.get_device_properties(device).total_memory
    return Machine(
        device=device,
        name=device_name(device),
        memory=memory,
        ram=ram,
        devices=torch.cuda.device_count() if cuda else 1,
    )


def usable_ram() -> int:
    """Return the bytes of RAM, or of a container's limit where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.isfile(limit):
            text = Path(limit).read_text(encoding="utf-8").strip()
            if text.isdigit():
                memory = min(memory, int(text))
    return memory


def free_disk(path: Path) -> int:
    """Return the bytes free where a folder is, or would be made."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
