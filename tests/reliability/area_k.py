"""K: bad configurations. Whatever a run file says, it builds or is refused in plain lines."""

import json
from typing import Any, get_args

import torch
from annotated_types import Ge, Gt, Le, Lt
from reliability.console import Said, check_refusal, command, limit_memory, llmnorm
from reliability.harness import Trial, bar
from reliability.mutations import (
    KEYS,
    Flat,
    as_file,
    as_flags,
    fitting,
    flat_run,
    misspelt,
    mutate,
)
from reliability.runs import tiny, words

from llmnorm import build_config
from llmnorm.config import RunConfig, load_run_config
from llmnorm.config.problems import leaves
from llmnorm.errors import ConfigError
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

_MOST_SECONDS = 2.0  # to check a run file, imports apart


def _base(trial: Trial) -> Flat:
    return flat_run(words(trial.folder / "run"))


def _check(trial: Trial, run: Flat, by_file: bool) -> tuple[Said, RunConfig | None]:
    """Check a run file as a command does, in 1 GB and two seconds."""
    read: list[RunConfig] = []
    path = trial.folder / "run.yaml"
    arguments = ["run.yaml"] if by_file else as_flags(run)
    if by_file:
        path.write_text(as_file(run), encoding="utf-8", errors="surrogatepass")

    def main(arguments: list[str]) -> None:
        read.append(load_run_config(*((path, []) if by_file else (None, arguments))))

    limit_memory()
    said = command(trial.folder, arguments, main)
    assert said.seconds < _MOST_SECONDS, f"took {said.seconds:.1f} s"
    return said, read[0] if read else None


def _build(config: RunConfig) -> int:
    """Build the model without memory and return its parameter count."""
    with torch.device("meta"):
        model = LlmNormForCausalLM(build_config(**config.model.build_arguments()))
    return sum(parameter.numel() for parameter in model.parameters())


@bar("K1", "mutated run files, by file or flags: built or refused in plain lines",
     total=2000, ci=300, seconds=60)  # fmt: skip
def mutated(trial: Trial) -> None:
    run, touched = mutate(_base(trial), trial.rng)
    said, config = _check(trial, run, by_file=trial.index % 2 == 0)
    if config is None:
        check_refusal(said, (2,))
        named = [part for key in touched for part in key.split(".") if part]
        what = (*named, "run.yaml", "is required")
        assert any(word in said.err for word in what), f"{touched} is not named: {said.err}"
    else:
        assert said.code == 0
        assert _build(config) > 0


@bar("K1b", "a misspelt key of a run file is told its right name", total=300, ci=40)
def near_misses(trial: Trial) -> None:
    key = KEYS[trial.index % len(KEYS)]
    run = _base(trial)
    value = run.pop(key, "1")
    wrong = misspelt(key, trial.rng)
    said, config = _check(trial, {**run, wrong: value}, by_file=trial.rng.random() < 0.5)
    if config is not None or wrong in KEYS or key.startswith(("model.norm", "model.placement")):
        trial.skip(f"{wrong} is an option of its own")
    check_refusal(said, (2,))
    (line,) = [line for line in said.lines if wrong in line]
    assert key in line, f"{key} is not suggested: {line}"


@bar("K2", "what is accepted trains two steps", total=200, ci=8, seconds=120)
def accepted_trains(trial: Trial) -> None:
    run = {**_base(trial), "training.max_steps": "2", "eval.max_documents": "2"}
    run["checkpoint.interval_steps"] = "1"
    draw = fitting if trial.index % 2 else lambda run, rng: mutate(run, rng)[0]
    for _ in range(200):
        config = _accepted(draw(run, trial.rng))
        if config is not None and _is_small(config, trial):
            break
    else:
        raise AssertionError("no draw was accepted")
    (trial.folder / "drawn.yaml").write_text(config.to_yaml(), encoding="utf-8")
    said = llmnorm(trial.folder, "train", trial.folder / "drawn.yaml")
    assert said.code == 0, f"{config.to_yaml()}\n{said.err[-1500:]}"
    records = (trial.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2]


def _accepted(run: Flat) -> RunConfig | None:
    try:
        return load_run_config(None, as_flags(run))
    except ConfigError:
        return None


