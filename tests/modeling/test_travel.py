"""A norm registered outside llmnorm travels with the saved model, or saving refuses."""

import importlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from schemes import SHAPE, tokens

from llmnorm import LlmNormConfig, build_config, build_model
from llmnorm.modeling import operations
from llmnorm.modeling.residual import RESIDUALS

NORM = """
import torch
from torch import nn
from llmnorm import register_norm
{extra}

@register_norm("half_rms")
class HalfRMS(nn.Module):
    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.full((dim,), 0.5))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)

    def forward(self, x):
        return self.scale * self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
"""
JOINT = """
import torch
from llmnorm.modeling.residual import Residual as Joint, register_residual


@register_residual("slow")
class Slow(Joint):
    def forward(self, x, block_input, branch, **kwargs):
        return x + 0.5 * self.post(branch(self.pre(x), **kwargs))
"""
STRANGER = """
import sys
class NoLlmnorm:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llmnorm", "my_norms", "my_joints"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoLlmnorm())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
model.save_pretrained(sys.argv[1] + "-again")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True)
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
"""


@pytest.fixture
def foreign_model(tmp_path, monkeypatch):
    """Build a model of a norm whose file has the given extra lines."""

    def build(extra: str = ""):
        (tmp_path / "my_norms.py").write_text(NORM.format(extra=extra))
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module("my_norms")
        return build_model(build_config(SHAPE, norm="half_rms", placement="lns"), seed=1)

    yield build
    operations.OPERATIONS.pop("half_rms", None)
    operations._NORMS.remove("half_rms")
    sys.modules.pop("my_norms", None)


@pytest.fixture
def foreign_joint(tmp_path, monkeypatch):
    """Build a model whose every joint is a residual module of its own, in hand-made residuals."""
    (tmp_path / "my_joints.py").write_text(JOINT)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_joints")
    spec = {"pre": {"op": "rmsnorm"}, "module": "slow"}
    layers = [{"attn": spec, "mlp": spec}] * SHAPE["num_hidden_layers"]
    final = {"op": "rmsnorm"}
    yield LlmNormConfig(**SHAPE, placement=None, norm=None, residuals=layers, final_norm=final)
    RESIDUALS.pop("slow", None)
    sys.modules.pop("my_joints", None)


def load_as_stranger(model, tmp_path):
    """Load the saved model twice in a process without llmnorm and without my_norms, my_joints."""
    ids = tokens()
    model.save_pretrained(tmp_path / "saved")
    save_file({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.safetensors")
    (tmp_path / "stranger.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, "stranger.py", "saved", "expected.safetensors"],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_foreign_norm_loads_where_its_package_is_missing(foreign_model, tmp_path):
    load_as_stranger(foreign_model(), tmp_path)


def test_a_foreign_residual_module_loads_where_its_package_is_missing(foreign_joint, tmp_path):
    model = build_model(foreign_joint, seed=1)
    assert type(model.model.layers[1].mlp_residual).__name__ == "Slow"
    load_as_stranger(model, tmp_path)
    saved = (tmp_path / "saved" / "foreign_my_joints.py").read_text()
    assert "from .residual import Residual as Joint\nfrom .residual import register_resid" in saved


@pytest.mark.parametrize(
    "line",
    [
        "import llmnorm.build",
        "from llmnorm import register",
        "from llmnorm.modeling.norms import RMSNorm",
        "import beside_my_norms",
    ],
)
def test_a_foreign_norm_that_needs_what_stays_behind_is_refused_before_anything_is_written(
    line, foreign_model, tmp_path
):
    (tmp_path / "beside_my_norms.py").write_text("")
    model = foreign_model(line)
    with pytest.raises(ValueError, match=r"my_norms\.py:5: HalfRMS must travel"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.fast
def test_a_foreign_norm_takes_part_in_schemes_like_any_other(foreign_model):
    model = foreign_model()
    torch.testing.assert_close(model.model.layers[3].attn_residual.pre.scale, 4**-0.5)
    assert "half_rms" in operations.list_norms()
