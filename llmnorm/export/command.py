"""Turn a trained model into one that others load, serve and convert, with a proof that it is equal.

A stock class of transformers is written where one holds the model exactly, else the folder brings
its own code. The folder is loaded again in a process without llmnorm and must give the same logits,
loss and generated tokens; if it does not, it is kept as DIR.failed and the exit code is 1.

Weights are rewritten in float64 and cast once: this takes up to 24 bytes of memory a parameter.
"""

import argparse
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from llmnorm.errors import ConfigError, ParityError
from llmnorm.evaluation.commands.shared import replacing
from llmnorm.evaluation.loading import Loaded, find, load
from llmnorm.evaluation.quiet import quiet
from llmnorm.export.card import Exported, model_card
from llmnorm.export.certificate import certify
from llmnorm.export.custom import serving_form, write_custom
from llmnorm.export.fitting import Fit, explain, fit
from llmnorm.export.form import Form
from llmnorm.export.hosts import HOSTS
from llmnorm.export.making import making
from llmnorm.export.pushing import check_push, push
from llmnorm.export.real_text import real_text
from llmnorm.export.writing import DTYPES, size_of, write_folder
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.resources import suggest

_SEQ, _BATCH = 128, 2  # of the text on which the folder is compared


@dataclass(frozen=True)
class Plan:
    """What a model leaves as: a class that holds its form, or its own code (`fit` is None)."""

    form: Form
    fit: Fit | None
    why: str

    @property
    def architecture(self) -> str:
        """Name of the class that the folder's config names."""
        return self.fit.host.architecture if self.fit else LlmNormForCausalLM.__name__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm export`."""
    add = parser.add_argument
    targets = ", ".join(("auto", *HOSTS, "custom"))
    add("model", metavar="RUN_OR_FOLDER", help="a finished run, or a folder of an llmnorm model")
    add("--target", default="auto", metavar="CLASS", help=f"one of {targets}; default auto")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights; auto: as saved")
    add(
        "--shard-size",
        type=_size,
        metavar="SIZE",
        default="5GB",
        help="most bytes of a file; default 5GB",
    )
    add("--text", type=Path, metavar="FILE", help="to compare on; default: Python's manual")
    add("--tokenizer", metavar="FOLDER_OR_NAME", help="for models that come without a tokenizer")
    add(
        "--fold-pointwise",
        action="store_true",
        help="custom: put gain and bias of dyt, derf into the next linear layers",
    )
    add("--license", metavar="ID", help="for the model card, such as apache-2.0")
    add("--push", metavar="USER/NAME", help="then upload to this repository of the hub")
    add("--private", action="store_true", help="make a new repository private")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code found in the folder (not needed for llmnorm's own models)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, prove, and upload if asked; say what was done."""
    if args.private and args.push is None:
        raise ConfigError("--private is for --push USER/NAME")
    if args.push is not None:
        check_push(args.push)
    lines = export(
        args.model,
        args.out,
        target=args.target,
        dtype=args.dtype,
        shard_size=args.shard_size,
        text=args.text,
        tokenizer=args.tokenizer,
        pointwise=args.fold_pointwise,
        license_id=args.license,
        repo=args.push,
        trust_remote_code=args.trust_remote_code,
    )
    if args.push is not None:
        lines.append(f"uploaded to {push(args.out, args.push, private=args.private)}")
    replacing(sys.stdout).write("\n".join(lines) + "\n")
    return 0


def export(
    model: str,
    out: Path,
    *,
    target: str = "auto",
    dtype: str = "auto",
    shard_size: str = "5GB",
    text: Path | None = None,
    tokenizer: str | None = None,
    pointwise: bool = False,
    license_id: str | None = None,
    repo: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a model to a new folder `out` and prove it; the arguments are the command's.

    Returns:
        What was done, a line each.

    Raises:
        ConfigError: for a target that cannot hold the model, a stock model, a folder that exists,
            a value too large for the dtype.
        CheckpointError: for an unfinished run, or weights that cannot be read.
        DataError: if the text cannot be used.
        EnvironmentProblem: if the disk refuses.
        ParityError: if the folder computes something else; it is kept as `OUT.failed`.
    """
    check_target(target, pointwise=pointwise)
    with making(out) as folder:
        with quiet():
            loaded = load(
                model, dtype="fp64", tokenizer=tokenizer, trust_remote_code=trust_remote_code
            )
        source = ours(loaded)
        positions = min(_SEQ, source.config.max_position_embeddings)
        ids, where = real_text(
            loaded.tokenizer, source.config.vocab_size, positions, _BATCH, file=text
        )
        saved_in = DTYPES.get(dtype) or saved_dtype(model, trust_remote_code)
        plan = plan_for(Form.of(source), target, pointwise=pointwise)
        _write(folder, plan, loaded, saved_in, shard_size)
        parity = certify(
            folder,
            source,
            plan.fit,
            saved_in,
            ids,
            trust_remote_code=plan.fit is None,
            text_source=where,
            form=plan.form,
        )
        exported = Exported(
            architecture=plan.architecture,
            notes=plan.form.notes,
            parity=parity,
            dtype=_name(saved_in),
            place=repo or out.name,
            license_id=license_id,
        )
        card = model_card(loaded, exported)
        (folder / "README.md").write_text(card, encoding="utf-8")
        lines = [f"{plan.architecture}: {plan.why}", *plan.form.notes, *parity["summary"]]
        if not parity["passed"]:
            _keep_failed(folder, out, lines)
        files, size = size_of(folder)
    weights = "model.safetensors" if files == 1 else f"{files} files of weights"
    return [*lines, f"written to {out}: {weights}, {size:,} bytes, {_name(saved_in)}"]


def _write(folder: Path, plan: Plan, loaded: Loaded, dtype: torch.dtype, shard_size: str) -> None:
    """Write weights, config and tokenizer as the plan says."""
    with quiet():
        if plan.fit is None:
            write_custom(folder, plan.form, loaded, dtype, shard_size)
        else:
            write_folder(folder, plan.fit, loaded, dtype, shard_size)


def check_target(target: str, *, pointwise: bool) -> None:
    """Refuse an unknown target, or one that a fold is not for, before anything is read."""
    known = ["auto", "custom", *HOSTS]
    if target not in known:
        hint = suggest(target, known)
        raise ConfigError(f"--target {target}: expected one of {', '.join(known)}{hint}")
    if pointwise and target in HOSTS:
        raise ConfigError(f"--fold-pointwise is for --target custom; {target} has no such norm")


def ours(loaded: Loaded) -> LlmNormForCausalLM:
    """The model, if it is one of ours.

    Raises:
        ConfigError: for a model of another class.
    """
    if not isinstance(loaded.model, LlmNormForCausalLM):
        raise ConfigError(
            f"{loaded.source.name} is a {type(loaded.model).__name__}, not an llmnorm model: others"
            " load it as it is, and `llmnorm import` makes an llmnorm model of it"
        )
    return loaded.model


def plan_for(form: Form, target: str, *, pointwise: bool = False) -> Plan:
    """Choose what a model leaves as, and rewrite it for that.

    Raises:
        ConfigError: if the target cannot hold the form.
    """
    found = None if target == "custom" else fit(form, target)
    if found is not None:
        host = found.host
        served = f" (served by {host.served})" if host.served else ""
        why = "the first class that holds this model" if target == "auto" else "as asked"
        return Plan(found.form, found, f"{why}{served}")
    why = f"own code. {explain(form)}" if target == "auto" else "own code, as asked"
    return Plan(serving_form(form, pointwise=pointwise), None, why)


def saved_dtype(model: str, trust_remote_code: bool) -> torch.dtype:
    """The precision in which a model was saved, float32 where its config does not say."""
    config = AutoConfig.from_pretrained(find(model).location, trust_remote_code=trust_remote_code)
    return config.dtype if config.dtype in DTYPES.values() else torch.float32


def _keep_failed(folder: Path, out: Path, lines: list[str]) -> None:
    kept = out.with_name(f"{out.name}.failed")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    raise ParityError(
        f"{lines[0]}: the folder does not compute what the model does; {'; '.join(lines[1:])};"
        f" it is kept as {kept}, with parity.json"
    )


def _size(text: str) -> str:
    """An argparse type: bytes with a unit, such as 5GB or 500MB."""
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?\s*(KB|MB|GB|TB)", text.strip(), re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected such as 5GB or 500MB")
    return text.strip()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
