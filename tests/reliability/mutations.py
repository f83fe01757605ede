"""Run files that nobody would write: a good one with a few things done to it.

A run is a flat mapping from key to YAML text, so that it can be written as a file or as flags, and
so that what no YAML writer would write (`.nan`, `1e999`, tags) can be said too.
"""

import json
import random
from collections.abc import Mapping
from typing import Any

from llmnorm.config import RunConfig
from llmnorm.config.problems import leaves
from llmnorm.modeling.operations import list_norms
from llmnorm.placements import list_placements

KEYS = [".".join(map(str, path)) for path in leaves(RunConfig)]
OPTIONS = ("alpha", "eps", "fraction", "res_scale", "scale", "shift", "bias", "affine", "gain")
FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta"),
    *("rope_parameters", "qk_norm", "embedding", "init", "initializer_range", "hidden_act"),
    *("tie_word_embeddings", "position", "mlp", "weights", "parametrization", "attention_bias"),
    *("attention_dropout", "residuals", "norm", "base", "pad_token_id", "dtype", "auto_map"),
)
VALUES = (
    *("null", "true", "false", "yes", "0", "1", "2", "3", "-1", "0.5", "-0.5", "1.5", "1e-3"),
    *("1e-320", "1e300", "1e999", ".nan", "-.inf", "2147483648", "9223372036854775807"),
    *("-9223372036854775808", "9223372036854775808", "9" * 300, "0x10", "010", "1_000", "''"),
    *("fast", "auto", "debug", "9m", "no", "~", "'\u202eevil'", "'\u043a\u043b\u044e\u0447'"),
    *("'\U0001f98a'", "'a\x00b'", '"\\0"', '"\\x1b[2J"', "'%s %d {0}'", "'[red]x[/red]'"),
    *("[]", "[1]", "[0.9, 0.95]", "[0.9, 1.0]", "[[1]]", "[null, {}]", "{}", "{a: {b: 1}}"),
    *("{name: muon}", "{op: dyt, alpha: 0.5}", "{? [1] : 2}", "&x 1", "*x", "!!str 3"),
    *("!!python/name:os.system ''", "{<<: {a: 1}}", "{a: 1, a: 2}", "os:system", "../../x"),
    *("[" * 20 + "]" * 20, "[" * 3000, "/dev/null", "~nobody_of_this_name/x"),
    *("'" + "x" * 400 + "'", "'" + "y" * 5000 + "'"),
)
FITTING: dict[str, tuple[str, ...]] = {
    "model.norm.op": tuple(list_norms()),
    "model.placement.name": tuple(list_placements()),
    "model.overrides.embedding": ("raw", "scale", "norm"),
    "model.overrides.tie_word_embeddings": ("true", "false"),
    "model.overrides.num_hidden_layers": ("1", "2", "3"),
    "model.overrides.qk_norm": ("rmsnorm", "null"),
    "data.seq_len": ("1", "2", "16", "48"),
    "data.document_mask": ("true", "false"),
    "data.num_workers": ("0", "1"),
    "optimizer.name": ("adamw", "muon", "torch.optim:Adam"),
    "optimizer.lr": ("1e-5", "0.01", "1.0"),
    "optimizer.weight_decay": ("0", "0.5"),
    "optimizer.betas": ("[0, 0]", "[0.9, 0.999]"),
    "optimizer.eps": ("1e-12", "1e-3"),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
    "schedule.warmup_steps": ("0", "1", "5", "0.0", "0.5"),
    "schedule.final_lr_fraction": ("0", "1"),
    "training.global_batch_size": ("1", "2", "5"),
    "training.seed": ("0", "9223372036854775807"),
    "training.precision": ("auto", "fp32", "bf16"),
    "training.compile": ("false",),
    "training.activation_checkpointing": ("true", "false"),
    "training.clip_norm": ("0", "0.1", "1e30"),
    "eval.interval_steps": ("0", "1"),
    "eval.batch_size": ("1", "3"),
    "checkpoint.interval_steps": ("0", "1"),
    "checkpoint.keep": ("1", "9"),
    "log.interval_steps": ("1", "1000"),
}
"""Values that a run may well have, by key."""

Flat = dict[str, str]


def flat_run(words: list[str]) -> Flat:
    """Flags and their values as a flat run, sections of `model.overrides` taken apart."""
    run = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    for name, value in json.loads(run.pop("model.overrides", "{}")).items():
        run[f"model.overrides.{name}"] = json.dumps(value)
    return run


def mutate(run: Flat, rng: random.Random) -> tuple[Flat, list[str]]:
    """Return the run with one to three things done to it, and the keys concerned."""
    run, touched = dict(run), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.choice(("set", "set", "set", "drop", "typo", "unknown", "nest", "fit"))
        key = _key(rng)
        if how == "drop":
            key = rng.choice(sorted(run))
            run.pop(key)
        elif how == "typo":
            key = rng.choice(KEYS)
            value = run.pop(key, "1")
            key = misspelt(key, rng)
            run[key] = value
        elif how == "unknown":
            section = rng.choice(("model", "data", "trainin", "x"))
            key = f"{section}.{rng.choice(('lr', 'zzz', '', 'a b'))}"
            run[key] = rng.choice(VALUES)
        elif how == "nest":
            key = rng.choice((key.partition(".")[0], f"{key}.inner"))
            run = {k: v for k, v in run.items() if not f"{k}.".startswith(f"{key}.")}
            run[key] = rng.choice(VALUES)
        elif how == "fit":
            key = rng.choice(sorted(FITTING))
            run[key] = rng.choice(FITTING[key])
        else:
            run[key] = rng.choice(VALUES)
        touched.append(key)
    return run, touched


def fitting(run: Flat, rng: random.Random) -> Flat:
    """Return the run with some values replaced by others that a run may well have."""
    keys = rng.sample(sorted(FITTING), k=rng.randint(1, 8))
    run = dict(run, **{key: rng.choice(FITTING[key]) for key in keys})
    return {key: value for key, value in run.items() if key != "training.micro_batch_size"}


def misspelt(key: str, rng: random.Random) -> str:
    """Return a key with one letter of its last name dropped, doubled or swapped."""
    section, _, name = key.rpartition(".")
    at = rng.randrange(len(name) - 1)
    drop, double = name[:at] + name[at + 1 :], name[: at + 1] + name[at:]
    swap = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    changed = rng.choice([text for text in (drop, double, swap) if text != name])
    return f"{section}.{changed}"


def _key(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(KEYS)
    if kind < 0.8:
        return f"model.overrides.{rng.choice(FIELDS)}"
    return f"model.{rng.choice(('norm', 'placement'))}.{rng.choice(OPTIONS)}"


def as_flags(run: Flat) -> list[str]:
    """The run as command-line words."""
    return [f"--{key}={value}" for key, value in run.items()]


def as_file(run: Flat) -> str:
    """The run as the text of a run file; a key under one that has a value stands beside it."""
    tree: dict[str, Any] = {}
    for key, value in run.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):  # `a: 1` and `a.b: 2` cannot both stand in a file
                inner = place[section] = {}
            place = inner
        if not isinstance(place.get(name), dict):
            place[name] = value
    return _text(tree, "")


def _text(tree: Mapping[str, Any], indent: str) -> str:
    lines = []
    for key, value in tree.items():
        shown = json.dumps(key) if not key.isidentifier() else key
        if isinstance(value, dict):
            lines.append(f"{indent}{shown}:\n{_text(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{shown}: {value}\n")
    return "".join(lines)
