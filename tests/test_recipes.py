"""The files in configs/: each is read by the program it is for, and says what it claims."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from llmnorm import build_config
from llmnorm.config import load_run_config
from llmnorm.listing import count_parameters
from llmnorm.resources import list_presets, list_recipes

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LAUNCHERS = ["cpu", "ddp", "fsdp2", "multinode", "zero1", "zero2", "zero3"]
PRETRAIN = [name for name in list_recipes() if name.startswith("pretrain/")]


def test_there_is_a_recipe_for_every_preset_but_debug():
    assert [f"pretrain/{name}" for name in list_presets() if name != "debug"] == PRETRAIN
    assert list_recipes() == ["quickstart", *PRETRAIN]


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_is_a_valid_run_file(name):
    run = load_run_config(name)
    moved = load_run_config(name, ["--data.path=elsewhere", "--output.dir=runs/other"])
    assert moved.fingerprint() == run.fingerprint()
    assert run.model.preset in (name.removeprefix("pretrain/"), "debug")


def test_the_quickstart_is_about_1_5_million_tokens_of_pre_ln_with_scaled_embedding():
    run = load_run_config("quickstart")
    assert run.training.max_tokens == 1_500_000
    assert (run.model.norm.op, run.model.placement.name) == ("rmsnorm", "pre_ln")
    assert run.model.overrides == {"embedding": "scale"}
    assert run.data.path == Path("data/python-stdlib")
    assert run.output.dir == Path("runs/quickstart/pre_ln-rmsnorm")
    assert run.training.compile is False


@pytest.mark.parametrize("placement", ["peri_ln", "lns", "mix_ln", "deepnorm"])
def test_the_quickstart_takes_any_scheme_from_the_command_line(placement, caplog):
    run = load_run_config("quickstart", [f"--model.placement.name={placement}"])
    config = build_config(**run.model.build_arguments())
    assert config.embedding_spec().treatment == "scale"
    assert not caplog.records


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_follows_the_step_law_it_cites(name):
    run = load_run_config(name)
    _, parameters = count_parameters(build_config(run.model.preset))
    tokens = run.training.max_tokens
    rate = 1.79 * parameters**-0.713 * tokens**0.307
    batch = 0.58 * tokens**0.571
    assert run.optimizer.lr == pytest.approx(min(rate, 6e-3), rel=0.05)
    assert run.training.global_batch_size * run.data.seq_len == pytest.approx(batch, rel=0.1)
    assert run.optimizer.lr * run.schedule.final_lr_fraction == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_sees_about_20_tokens_per_parameter(name):
    run = load_run_config(name)
    total, _ = count_parameters(build_config(run.model.preset))
    assert 18 < run.training.max_tokens / total < 23


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerate_reads_the_launcher_file(name):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    kind = {"cpu": "NO", "ddp": "MULTI_GPU", "multinode": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == DistributedType(kind.get(name, "DEEPSPEED"))
    assert config.mixed_precision in ("no", None)  # the run file decides


def test_there_are_no_other_launcher_files():
    assert sorted(path.stem for path in (CONFIGS / "accelerate").iterdir()) == LAUNCHERS


def test_ddp_serves_cpu_processes_too():
    config = load_config_from_file(str(CONFIGS / "accelerate" / "ddp.yaml"))
    assert (config.num_processes, config.use_cpu) == (2, False)


def test_fsdp2_wraps_the_blocks_of_the_model():
    config = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml"))
    from llmnorm import LlmNormForCausalLM

    assert config.fsdp_config["fsdp_version"] == 2
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert [wrapped] == LlmNormForCausalLM._no_split_modules


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_keeps_fp32_weights_and_takes_batch_sizes_from_the_run_file(stage):
    launcher = yaml.safe_load((CONFIGS / "accelerate" / f"zero{stage}.yaml").read_text())
    file = launcher["deepspeed_config"]["deepspeed_config_file"]
    assert file == f"configs/deepspeed/zero{stage}.json"
    config = json.loads((CONFIGS.parent / file).read_text())
    assert config["zero_optimization"]["stage"] == stage
    autocast = config["torch_autocast"]
    assert (autocast["enabled"], autocast["dtype"]) == ("auto", "bfloat16")
    assert autocast["lower_precision_safe_modules"] == []  # gradients travel in float32
    assert "bf16" not in config
    assert "fp16" not in config
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
