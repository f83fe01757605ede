"""llmnorm: train decoder-only LLMs with the normalization scheme as a first-class choice.

Importing it registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llmnorm.build import build_config, build_model, cite
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM, LlmNormModel
from llmnorm.modeling.operations import list_norms, register_norm
from llmnorm.placements import list_placements, register
from llmnorm.selftest import self_test

__version__ = "0.1.0"

__all__ = [
    "LlmNormConfig",
    "LlmNormForCausalLM",
    "LlmNormModel",
    "build_config",
    "build_model",
    "cite",
    "list_norms",
    "list_placements",
    "register",
    "register_norm",
    "self_test",
]

AutoConfig.register("llmnorm", LlmNormConfig, exist_ok=True)
AutoModel.register(LlmNormConfig, LlmNormModel, exist_ok=True)
AutoModelForCausalLM.register(LlmNormConfig, LlmNormForCausalLM, exist_ok=True)
