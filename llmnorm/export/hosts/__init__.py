"""The classes of transformers that a model may leave as or come from; `base.py` says what one is.

`HOSTS` has them in the order in which `auto` tries them: the most widely served first.
"""

from llmnorm.export.hosts.base import Host
from llmnorm.export.hosts.bitnet import BITNET
from llmnorm.export.hosts.gemma import GEMMA2, GEMMA3
from llmnorm.export.hosts.glm4 import GLM4
from llmnorm.export.hosts.gpt2 import GPT_2
from llmnorm.export.hosts.layernorm import GPT_NEOX, NEMOTRON, OLMO, STABLELM
from llmnorm.export.hosts.llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3
from llmnorm.export.hosts.minimax import MINIMAX
from llmnorm.export.hosts.olmo2 import EXAONE4, OLMO2
from llmnorm.export.hosts.parallel import COHERE, GPT_NEOX_PARALLEL, PHI, STABLELM_PARALLEL

_ORDER = (
    *(LLAMA, QWEN3, GLM4, OLMO2, EXAONE4, GEMMA2, GEMMA3, GPT_2),
    *(STABLELM, GPT_NEOX, NEMOTRON, COHERE, STABLELM_PARALLEL, GPT_NEOX_PARALLEL, PHI),
    *(QWEN2, MISTRAL, GRANITE),  # what they hold, Llama holds too
    *(OLMO, BITNET, MINIMAX),  # the last two are not known to be served natively
)
HOSTS: dict[str, Host] = {host.name: host for host in _ORDER}

__all__ = ["HOSTS", "Host"]
