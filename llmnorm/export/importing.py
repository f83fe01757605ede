"""Turn a stock model of transformers into an llmnorm model, and prove that it computes the same.

It gets the name of its scheme, so that evaluation, conversion and training work on it.
Takes 16 to 24 bytes of memory a parameter, since the proof is in float64.
"""

# Which classes can come in, and as what scheme, `scheme` and `read` say (`hosts/base.py`).

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmnorm.build import build_config
from llmnorm.errors import ConfigError, ParityError
from llmnorm.evaluation.loading import Loaded, find, load
from llmnorm.evaluation.screening import screen_config
from llmnorm.export.certificate import certify
from llmnorm.export.form import Tensors, filled
from llmnorm.export.hosts import HOSTS, Host
from llmnorm.export.making import making, write_model
from llmnorm.export.real_text import real_text
from llmnorm.export.writing import DTYPES
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import read_choice

_SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "attention_dropout", "tie_word_embeddings"),
)
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SEQ, _BATCH = 128, 2  # of the text that the two models are compared on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm import`."""
    parser.add_argument(
        "model", metavar="HF_MODEL_OR_FOLDER", help="folder or hub name of a causal language model"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights; auto: as saved",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code found in the folder, such as a tokenizer's",
    )
    parser.epilog = f"classes that can come in: {_known()}"


