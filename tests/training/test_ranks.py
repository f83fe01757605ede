"""How ranks find each other."""

import pytest
from torch.distributed import TCPStore

from llmnorm.errors import EnvironmentProblem
from llmnorm.training.ranks import meet


@pytest.mark.parametrize(
    ("restarts", "said"), [("0", "two processes say RANK=1"), ("1", "set max_restarts to 0")]
)
def test_a_rank_that_comes_twice_is_told_why(
    restarts: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.port), "WORLD_SIZE": "2"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": restarts}
    for variable, value in (place | {"RANK": "1"}).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentProblem, match="rank 1 lost the others"):
        meet("run", -5.0)
    with pytest.raises(EnvironmentProblem, match=said):
        meet("run", -5.0)
