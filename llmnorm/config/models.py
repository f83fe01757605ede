"""The run file as strict pydantic models: every key, its type, its range, its default.

Descriptions are what `--help` prints. Checks that need two keys of a section stand beside the
later key, so that they are reported together with all other errors of the file. What needs the
scheme registry (names and options of norms and placements) is asked of `choices.py`.
"""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from llmnorm.config.dump import dump_document
from llmnorm.config.fields import Count, CountOrFraction, LocalPath, Positive, Section, Size
from llmnorm.config.model_section import ModelSection
from llmnorm.config.start import model_folder, read_config
from llmnorm.resources import shape_folder, suggest
from llmnorm.safe_files import read_json


class MixedFolder(Section):
    """One folder of `data.mix`."""

    path: LocalPath
    weight: float = Field(gt=0)


class DataSection(Section):
    """What is read: a folder that `llmnorm data prepare` made, or several with weights."""

    mix: list[MixedFolder] | None = Field(
        None,
        min_length=1,
        description="several folders, [{path: A, weight: 0.7}, ...]: shares of the sequences",
    )
    path: LocalPath | None = Field(
        None, description="prepared data folder (from `llmnorm data prepare`); this or data.mix"
    )
    seq_len: Size = Field(description="sequence length in tokens")
    document_mask: bool = Field(False, description="attend within documents only")
    num_workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="worker processes that read ahead; 0 reads inline"
    )

    @field_validator("path")
    @classmethod
    def _path_or_mix(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        mixed = info.data.get("mix", [])  # not there when it has an error of its own
        if value is None and mixed is None:
            raise PydanticKnownError("missing")
        if value is not None and mixed:
            raise ValueError("data.mix names folders too; give one of the two")
        return value

    @property
    def sources(self) -> list[tuple[Path, float]]:
        """Every folder with its weight."""
        if self.mix is not None:
            return [(folder.path, folder.weight) for folder in self.mix]
        assert self.path is not None
        return [(self.path, 1.0)]


class OptimizerSection(Section):
    """How weights are updated."""

    name: str = Field("adamw", description="adamw, muon, or a class as package.module:Class")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of linear layers' matrices")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.95], min_length=2, max_length=2, description="Adam's decay rates of the moments"
    )
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    options: dict[str, Any] = Field(
        {}, description="further keyword arguments of the optimizer, e.g. momentum for muon"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("adamw", "muon"):
            return value
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            hint = suggest(value, ["adamw", "muon"])
            raise ValueError(f"expected adamw, muon or package.module:Class{hint}")
        package = value.partition(".")[0].partition(":")[0]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package!r} is not installed; pip install it")
        return value


class ScheduleSection(Section):
    """How the learning rate moves over the run's horizon."""

    name: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="shape after warm-up (wsd: constant, then linear decay)"
    )
    warmup_steps: CountOrFraction = Field(
        0.05, description="linear warm-up: a count of steps, or a fraction of the run below 1"
    )
    final_lr_fraction: float = Field(
        0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak"
    )
    decay_steps: CountOrFraction | None = Field(
        None, description="wsd only: a count, or a fraction of the run (unset means 0.2)"
    )

    @field_validator("decay_steps")
    @classmethod
    def _wsd_decays(cls, value: int | float | None, info: ValidationInfo) -> int | float | None:
        name = info.data.get("name")
        if value is not None and name not in (None, "wsd"):
            raise ValueError(f"only the wsd schedule has a decay phase, this one is {name}")
        return 0.2 if value is None and name == "wsd" else value