def _is_small(config: RunConfig, trial: Trial) -> bool:
    """Whether two steps take seconds, in the places and on the data of the trial."""
    base, training = tiny(trial.folder / "run"), config.training
    same_places = (config.data.path, config.output) == (base.data.path, base.output)
    vocabulary = config.model.overrides.get("vocab_size", 300)
    tokens = training.global_batch_size * config.data.seq_len
    return (
        same_places
        and config.checkpoint.resume in ("auto", "never")
        and (training.max_steps, training.max_tokens, training.init_from) == (2, None, None)
        and training.compile is not True
        and not config.log.trackers
        and not config.optimizer.options  # whatever a class takes: known when it is made
        and vocabulary >= 300
        and tokens <= 4096
        and config.data.num_workers <= 2
        and (config.eval.max_documents or 0) <= 8
        and config.eval.batch_size <= 64
        and config.model.overrides.get("max_position_embeddings", 4096) >= config.data.seq_len
        and _build(config) < 4_000_000
    )


def _cases() -> list[tuple[str, str]]:
    """Every key with values of wrong types and, where it has a range, from outside it."""
    cases = []
    for path, field in leaves(RunConfig).items():
        key = ".".join(map(str, path))
        wrong = ["[[1]]", ".nan", "1e999", "-.inf"]
        wrong += [] if key == "optimizer.options" else ["{a: [1]}"]
        kinds = str(field.annotation)
        wrong += [] if "str" in kinds or "Path" in kinds else ["text", "'1'"]
        wrong += [] if "bool" in kinds or "Literal" in kinds else ["true"]
        wrong += ["nonsense"] if "Literal" in kinds else []
        wrong += [] if type(None) in get_args(field.annotation) else ["null"]
        for name, bound in _bounds(field):
            wrong.append(str(bound - 1 if name in ("ge", "gt") else bound + 1))
            wrong += [str(bound)] if name in ("gt", "lt") else []
        cases += [(key, value) for value in dict.fromkeys(wrong)]
    return cases


def _bounds(field: Any) -> list[tuple[str, int | float]]:
    """The limits of a field, also of those inside a union or a list."""
    found, kinds = list(field.metadata), [field.annotation]
    while kinds:
        kind = kinds.pop()
        found += getattr(kind, "__metadata__", ())
        found += [part for entry in found for part in getattr(entry, "metadata", ())]
        kinds += [argument for argument in get_args(kind) if not isinstance(argument, str)]
    limits = [entry for entry in found if isinstance(entry, Ge | Gt | Le | Lt)]
    return [
        (name, getattr(limit, name))
        for limit in limits
        for name in ("ge", "gt", "le", "lt")
        if hasattr(limit, name)
    ]


CASES = _cases()


@bar("K3", "every key with every wrong type and each bound passed: refused by name",
     total=len(CASES), ci=60)  # fmt: skip
def every_key(trial: Trial) -> None:
    key, value = CASES[trial.index]
    by_file = trial.rng.random() < 0.5
    run = {name: v for name, v in _base(trial).items() if not name.startswith(f"{key}.")}
    said, config = _check(trial, {**run, key: value}, by_file)
    assert config is None, f"{key}={value} is accepted"
    check_refusal(said, (2,))
    named = any(key in line or (by_file and "run.yaml:" in line) for line in said.lines)
    assert named, f"{key} is not named: {said.err}"


@bar("K4", "file and flags give one run, whose resolved file reads back to the same hash",
     total=200, ci=30)  # fmt: skip
def one_meaning(trial: Trial) -> None:
    run = _base(trial)
    for _ in range(50):
        drawn = fitting(run, trial.rng)
        if _accepted(drawn) is not None:
            break
    else:
        raise AssertionError("no draw was accepted")
    path = trial.folder / "run.yaml"
    path.write_text(as_file(drawn), encoding="utf-8")
    by_file, by_flags = load_run_config(path), load_run_config(None, as_flags(drawn))
    assert by_file == by_flags
    keys = sorted(drawn)
    half = {key: drawn[key] for key in keys[::2]}
    path.write_text(as_file({key: drawn[key] for key in keys[1::2]}), encoding="utf-8")
    assert load_run_config(path, as_flags(half)) == by_flags
    path.write_text(by_flags.to_yaml(), encoding="utf-8")
    again = load_run_config(path)
    assert again == by_flags
    assert again.fingerprint() == by_flags.fingerprint() == by_file.fingerprint()
