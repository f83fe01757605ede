"""The model card: a README.md made from what the model and its run say of themselves.

What is not known is left out: a bare folder has a scheme, and no recipe, data or scores.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llmnorm.build import cite
from llmnorm.evaluation.loading import Loaded
from llmnorm.evaluation.runs import Run, open_run
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import operation, read_choice
from llmnorm.placements import parse_placement

_OWN_CODE = LlmNormForCausalLM.__name__
_NAMES = ("name", "op", "layout", "treatment", "policy", "kind")  # of a choice among its options
_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}"{trust})
"""
_GENERATE = """\
tokenizer = AutoTokenizer.from_pretrained("{place}"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What the card says of the folder that it stands in.

    Args:
        architecture: name of the class.
        notes: what was folded, one sentence each.
        parity: content of `parity.json`.
        dtype: name of the weights' precision.
        place: what users will load: a repository or the folder's name.
        license_id: as the hub names it; None leaves the field to the user.
    """

    architecture: str
    notes: Sequence[str]
    parity: Mapping[str, Any]
    dtype: str
    place: str
    license_id: str | None = None


def model_card(loaded: Loaded, exported: Exported) -> str:
    """The whole README.md, with YAML front matter for the hub.

    Raises:
        DataError: if the run's own files cannot be read.
    """
    run = open_run(loaded.source.run) if loaded.source.run else None
    config: Any = loaded.model.config
    sections = {
        "Use": _use(exported, tokenizer=loaded.tokenizer is not None),
        "Scheme": _scheme(config),
        "Export": _export(exported),
        "Training": "" if run is None else _training(run),
        "Data": "" if run is None else _data(run),
        "Scores": "" if run is None else _scores(run),
        "Papers": "\n".join(f"- {line}" for line in cite(config).splitlines()),
    }
    body = [f"# {exported.place.rpartition('/')[2]}", _summary(loaded, exported)]
    body += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return f"---\n{_front(config, exported)}\n---\n\n" + "\n\n".join(body) + "\n"


def _front(config: LlmNormConfig, exported: Exported) -> str:
    placement, norm = names(config)
    tags = ["llmnorm", *(tag for tag in (placement, norm) if tag)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=exported.license_id,
        tags=[*tags, "custom_code"] if exported.architecture == _OWN_CODE else tags,
    )
    return data.to_yaml().strip()


def names(config: LlmNormConfig) -> tuple[str, str]:
    """The names of a config's placement and norm; empty where its wiring is hand-made."""
    if config.placement is None or config.norm is None:
        return "", ""
    placement = read_choice("placement", config.placement, "name")["name"]
    return placement, read_choice("norm", config.norm, "op")["op"]


def _summary(loaded: Loaded, exported: Exported) -> str:
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    config: Any = loaded.model.config
    placement, norm = names(config)
    scheme = f" with the placement `{placement}` and the norm `{norm}`" if placement else ""
    how = "with its own code" if exported.architecture == _OWN_CODE else "folded into a stock class"
    return (
        f"A decoder-only language model of {count:,} parameters, trained by llmnorm{scheme},"
        f" {how}: `{exported.architecture}`, weights in {exported.dtype}."
    )


def _use(exported: Exported, *, tokenizer: bool) -> str:
    own = exported.architecture == _OWN_CODE
    code = _LOAD + _GENERATE if tokenizer else _LOAD.replace(", AutoTokenizer", "")
    code = code.format(place=exported.place, trust=f", trust_remote_code={own}" if own else "")
    warning = "\n\nThe folder brings the model's code; read it before you trust it."
    return f"```python\n{code}```{warning if own else ''}"


def _scheme(config: LlmNormConfig) -> str:
    placement, norm = names(config)
    rows = []
    for axis, given in (("placement", placement), ("norm", norm)):
        if given:
            part = type(parse_placement(given)) if axis == "placement" else operation(given)
            rows.append((axis, f"`{_options(getattr(config, axis))}`", _about(part)))
    for axis in ("qk_norm", "embedding", "init", "weights", "parametrization"):
        rows.append((axis, f"`{_options(getattr(config, axis))}`", ""))
    rows.append(("shape", f"{config.num_hidden_layers} layers of width {config.hidden_size}", ""))
    return _table(("axis", "choice", "what it is"), rows)


def _export(exported: Exported) -> str:
    parity = "\n".join(exported.parity.get("summary", []))
    told = [f"- {note}" for note in exported.notes] + ["" if exported.notes else None]
    told += ["```text", parity, "```", "", "`parity.json` has more: tolerances, versions, hashes."]
    return "\n".join(line for line in told if line is not None)


def _training(run: Run) -> str:
    config, facts = run.config, run.environment
    optimizer, training = config.get("optimizer", {}), config.get("training", {})
    rows = [
        ("steps", f"{run.steps:,}"),
        ("tokens", f"{run.tokens:,}"),
        ("sequence length", config["data"]["seq_len"]),
        ("sequences a step", training.get("global_batch_size")),
        ("optimizer", optimizer.get("name")),
        ("learning rate", optimizer.get("lr")),
        ("weight decay", optimizer.get("weight_decay")),
        ("schedule", config.get("schedule", {}).get("name")),
        ("precision", facts.get("precision", {}).get("name") or training.get("precision")),
        ("seed", training.get("seed")),
        ("commit", facts.get("git_commit")),
        *((name, facts.get("versions", {}).get(name)) for name in ("llmnorm", "torch")),
    ]
    return _table(
        ("setting", "value"), [(name, value) for name, value in rows if value is not None]
    )


def _data(run: Run) -> str:
    rows = []
    for folder in run.environment.get("data", {}).get("folders", []):
        share, epochs = folder.get("weight"), folder.get("epochs")
        rows.append(
            (
                Path(str(folder.get("path"))).name,
                "" if share is None else f"{100 * share:.4g} %",
                f"{folder.get('train_tokens', 0):,}",
                "" if epochs is None else f"{epochs:.2f}",
                f"`{folder.get('fingerprint')}`",
            )
        )
    head = ("prepared folder", "share", "its tokens", "epochs", "fingerprint (SHA-256)")
    return _table(head, rows) if rows else ""


def _scores(run: Run) -> str:
    rows: list[tuple[Any, ...]] = []
    if (loss := run.validation_loss) is not None and math.isfinite(loss):
        rows.append(("validation loss, nats a token", f"{loss:.4f}", ""))
    if run.perplexity is not None:
        for name, words in (("perplexity", "perplexity"), ("bits_per_byte", "bits a byte")):
            if (value := run.perplexity.get(name)) is not None:
                rows.append((words, f"{value:.4f}", ""))
    for task, score in sorted(run.downstream.items()):
        error = "" if score.stderr is None else f"± {score.stderr:.4f}"
        chance = "" if score.chance is None else f"chance {score.chance:.4f}"
        rows.append((f"{task}, {score.metric}", f"{score.score:.4f} {error}".strip(), chance))
    note = "Measured on the model before export."
    return f"{_table(('on', 'score', ''), rows)}\n\n{note}" if rows else ""


def _about(part: type) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((inspect.getdoc(part) or "").partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + ("." if stop else "")


def _options(value: Any) -> str:
    """A choice and its options on one line."""
    if not isinstance(value, Mapping):
        return str(value)
    words = [
        _options(item) if key in _NAMES else f"{key} {_options(item)}"
        for key, item in value.items()
    ]
    return ", ".join(words)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines)
