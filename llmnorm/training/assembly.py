"""What a run is made of, built once before the loop: data, model, plan.

Read `loop.py` first; this is what its opening lines call.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmnorm.build import build_config, build_model
from llmnorm.config import RunConfig
from llmnorm.data import GlobalBatches, Interleaving, Mixture, open_mixture
from llmnorm.data.batches import samples_in
from llmnorm.environment import parameter_counts
from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.fixed_std import FixedStd
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.norms import TaperNorm
from llmnorm.modeling.travel import foreign_sources
from llmnorm.training.distillation import Distillation, load_teacher
from llmnorm.training.manifest import read_state
from llmnorm.training.objective import Objective
from llmnorm.training.optimizer import describe_groups
from llmnorm.training.precision import Precision, decide_precision
from llmnorm.training.ranks import Ranks
from llmnorm.training.schedule import Schedule, horizon_steps, make_schedule
from llmnorm.training.start import (
    check_same_weights,
    check_tokenizer,
    describe_weights,
    started_config,
)
from llmnorm.training.weights import load_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps of how many tokens, and the learning rate along them."""

    steps: int
    tokens_per_step: int
    micro_batch_size: int  # sequences
    schedule: Schedule


def make_plan(config: RunConfig, world: int) -> Plan:
    """Return the plan of a run on `world` processes."""
    training, schedule = config.training, config.schedule
    tokens_per_step = training.global_batch_size * config.data.seq_len
    steps = horizon_steps(training.max_steps, training.max_tokens, tokens_per_step)
    share = -(-training.global_batch_size // world)
    return Plan(
        steps=steps,
        tokens_per_step=tokens_per_step,
        micro_batch_size=min(training.micro_batch_size or share, share),
        schedule=make_schedule(
            schedule.name,
            horizon=steps,
            warmup_steps=schedule.warmup_steps,
            decay_steps=schedule.decay_steps,
            final_lr_fraction=schedule.final_lr_fraction,
        ),
    )


def open_data(config: RunConfig, ranks: Ranks) -> Mixture:
    """Open the prepared data; rank 0 checks every byte, the others what is needed to read."""
    ranks.on_main(lambda: open_mixture(config.data.sources, verify=True).fingerprint)
    return open_mixture(config.data.sources, verify=False)


def describe_run(
    config: RunConfig,
    data: Mixture,
    plan: Plan,
    model: PreTrainedModel,
    device: torch.device,
    found: Path | None,
) -> dict[str, Any]:
    """Return what environment.json says of a run at its first start; log size, data and horizon.

    Args:
        config: the run file.
        data: what is read.
        plan: steps and tokens.
        model: the model.
        device: where it runs.
        found: the checkpoint that it starts from, whose precision is kept.
    """
    counts = parameter_counts(model)
    tokens = plan.steps * plan.tokens_per_step
    per_parameter = tokens / max(1, counts["non_embedding"])
    logger.info(
        "%s parameters (%s non-embedding), %d steps of %d tokens: %.1f tokens per parameter",
        f"{counts['total']:,}",
        f"{counts['non_embedding']:,}",
        plan.steps,
        plan.tokens_per_step,
        per_parameter,
    )
    folders = _describe_folders(config, data, plan)
    _warn_if_short(plan, model)
    return {
        "config_fingerprint": config.fingerprint(),
        **{key: describe_weights(folder) for key, folder in config.weights_read().items()},
        "data": {
            "fingerprint": data.fingerprint,
            "vocab_size": data.vocab_size,
            "folders": folders,
        },
        "parameters": counts,
        "tokens": tokens,
        "tokens_per_non_embedding_parameter": per_parameter,
        "schedule": asdict(plan.schedule),
        "optimizer": describe_groups(model, config.optimizer),
        "precision": asdict(_decide_precision(config, plan, model, device, found)),
    }


def _decide_precision(
    config: RunConfig, plan: Plan, model: PreTrainedModel, device: torch.device, found: Path | None
) -> Precision:
    saved = {} if found is None else read_state(found)
    return decide_precision(
        saved.get("precision", config.training.precision),
        device,
        hidden_size=model.config.hidden_size,
        tokens=plan.micro_batch_size * config.data.seq_len,
    )


def _describe_folders(config: RunConfig, data: Mixture, plan: Plan) -> list[dict[str, Any]]:
    """Return what each folder of the data holds and how often the run reads it; log the same."""
    found = []
    sequences = Interleaving(data.weights).counts(plan.steps * config.training.global_batch_size)
    for folder, weight, read in zip(data.folders, data.weights, sequences, strict=True):
        train = folder.split("train")
        epochs = read / samples_in(train, config.data.seq_len)
        found.append(
            {
                "path": str(folder.path),
                "fingerprint": folder.fingerprint,
                "weight": float(weight),
                "train_tokens": train.tokens,
                "train_documents": train.documents,
                "skipped_documents": folder.manifest.skipped_documents,
                "epochs": epochs,
            }
        )
        logger.info(
            "data: %.4g %% of the sequences from %s: %s tokens, %.2f epochs",
            *(100 * weight, folder.path, f"{train.tokens:,}", epochs),
        )
    return found


def _warn_if_short(plan: Plan, model: PreTrainedModel) -> None:
    """Log one warning if the run ends before norms that fade or are removed are gone."""
    tapers = [m for m in model.modules() if isinstance(m, TaperNorm) and m.gate.item() > 0]
    fixed = [m for m in model.modules() if isinstance(m, FixedStd)]
    for what, needed in (
        ("tapernorm folds after warmup_steps + taper_steps", [_folds_at(m) for m in tapers]),
        ("the last norm is removed after uniform_step", [m.uniform_step for m in fixed]),
    ):
        if plan.steps < max(needed, default=0):
            logger.warning(
                "%s = %d steps, this run has %d: the finished model still normalizes",
                *(what, max(needed), plan.steps),
            )


def _folds_at(module: TaperNorm) -> int:
    return module.warmup_steps + module.taper_steps


def check_same_inputs(facts: dict[str, Any], config: RunConfig, data: Mixture) -> dict[str, Any]:
    """Return environment.json; refuse to continue on other data or weights than it names.

    Raises:
        CheckpointError: naming both.
    """
    run, before = config.output.dir, facts["data"]["fingerprint"]
    if before != data.fingerprint:
        raise CheckpointError(
            f"{run} was trained on data of fingerprint {before[:12]}, {data.place} has "
            f"{data.fingerprint[:12]}; restore that data, or choose another output.dir"
        )
    for key, folder in config.weights_read().items() if facts["restarts"] else ():
        check_same_weights(facts[key], folder, key=key, run=run)
    return facts


def make_batches(config: RunConfig, data: Mixture, plan: Plan, ranks: Ranks) -> GlobalBatches:
    """Return this rank's share of every global batch."""
    return GlobalBatches(
        *data.train(),
        weights=data.weights,
        seq_len=config.data.seq_len,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=config.training.seed,
        eos_token_id=data.eos_token_id,
        rank=ranks.rank,
        world=ranks.world,
        document_mask=config.data.document_mask,
        num_workers=config.data.num_workers,
    )


def make_model(config: RunConfig, data: Mixture, init_from: Path | None) -> LlmNormForCausalLM:
    """Build the model for this data, fresh or with the weights of the folder `init_from`.

    Raises:
        ConfigError: as `model_config`, or if the code of a norm or joint from outside cannot be
            saved with the model.
    """
    if config.model.start_folder is not None:
        check_tokenizer(config.model.start_folder, data)
    shape = model_config(config, vocab_size=data.vocab_size, eos_token_id=data.eos_token_id)
    model = build_model(shape, seed=config.training.seed)
    try:
        foreign_sources(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if init_from is not None:
        load_weights(model, init_from, key=config.start_key)
    return model


def make_objective(
    config: RunConfig, model: LlmNormForCausalLM, data: Mixture, device: torch.device
) -> Objective:
    """Return what is minimized, with or without a teacher; recompute activations if asked for.

    Raises:
        ConfigError: if the teacher has another vocabulary or tokenizer.
        CheckpointError: if its weights cannot be read.
    """
    if config.training.activation_checkpointing:
        model.activation_checkpointing_enable()
    distill, folder = config.distill, config.distill.teacher_folder
    if folder is None:
        return Objective(model)
    check_tokenizer(folder, data, key="distill.teacher")
    return Distillation(
        model,
        load_teacher(folder, device),
        weight=distill.weight,
        temperature=distill.temperature,
    )


def model_config(config: RunConfig, *, vocab_size: int, eos_token_id: int) -> LlmNormConfig:
    """Return the model's config for data of this vocabulary and end-of-text.

    Raises:
        ConfigError: if `model.overrides` gives a smaller vocabulary or fewer positions than needed,
            or the model of `model.start` does not fit.
    """
    if config.model.start_folder is not None:
        return started_config(
            config.model.start_folder,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            seq_len=config.data.seq_len,
        )
    arguments = config.model.build_arguments()
    wanted = config.model.overrides.get("vocab_size", vocab_size)
    if wanted < vocab_size:
        raise ConfigError(
            f"model.overrides.vocab_size={wanted} is smaller than the data's vocabulary of "
            f"{vocab_size}; drop it or make it larger"
        )
    ends = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    arguments = {**ends, **arguments, "vocab_size": wanted}
    shape = build_config(**arguments)
    positions = shape.max_position_embeddings
    if positions >= config.data.seq_len:
        return shape
    if "max_position_embeddings" in config.model.overrides:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} exceeds "
            f"model.overrides.max_position_embeddings={positions}; make the latter larger"
        )
    return build_config(**{**arguments, "max_position_embeddings": config.data.seq_len})
