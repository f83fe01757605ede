"""TRL's SFTTrainer on our models, and the schemes for which its loop would be silently wrong."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from schemes import FULL, SHAPE
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.training.finetuning import CHAT_TEMPLATE, check_foreign_loop
from llmnorm.training.optimizer import linear_matrices

REFUSED = {
    ("rmsnorm", "nap"): "weights are 'project'",
    ("l2norm", "ngpt"): "weights are 'unit'",
    ("tapernorm", "pre_ln"): "TaperNorm moves after each step",
    ("rmsnorm", "completep"): "logits are more than its head's product",
}


@pytest.fixture
def make_trainer(tokenizer, chats, tmp_path):
    def make(folder, **options) -> SFTTrainer:
        peft_config = options.pop("peft_config", None)
        tokenizer.chat_template = CHAT_TEMPLATE
        config = SFTConfig(
            tmp_path / "out",
            **{
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "report_to": "none",
                "disable_tqdm": True,
                "save_strategy": "no",
                "logging_steps": 1,
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "max_length": 128,
                **options,
            },
        )
        return SFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            config,
            train_dataset=Dataset.from_list(chats),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    yield make
    tokenizer.chat_template = None


def losses(trainer: SFTTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_few_steps_lower_the_loss(make_trainer, folder, lora):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    lr = 5e-2 if lora else 1e-2
    trainer = make_trainer(folder, peft_config=config, learning_rate=lr, assistant_only_loss=True)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 6
    assert found[-1] < min(found[:2]) - 0.2


def test_trls_loss_is_the_models(make_trainer, folder):
    trainer = make_trainer(folder)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(folder)(**batch).loss
        theirs = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(theirs, own)


def test_packed_chats_do_not_see_each_other(make_trainer, folder):
    """Packing needs flash attention elsewhere; here positions that start again part the chats."""
    packed, apart = (
        make_trainer(folder, packing=packing, max_length=128, per_device_train_batch_size=size)
        for packing, size in ((True, 100), (False, 24))
    )
    sums = []
    for trainer in (packed, apart):
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            logits = trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            scores = logits[:, :-1].log_softmax(-1)
            targets = batch["labels"][:, 1:]
            kept = targets != -100
            sums.append((scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * kept).sum())
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("pair", FULL, ids="-".join)
def test_schemes_that_need_more_than_a_loss_and_a_step_are_refused(pair):
    norm, placement = pair
    model = build_model(build_config(SHAPE, norm=norm, placement=placement))
    if pair in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[pair]):
            check_foreign_loop(model)
    else:
        check_foreign_loop(model, adapters=True)


@pytest.mark.fast
@pytest.mark.parametrize("fields", [{"weights": "lawn"}, {"tie_word_embeddings": True}])
def test_rules_and_heads_of_any_scheme_are_looked_at(fields):
    fixed = {"embedding": {"treatment": "norm", "norm": "fixnorm"}, **fields}
    model = build_model(build_config(SHAPE, **fixed))
    with pytest.raises(ConfigError, match=r"lawn|head's product"):
        check_foreign_loop(model)


def test_what_follows_the_head_would_be_missing_from_trls_loss(make_trainer, make_folder):
    folder = make_folder(parametrization={"name": "mup", "base_width": 8})
    trainer = make_trainer(folder)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        own = trainer.model(**batch).loss
        theirs = trainer.compute_loss(trainer.model, dict(batch))
    assert abs(theirs - own) > 0.01
    with pytest.raises(ConfigError, match="all that TRL computes its loss from"):
        check_foreign_loop(trainer.model)


@pytest.mark.fast
def test_trainers_names_would_decay_gains_that_ours_leaves_alone():
    model = build_model(build_config(SHAPE, norm="derf"))
    by_name = set(Trainer.get_decay_parameter_names(None, model))
    assert "model.layers.0.attn_residual.pre.alpha" in by_name - linear_matrices(model)
