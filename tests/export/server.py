"""Run as a script, without llmnorm: what vLLM's transformers backend asks of each folder.

    python -P server.py ROOT

ROOT holds folders with code of their own, and beside each NAME.safetensors with `ids` and the
`logits` that the source gives in float64. Prints, as JSON, for each folder what was found wrong.
"""

# ruff: noqa: E402, T201 (llmnorm must be gone before transformers comes; the answer is printed)
import copy
import json
import re
import sys
from pathlib import Path


class NoLlmnorm:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llmnorm":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NoLlmnorm())

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEEN = []


def spy(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """An attention function as servers bring one: it finds its layer by the module."""
    instance = kwargs["attention_instances"][module.layer_idx]
    SEEN.append((instance, module.config._attn_implementation, scaling == module.scaling))
    assert module.is_causal
    assert kwargs["position_ids"].shape == (1, query.shape[2])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    context = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return context.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("spy", spy)


class Missing(nn.Identity):
    """What stands where another stage of a pipeline has a part: gives what it is given first."""

    def forward(self, *args, **kwargs):
        return args[0]


class Plain(nn.Module):
    """What servers put in the place of an RMSNorm: it knows weight and eps."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def far(got, wanted):
    return float((got - wanted).abs().max() / wanted.std())


def check_logits(folder, base, ids, logits, head):
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64
    )
    yield "code of the folder", type(base).__module__.startswith("transformers_modules")
    yield "the causal model's logits", far(model(ids).logits, logits) < 1e-5
    yield "all but the head in the base", far(base(ids)[0] @ head.T, logits) < 1e-5


def check_attention(folder, base, ids, logits, head):
    base.config._attn_implementation = "spy"
    layers = base.config.num_hidden_layers
    yield "an attention backend", base.is_backend_compatible()
    SEEN.clear()
    out = base(
        input_ids=ids[:1],
        use_cache=False,
        position_ids=torch.arange(ids.shape[1])[None],
        attention_instances={i: f"instance {i}" for i in range(layers)},
        return_dict=False,
    )
    yield "each layer once", [(f"instance {i}", "spy", True) for i in range(layers)] == SEEN
    yield "the backend's logits", far(out[0] @ head.T, logits[:1]) < 1e-5


def check_plans(folder, base, ids, logits, head):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        bare = AutoModel.from_config(config, trust_remote_code=True)
    names = {f"model.{name}" for name in bare.state_dict()}
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    yield "built on meta, names as stored", names == stored - {"lm_head.weight"}
    lists = [n for n, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    yield "one list of layers", lists == ["layers"]
    linear = {re.sub(r"\d+", "*", n) for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    plan = set(base.tp_plan) - {"embed_tokens"}
    yield "a tensor-parallel plan for every linear layer", plan == linear
    yield (
        "usual names",
        {n.rpartition(".")[2] for n in linear}
        <= {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")},
    )
    if base.pp_plan:
        stages = list(base.pp_plan)
        yield "order of the stages", stages[0] == "embed_tokens" and stages[-1] == "norm"
        first, last = base, copy.deepcopy(base)
        middle = len(first.layers) // 2
        for stage, model in ((0, first), (1, last)):
            for i in range(len(model.layers)):
                if (i < middle) == bool(stage):
                    model.layers[i] = Missing()
            at = stages.index("layers")
            for name in stages[:at] if stage else stages[at + 1 :]:
                setattr(model, name, Missing())
        hidden = first(ids, use_cache=False)[0]
        out = last(inputs_embeds=hidden, use_cache=False)[0]
        yield "the same in two stages", far(out @ head.T, logits) < 1e-5
    else:
        yield "no pipeline of two streams", config.streams is not None


def check_replacement(folder, base, ids, logits, head):
    norms = [(n, m) for n, m in base.named_modules() if type(m).__name__ == "RMSNorm"]
    biased = [m.bias is not None for _, m in norms]
    yield "biases in all or none", len(set(biased)) < 2
    if not any(biased):
        for name, norm in norms:
            base.set_submodule(name, Plain(norm))
        yield "nothing but weight and eps", far(base(ids)[0] @ head.T, logits) < 1e-5


def wrong_in(folder):
    beside = load_file(folder.with_name(f"{folder.name}.safetensors"))
    files = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    head = files.get("lm_head.weight", files["model.embed_tokens.weight"]).double()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    checks = (check_logits, check_attention, check_plans, check_replacement)
    return [
        words
        for check in checks
        for words, good in check(folder, copy.deepcopy(base), beside["ids"], beside["logits"], head)
        if not good
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
        print(json.dumps({folder.name: wrong_in(folder) for folder in folders}))
