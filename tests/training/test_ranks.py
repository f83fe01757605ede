"""How ranks find each other."""

import os

import pytest
from torch.distributed import TCPStore

from llmnorm.training.ranks import meet


def test_ranks_that_the_launcher_starts_again_meet_again(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.port), "WORLD_SIZE": "2"}
    for variable, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(variable, value)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        child = os.fork()
        monkeypatch.setenv("RANK", "0" if child else "1")
        if child == 0:
            try:
                meet("run", 10.0)
                os._exit(0)
            finally:
                os._exit(1)
        assert meet("run", 10.0) is not None
        assert os.waitpid(child, 0)[1] == 0