class TrainingSection(Section):
    """How long, how much at once, and in what arithmetic."""

    max_steps: Positive | None = Field(
        None, description="optimizer steps; this or max_tokens is required, the earlier ends"
    )
    max_tokens: Positive | None = Field(None, description="tokens to train on, over all ranks")
    global_batch_size: Size = Field(description="sequences in one optimizer step, all ranks")
    micro_batch_size: Size | None = Field(
        None, description="sequences at once on one rank (unset: a rank's whole share)"
    )
    seed: Count = Field(0, description="seed of initial weights and data order")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic of matrix products; weights stay fp32"
    )
    compile: Literal["auto", True, False] = Field(
        "auto", description="torch.compile each block (auto: where it is likely to pay)"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, more time"
    )
    clip_norm: float = Field(1.0, ge=0, description="clip the gradient's global norm; 0 is off")
    init_from: LocalPath | None = Field(
        None, description="start a new run from the weights of this Hugging Face folder"
    )

    @field_validator("max_tokens")
    @classmethod
    def _ends(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("max_steps", 1) is None:
            raise ValueError("nothing ends the run; give training.max_steps or training.max_tokens")
        return value

    @field_validator("micro_batch_size")
    @classmethod
    def _fits_global(cls, value: int | None, info: ValidationInfo) -> int | None:
        whole = info.data.get("global_batch_size")
        if value is not None and whole is not None and value > whole:
            raise ValueError(f"more than training.global_batch_size, which is {whole}")
        return value


class DistillSection(Section):
    """What a run learns from beside the text: the predictions of a finished model."""

    teacher: LocalPath | None = Field(
        None,
        description="learn from this finished model too, a run or a Hugging Face folder of ours; "
        "every rank holds it whole",
    )
    weight: float = Field(
        1.0, gt=0, le=1, description="share of the teacher in the loss; 1 is the teacher alone"
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="divides both models' logits before they are compared"
    )

    @field_validator("teacher")
    @classmethod
    def _there(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_config(model_folder(value))
        return value

    @property
    def teacher_folder(self) -> Path | None:
        """The Hugging Face folder that `teacher` means."""
        return None if self.teacher is None else model_folder(self.teacher)


class EvalSection(Section):
    """Validation while training; it changes no weight."""

    interval_steps: Count = Field(0, description="steps between validations; 0 is at the end only")
    max_documents: Positive | None = Field(None, description="documents scored (unset: all)")
    batch_size: Size = Field(8, description="windows scored at once on one rank")


class CheckpointSection(Section):
    """What is kept, and where a run begins."""

    interval_steps: Count = Field(0, description="steps between checkpoints; 0 is at the end only")
    keep: Positive = Field(2, description="newest checkpoints kept")
    stop_at_step: Count = Field(
        0, description="save and leave after this step with exit code 75; 0 is never"
    )
    overlap: bool = Field(
        True, description="train on while a checkpoint is written, from a copy in CPU memory"
    )
    resume: str = Field(
        "auto", description="auto continues the run in output.dir, never refuses, or a PATH"
    )

    @field_validator("resume")
    @classmethod
    def _there(cls, value: str) -> str:
        if value in ("auto", "never"):
            return value
        if not os.path.isdir(os.path.expanduser(value)):
            raise ValueError("expected auto, never or the folder of a checkpoint that exists")
        return os.path.expanduser(value)


class FaultsSection(Section):
    """What a run bears, and how long it waits."""

    max_bad_steps: Positive = Field(
        5, description="steps in a row with a loss or gradient that is not finite, then it ends"
    )
    spike_sigma: float = Field(
        6.0, ge=0, description="report loss or gradient norm so far above its mean; 0 is off"
    )
    spike_window: int = Field(
        128, ge=8, le=100_000, description="steps whose mean and deviation spikes are judged by"
    )
    meet_seconds: Positive | None = Field(
        None, description="wait for all processes to come (unset: 20, on several machines 300)"
    )
    start_seconds: Positive = Field(
        3600, description="without progress until the first step is done, or while saving"
    )
    hang_seconds: Positive = Field(
        120, description="without progress of a process among several, then all end"
    )


class LogSection(Section):
    """Where numbers are shown beside metrics.jsonl, which is always written."""

    interval_steps: Positive = Field(10, description="steps between printed lines")
    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = Field(
        [], description="also log to these (each needs its package)"
    )


class OutputSection(Section):
    """Where the run lives."""

    dir: LocalPath = Field(description="the run directory itself")


class RunConfig(Section):
    """A whole run. `to_yaml` writes it so that `load_run_config` reads it back equal."""

    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    training: TrainingSection
    distill: DistillSection
    eval: EvalSection
    checkpoint: CheckpointSection
    faults: FaultsSection
    log: LogSection
    output: OutputSection

    @field_validator("training")
    @classmethod
    def _one_start(cls, value: TrainingSection, info: ValidationInfo) -> TrainingSection:
        model = info.data.get("model")
        if value.init_from is not None and model is not None and model.start is not None:
            raise ValueError("init_from and model.start both name weights; give one of the two")
        return value

    @property
    def start_folder(self) -> Path | None:
        """The Hugging Face folder whose weights the run begins with; None for fresh ones."""
        return self.model.start_folder or self.training.init_from

    @property
    def start_key(self) -> str:
        """The key that names `start_folder`."""
        return "training.init_from" if self.model.start is None else "model.start"

    def weights_read(self) -> dict[str, Path]:
        """Return the folders, by key, whose weights a run that continues must find unchanged."""
        folders = {
            "model.start": self.model.start_folder,
            "distill.teacher": self.distill.teacher_folder,
        }
        return {key: folder for key, folder in folders.items() if folder is not None}

    def to_yaml(self) -> str:
        """Return the resolved run file: every key, with the value that the run uses."""
        return dump_document(self.model_dump(mode="json"))

    def numbers(self) -> dict[str, Any]:
        """Return the keys that change a run's numbers, as JSON.

        Not output, log, checkpoint, eval, faults; not how a step is computed (micro-batches,
        compilation, recomputation, workers), which may differ when a run continues elsewhere.
        """
        values = self.model_dump(mode="json", exclude=_FREE)
        if self.model.start is None:  # runs older than a key keep their fingerprint
            del values["model"]["start"]
        if self.distill == DistillSection.model_construct():
            del values["distill"]
        return values

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of `numbers`, with the preset's shape for its name.

        The fingerprints of the data, and of the weights that `model.start` and `distill.teacher`
        name, are recorded apart, so no path of theirs is in it.
        """
        values = self.numbers()
        assert self.model.preset is not None
        shape = shape_folder(self.model.preset) / "config.json"
        if self.model.start is not None:
            values["model"]["start"] = True
        if self.distill.teacher is not None:
            values["distill"]["teacher"] = True
        values["model"]["preset"] = read_json(shape)
        text = json.dumps(values, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


_FREE: dict[str, Any] = {
    **dict.fromkeys(("output", "log", "checkpoint", "eval", "faults"), True),
    "model": {"imports"},
    "data": {"path": True, "num_workers": True, "mix": {"__all__": {"path"}}},
    "training": {"micro_batch_size", "compile", "activation_checkpointing"},
}
