"""The classes of transformers that a model may leave as or come from; `base.py` says what one is.

`HOSTS` has them in the order in which `auto` tries them: the most widely served first.
"""

from llmnorm.export.hosts.base import Host
from llmnorm.export.hosts.llama import LLAMA, QWEN3

HOSTS: dict[str, Host] = {host.name: host for host in (LLAMA, QWEN3)}

__all__ = ["HOSTS", "Host"]
