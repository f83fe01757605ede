"""A saved folder carries its code: the Auto class loads it where llmnorm is not installed.

Every scheme is loaded so in `tests/test_testing.py`, by its class; this is how a user does it.
"""

import json
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file
from schemes import KINDS, SHAPE, tokens

from llmnorm import build_config, build_model

IDS = tokens(2, 11)
WIRINGS = [*KINDS, ("bhyt", "bhyt")]  # and the joint that looks at the norms around it

STRANGER = """
import json, sys
from pathlib import Path

class NoLlmnorm:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llmnorm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoLlmnorm())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root, equal = Path(sys.argv[1]), {}
torch.set_num_threads(int(sys.argv[2]))
for folder in sorted(root.iterdir()):
    if not folder.is_dir():
        continue
    expected = load_file(folder.parent / f"{folder.name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    equal[folder.name] = torch.equal(model(expected["ids"]).logits, expected["logits"])
again = root / "again"
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
equal["saved again"] = torch.equal(model(expected["ids"]).logits, expected["logits"])
print(json.dumps(equal))
"""


def test_the_auto_class_loads_every_kind_of_wiring_bit_equal_without_llmnorm(tmp_path):
    saved = tmp_path / "saved"
    for norm, placement in WIRINGS:
        config = build_config(SHAPE, norm=norm, placement=placement)
        model = build_model(config, seed=2).eval()
        model.save_pretrained(saved / f"{norm}-{placement}")
        tensors = {"ids": IDS, "logits": model(IDS).logits.detach()}
        save_file(tensors, saved / f"{norm}-{placement}.safetensors")
    # A fresh norm's weights are what missing ones start from.
    missing, whole = saved / "missing", saved / "rmsnorm-mix_ln"
    shutil.copytree(whole, missing)
    shutil.copy(f"{whole}.safetensors", f"{missing}.safetensors")
    weights = load_file(missing / "model.safetensors")
    kept = {name: held for name, held in weights.items() if "_residual." not in name}
    assert len(kept) < len(weights)
    save_file(kept, missing / "model.safetensors", metadata={"format": "pt"})
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, str(script), str(saved), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    equal = json.loads(done.stdout.splitlines()[-1])
    assert len(equal) == len(WIRINGS) + 2
    assert all(equal.values()), [name for name, same in equal.items() if not same]
