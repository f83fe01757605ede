"""`llmnorm convert --to ...` for norms that further training makes good.

The new operations are fitted on text, the model is written as one to start from, and what it loses
before any training is measured. The command that trains it on is printed.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmnorm.data import open_prepared
from llmnorm.errors import ConfigError, DataError
from llmnorm.evaluation.loading import Loaded, load
from llmnorm.evaluation.measure import measure_perplexity
from llmnorm.evaluation.quiet import quiet
from llmnorm.export.conversion.fit import Fitted, fit_sites
from llmnorm.export.conversion.removal import OP, with_removals
from llmnorm.export.conversion.rewire import changed_sites, rewired, with_weights_of
from llmnorm.export.making import making
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import operation
from llmnorm.selftest import promised_slots

_WIDTH = 100  # columns of the table where the output is no terminal
_WARMUP, _TAPER = 0.1, 0.6  # of the steps: tapernorm's averages, then its fading; ours


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did.

    Args:
        norm: the new norm, as asked for.
        fitted: one record a site.
        loss: on the validation text before and after, in nats per token.
    """

    norm: dict[str, Any]
    fitted: list[Fitted]
    loss: tuple[float, float]


def convert(args: argparse.Namespace) -> int:
    """Convert `args.source` to the norm `args.to`, and say what to do next."""
    if args.data is None:
        raise ConfigError(f"--to {args.to} is fitted on text; name it with --data PREPARED_FOLDER")
    loaded = load(args.source, dtype="fp32", device=_device())
    conversion = convert_loaded(
        loaded,
        norm_of(args.to, args.steps, args.penalty),
        args.data,
        args.out,
        tokens=args.tokens,
        max_documents=args.max_documents,
    )
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(_table(conversion.fitted))
    before, after = conversion.loss
    sys.stdout.write(
        f"validation loss {before:.4f} as trained, {after:.4f} converted, before any training\n"
        f"train it on with:\n  {training_command(loaded, args)}\n"
    )
    return 0


def norm_of(op: str, steps: int | None, penalty: float) -> dict[str, Any]:
    """Return the norm that a target means; for fixed_std, what its sites are made from.

    Raises:
        ConfigError: if it moves with the steps of the training that follows, and these are unknown.
    """
    if op not in ("tapernorm", OP):
        return {"op": op}
    if steps is None:
        raise ConfigError(f"--to {op} moves by the steps of training; say how many with --steps N")
    if op == OP:
        return {"op": op, "steps": steps, "penalty": penalty}
    return {
        "op": op,
        "warmup_steps": max(1, round(_WARMUP * steps)),
        "taper_steps": max(1, round(_TAPER * steps)),
    }


def new_config(config: LlmNormConfig, norm: Mapping[str, Any]) -> LlmNormConfig:
    """Return the config with the norm of `norm_of`."""
    if norm["op"] == OP:
        return with_removals(config, norm["steps"], norm["penalty"])
    return rewired(config, norm)


def convert_loaded(
    loaded: Loaded,
    norm: Mapping[str, Any],
    data: Path,
    out: Path,
    *,
    tokens: int,
    max_documents: int | None,
) -> Conversion:
    """Fit, measure and write a model with another norm.

    Args:
        loaded: the model as trained, with its tokenizer.
        norm: what `norm_of` returned.
        data: prepared folder; fitted on its train split, measured on its val split.
        out: new folder, for `model.start`.
        tokens: to fit on.
        max_documents: to measure on; None for all.

    Raises:
        ConfigError: if the model is none of ours, or has nothing to convert.
        DataError: if the data is too small or of another tokenizer.
    """
    model = loaded.model
    if not isinstance(model, LlmNormForCausalLM):
        raise ConfigError(
            f"{loaded.source.name} is a {type(model).__name__}; llmnorm import makes it ours first"
        )
    config = new_config(model.config, norm)
    sites = changed_sites(model.config, config)
    check_kind(model.config, sites, norm)
    before = _loss(loaded, data, max_documents)
    converted = with_weights_of(model, config)
    ids = calibration_tokens(data, loaded.seq_len(None), tokens).to(model.device)
    fitted = fit_sites(model, converted, sites, ids)
    after = _loss(replace(loaded, model=converted), data, max_documents)
    found = Conversion(norm=dict(norm), fitted=fitted, loss=(before, after))
    with making(out) as folder:
        write(folder, converted, loaded)
        record = {"source": loaded.source.name, "tokens": ids.numel(), **asdict(found)}
        (folder / "conversion.json").write_text(json.dumps(record, indent=1) + "\n")
    return found


def write(folder: Path, model: LlmNormForCausalLM, source: Loaded) -> None:
    """Write a model, its code and the tokenizer of its source."""
    with quiet():
        model.save_pretrained(folder)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)


def check_kind(config: LlmNormConfig, sites: list[str], norm: Mapping[str, Any]) -> None:
    """Refuse to make of a layernorm what subtracts no mean, unless it is fitted anyway.

    Raises:
        ConfigError: naming the first.
    """
    if norm["op"] == OP or getattr(operation(norm["op"]), "pointwise", False):
        return
    held = {name: spec.op for name, spec, _ in promised_slots(config) if spec is not None}
    for site in sites:
        if held[site] == "layernorm":
            raise ConfigError(
                f"{site} is a layernorm, and {norm['op']} subtracts no mean; "
                "llmnorm convert --to rmsnorm first, which is exact"
            )


def calibration_tokens(data: Path, seq_len: int, tokens: int) -> Tensor:
    """Return the first tokens of the train split, (rows, seq_len) and at least one row.

    Raises:
        DataError: if there are too few.
    """
    split = open_prepared(data, verify=False).split("train")
    rows = max(1, tokens // seq_len)
    if split.tokens < rows * seq_len:
        raise DataError(
            f"{data} has {split.tokens} training tokens, {rows * seq_len} are wanted to fit on; "
            "give more text or fewer --tokens"
        )
    return torch.from_numpy(split.window(0, rows * seq_len)).view(rows, seq_len)


def training_command(loaded: Loaded, args: argparse.Namespace) -> str:
    """Return the command that trains a converted model on, with its source as the teacher."""
    words = {
        "model.start": args.out,
        "distill.teacher": args.source,
        "data.path": args.data,
        "data.seq_len": loaded.seq_len(None),
        "optimizer.lr": "3e-4",
        "training.max_steps": args.steps or 300,
        "training.global_batch_size": 64,
        "output.dir": f"{args.out}-trained",
    }
    flags = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in words.items())
    return f"accelerate launch train/pretrain.py {flags}"


def _loss(loaded: Loaded, data: Path, max_documents: int | None) -> float:
    record = measure_perplexity(loaded, data, max_documents=max_documents).record
    return float(record["loss"])


def _table(fitted: list[Fitted]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("site", "rms of input", "alpha", "relative error"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for site in fitted:
        alpha = "" if site.alpha is None else f"{site.alpha:.4g}"
        table.add_row(site.site, f"{site.rms:.4g}", alpha, f"{site.error:.2%}")
    return table


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")
