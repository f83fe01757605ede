"""Who knows only transformers: loads exported folders and measures them. Run as a script.

    python -P stranger.py REQUEST OUT

REQUEST is a JSON file: `folders`, the `dtypes` of each, `ids` (batch, seq), `new_tokens`, `threads`
and `trust_remote_code`. OUT receives, for folder number i, `i.json`: what was loaded, or why not;
and, for each dtype, `i.DTYPE.safetensors`: what `measure` gives. llmnorm cannot be imported
meanwhile. `visiting.py` starts it; `certificate.py` has the source measured by the same lines.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GenerationConfig

STATE = "state/"
"""Begins the names of hidden states among what `measure` gives."""


class Widened(TorchFunctionMode):
    """float64 where a class asks for float32, as it does in norms, RoPE and softmax.

    Without it a model of float64 weights computes to 7 digits, and an eps off by ten passes unseen.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@torch.no_grad()
def measure(
    model: Any, ids: torch.Tensor, *, states: bool = False, new_tokens: int = 0
) -> dict[str, torch.Tensor]:
    """Run a causal language model on text.

    Args:
        model: any of transformers' classes, in eval mode.
        ids: (batch, seq).
        states: whether to keep what each part gives.
        new_tokens: how many to generate after the first half of the first row.

    Returns:
        `logits` (batch, seq, vocab), `loss` (), the mean nats per target; with `states`
        `state/embedding`, `state/layer 0`, ..., `state/final norm`, each (..., seq, hidden) in the
        order of computation; with `new_tokens` the greedy `generated` with a cache, its logits
        `scores` (new_tokens, vocab), and `generated_uncached`, both (new_tokens,).
    """
    with _watched(model, states) as seen:
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
    found = {"logits": outputs.logits, "loss": outputs.loss, **seen}
    if new_tokens:
        prompt = ids[:1, : ids.shape[1] // 2]
        cached = _generate(model, prompt, new_tokens, use_cache=True)
        uncached = _generate(model, prompt, new_tokens, use_cache=False)
        found["generated"] = cached.sequences[0, prompt.shape[1] :]
        found["generated_uncached"] = uncached.sequences[0, prompt.shape[1] :]
        found["scores"] = torch.cat(cached.logits)
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int, *, use_cache: bool) -> Any:
    """Greedy, whatever the model's generation_config.json asks for, and past any end-of-text."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        model.generation_config = before


@contextmanager
def _watched(model: Any, wanted: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what enters the first layer, what each layer gives, and what the trunk gives."""
    seen: dict[str, torch.Tensor] = {}
    if not wanted:
        yield seen
        return

    def keep(name: str, value: Any) -> None:
        seen[f"{STATE}{name}"] = value if isinstance(value, torch.Tensor) else value[0]

    trunk, layers = model.base_model, decoder_layers(model)
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep("embedding", args or (kwargs["hidden_states"],)),
            with_kwargs=True,
        ),
        trunk.register_forward_hook(lambda _, args, output: keep("final norm", output)),
    ]
    for index, layer in enumerate(layers):
        hooks.append(
            layer.register_forward_hook(
                lambda _, args, output, name=f"layer {index}": keep(name, output)
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(model: Any) -> Any:
    """The list of a causal model's layers, whatever its class calls it."""
    depth = model.config.num_hidden_layers
    for module in model.base_model.children():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} layers")


class _NoLlmnorm:
    """An import finder to which llmnorm is not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse llmnorm; leave everything else to the next finder."""
        if name.partition(".")[0] == "llmnorm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def visit(folder: str, request: dict[str, Any], out: Path, number: int) -> dict[str, Any]:
    """Load a folder in each dtype, one after the other, and measure it; returns what was loaded."""
    ids, facts = torch.tensor(request["ids"]), {}
    for name in request["dtypes"][number]:
        exact = name == "float64"
        plain = {"experts_implementation": "eager"} if exact else {}  # others have no float64
        with Widened() if exact else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, name),
                trust_remote_code=request["trust_remote_code"],
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **plain,
            )
            model, info = loaded
            new_tokens = request["new_tokens"] if exact else 0
            found = measure(model.eval(), ids, states=exact, new_tokens=new_tokens)
        save_file(found, out / f"{number}.{name}.safetensors")
        facts = {
            "class": type(model).__name__,
            "attention": model.config._attn_implementation,
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
        }
        del model, found
        gc.collect()
    return facts


def main(request_file: str, out: str) -> None:
    """Visit every folder of the request; what fails is written down as one line."""
    assert not any(name.partition(".")[0] == "llmnorm" for name in sys.modules)
    sys.meta_path.insert(0, _NoLlmnorm())
    transformers.logging.set_verbosity_error()
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    for number, folder in enumerate(request["folders"]):
        try:
            facts = visit(folder, request, Path(out), number)
        except Exception as error:  # a folder's code and files may raise anything
            line = " ".join(str(error).split())[:400]
            facts = {"failure": f"{type(error).__name__}: {line}"}
        (Path(out) / f"{number}.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
