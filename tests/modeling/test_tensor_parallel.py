"""Two tensor-parallel processes give one process's logits, gathered norms included."""

import json

import pytest
import torch

from llmnorm import build_config, build_model

IDS = torch.arange(22).view(2, 11)
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCHEMES = {
    "sharded": {"placement": "peri_ln", "qk_norm": "per_head"},
    "gathered attention": {"placement": "res_post_ln", "qk_norm": "full_width"},
    "gathered attention and mlp": {"placement": "sub_ln"},
    "head gains": {"placement": "normformer", "norm": "derf"},
    "plain mlp": {"placement": "lns", "mlp": "plain", "hidden_act": "gelu"},
    "learned positions": {"position": "learned", "tie_word_embeddings": True},
    "rotated": {"qk_norm": {"layout": "per_head", "rope": "after"}},
    "gates": {"placement": "sdd"},
    "shared": {"placement": "parallel"},
    "two streams": {"placement": "siamese_norm"},
    "sphere": {"placement": "ngpt", "norm": "l2norm"},
    "reused statistic": {"placement": "bhyt", "norm": "bhyt"},
}
WORKER = """
import json, os, sys
import torch
from torch.distributed.tensor import DTensor
import llmnorm
from transformers import AutoModelForCausalLM
report = {}
for name in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", tp_plan="auto").eval()
    logits = model(torch.arange(22).view(2, 11)).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    report[name] = [logits.tolist(), sharded]
print("REPORT" + json.dumps(report), flush=True)
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.fast
def test_the_plan_gathers_only_where_a_norm_spans_a_sharded_axis():
    plans = {name: build_config(SHAPE, **s).base_model_tp_plan for name, s in SCHEMES.items()}
    attention = "layers.*.self_attn.o_proj"
    mlp = "layers.*.mlp.down_proj"
    assert plans["sharded"][attention] == plans["sharded"][mlp] == "rowwise"
    assert plans["gathered attention"][attention] == "rowwise_split_input"
    assert plans["gathered attention"][mlp] == "rowwise"
    assert plans["gathered attention and mlp"][mlp] == "rowwise_split_input"
    assert plans["head gains"][attention] == "rowwise_split_input"
    assert "layers.*.mlp.gate_proj" not in plans["plain mlp"]


def test_two_processes_give_the_logits_of_one(tmp_path, run_ranks):
    expected = {}
    for name, scheme in SCHEMES.items():
        model = build_model(build_config(SHAPE, **scheme), seed=1).eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = model(IDS).logits
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for output in run_ranks(script, tmp_path, json.dumps(list(SCHEMES))):
        line = next(text for text in output.splitlines() if text.startswith("REPORT"))
        report = json.loads(line.removeprefix("REPORT"))
        for name, (logits, sharded) in report.items():
            assert sharded > 0, name
            torch.testing.assert_close(
                torch.tensor(logits), expected[name], rtol=1e-4, atol=1e-5, msg=name
            )