def run(args: argparse.Namespace) -> int:
    """Import, and say what came in, how it was proved, and what to do next."""
    lines = import_model(
        args.model, args.out, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    lines += [
        f"wrote {args.out}",
        f"next: llmnorm eval perplexity --model {args.out} --data TEXT, or train it on with"
        f" llmnorm train RUN.yaml --model.start {args.out}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def import_model(
    location: str, out: Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> list[str]:
    """Write a folder of ours that computes what a stock model does.

    Args:
        location: folder or hub name of the model.
        out: the folder, which must not exist.
        dtype: a name of `writing.DTYPES`; `auto` keeps the model's.
        trust_remote_code: whether code in the folder may run.

    Returns:
        What came in and how it was proved, in lines for a person.

    Raises:
        ConfigError: no such model, or a class or setting that llmnorm does not have.
        CheckpointError: weights that cannot be read.
        EnvironmentProblem: `out` cannot be written.
        ParityError: what came in computes something else; nothing is written.
    """
    folder, config = _open_config(location, trust_remote_code)
    host = host_of(config, location)  # before the weights are read
    was_in: Any = config.dtype if config.dtype in DTYPES.values() else torch.float32
    saved_in = DTYPES.get(dtype, was_in)
    with making(out) as hidden:
        stock = load(location, dtype="fp64", trust_remote_code=trust_remote_code)
        model, notes = translate(stock.model, host, location)
        notes += _settle_generation(stock.model)
        write_model(hidden, model, stock, saved_in)
        ids, where = sample(stock, model.config)
        del stock
        parity = certify(
            folder,
            model,
            None,
            was_in,
            ids,
            trust_remote_code=trust_remote_code,
            text_source=where,
            write_to=hidden,
        )
        if not parity["passed"]:
            raise ParityError(
                f"{location}: what came in computes something else than the"
                f" {host.architecture}, so nothing is written: {'; '.join(parity['failures'])}"
            )
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = str(saved_in).removeprefix("torch.")
    came = f"{host.architecture} is {describe(model.config)}: {count:,} parameters in {kind}"
    return [came, *notes, *parity["summary"]]


def host_of(config: PreTrainedConfig, location: str) -> Host:
    """The host that reads models of this config.

    Raises:
        ConfigError: for a class or a setting that llmnorm does not have.
    """
    if isinstance(config, LlmNormConfig):
        raise ConfigError(f"{location} is a model of llmnorm already; it needs no import")
    hosts = [host for host in _readable() if host.config_class.model_type == config.model_type]
    if not hosts:
        kind = (config.architectures or [f"model of type {config.model_type}"])[0]
        raise ConfigError(f"{location} is a {kind}; classes that can come in: {_known()}")
    refusals = []
    for host in hosts:  # StableLM and GPT-NeoX are two each: in sequence, and in parallel
        try:
            host.scheme(config)
        except ValueError as error:
            refusals.append(str(error))
        else:
            return host
    raise ConfigError(
        f"{location} is a {hosts[0].architecture} that cannot come in: {'; or '.join(refusals)}"
    )


def translate(
    stock: PreTrainedModel, host: Host, name: str = "the model"
) -> tuple[LlmNormForCausalLM, list[str]]:
    """Our float64 model of a stock one, in eval mode, and what a user should know of it.

    Raises:
        ConfigError: for a setting that llmnorm does not have.
    """
    if type(stock).__name__ != host.architecture:
        raise ConfigError(
            f"{name} is a {type(stock).__name__}, its own code; only transformers' own"
            f" {host.architecture} can come in"
        )
    config = stock.config
    tensors = host.read(stock)
    ids, notes = _token_ids(config)
    ours = build_config({**_fields(config), **ids, **_biases(tensors)}, **host.scheme(config))
    return filled(ours, tensors), notes


def sample(loaded: Loaded, config: LlmNormConfig) -> tuple[torch.Tensor, str]:
    """The tokens on which models are compared, (batch, seq), and where they are from."""
    length = min(_SEQ, config.max_position_embeddings)
    return real_text(loaded.tokenizer, config.vocab_size, length, _BATCH)


def describe(config: LlmNormConfig) -> str:
    """The scheme in a few words: placement + norm, and what differs from a plain Llama."""
    if config.placement is None:
        return "a hand-made wiring"
    placement = read_choice("placement", config.placement, "name")["name"]
    words = [f"{placement} + {read_choice('norm', config.norm, 'op')['op']}"]
    layout = read_choice("qk_norm", config.qk_norm, "layout").get("layout", "none")
    words += [f"qk_norm {layout}"] if layout != "none" else []
    treatment = config.embedding_spec().treatment
    words += [f"embedding {treatment}"] if treatment != "raw" else []
    words += [f"position {config.position}"] if config.position != "rope" else []
    words += [f"{config.mlp} mlp"] if config.mlp != "gated" else []
    words += ["tied head"] if config.tie_word_embeddings else []
    return ", ".join(words)


def _open_config(location: str, trust_remote_code: bool) -> tuple[Path, PreTrainedConfig]:
    """The folder and the config of a model, looked at before it is trusted."""
    location = find(location).location
    try:
        folder = screen_config(location)
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:  # a setting of the wrong kind
        reason = " ".join(str(error).split())
        raise ConfigError(f"{location} cannot be opened as a model: {reason}") from error
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{location} cannot be opened as a model: {reason}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{location} holds quantized weights; import the model they were made of")
    return folder, config


def _readable() -> list[Host]:
    return [host for host in HOSTS.values() if host.placement is not None]


def _known() -> str:
    """The classes that can come in, in words."""
    return ", ".join(dict.fromkeys(host.architecture for host in _readable()))


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The shape, as far as the class calls it by Llama's names; `scheme` says the rest."""
    found = {name: getattr(config, name, None) for name in _SHAPE}
    return {name: value for name, value in found.items() if value is not None}


def _token_ids(config: PreTrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """The ids of special tokens; such as -1 are left out, with a note."""
    kept, notes = {}, []
    for name in _TOKEN_IDS:
        value = getattr(config, name, None)
        given = value if isinstance(value, list) else [value]
        inside = [one for one in given if one is not None and 0 <= one < config.vocab_size]
        if len(inside) < len(given) and value is not None:
            notes.append(f"{name} {value} is outside the vocabulary and left out")
        kept[name] = inside if isinstance(value, list) and inside else next(iter(inside), None)
    return kept, notes


def _settle_generation(model: Any) -> list[str]:
    """Leave out generation settings that contradict themselves, which transformers would not save.

    Ids of special tokens stay; the note says what was wrong.
    """
    usual = model.generation_config
    try:
        usual.validate(strict=True)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.startswith("-")]
        ids = {name: getattr(usual, name) for name in _TOKEN_IDS}
        model.generation_config = GenerationConfig(**ids)
        return [f"generation_config.json is left out, it contradicts itself: {' '.join(lines[:1])}"]
    return []


def _biases(tensors: Tensors) -> dict[str, bool]:
    """Which sublayers have biases, by the tensors that came."""
    parts = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}
    return {
        field: any(part in name and name.endswith("_proj.bias") for name in tensors)
        for field, part in parts.items()
    }
