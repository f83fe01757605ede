"""What must be there before a run: data, weights, checkpoints, a free run directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmnorm.build import build_config
from llmnorm.calibration import assumed
from llmnorm.config import RunConfig
from llmnorm.config.start import read_config
from llmnorm.data import Mixture, open_mixture
from llmnorm.data.batches import samples_in
from llmnorm.errors import LlmNormError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.training.assembly import model_config
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.directory import RunDirectory
from llmnorm.training.distillation import TEACHER, check_vocabularies
from llmnorm.training.ranks import Ranks
from llmnorm.training.start import check_tokenizer, started_config
from llmnorm.training.weights import check_weights


class Checks:
    """Looks at everything, remembers all that is wrong, and goes on with what is left.

    Args:
        config: the run file.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.problems: list[LlmNormError] = []
        self.data: Mixture | None = self._try(self._open_data)
        self.model_config: LlmNormConfig | None = self._try(self._find_shape)
        self.start: str = self._try(self._find_start) or "unknown"
        self._try(self._check_teacher)

    def _try(self, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except LlmNormError as error:
            self.problems.append(error)
            return None

    def _open_data(self) -> Mixture:
        """Open the data; sizes are compared with the manifests, hashes when the run begins."""
        config = self.config
        data = open_mixture(config.data.sources, verify=False)
        for folder in data.folders:
            samples_in(folder.split("train"), config.data.seq_len)
        return data

    def _find_shape(self) -> LlmNormConfig:
        """Without data the preset's vocabulary stands for it."""
        folder, seq_len = self.config.model.start_folder, self.config.data.seq_len
        if self.data is not None:
            vocab_size, eos = self.data.vocab_size, self.data.eos_token_id
        elif folder is not None:
            return started_config(folder, vocab_size=1, eos_token_id=None, seq_len=seq_len)
        else:
            vocab_size, eos = build_config(**self.config.model.build_arguments()).vocab_size, 0
        return model_config(self.config, vocab_size=vocab_size, eos_token_id=eos)

    def _find_start(self) -> str:
        """Say where the run would begin; look at the weights or checkpoint that it begins from."""
        config, directory = self.config, RunDirectory(self.config.output.dir)
        if directory.path.is_dir():
            directory.check(config)
        if directory.final.is_dir():
            return f"{directory.path} is finished: nothing would be trained"
        found = self._find_checkpoint(directory)
        if found is not None:
            return f"continues from {found}"
        weights = config.start_folder
        if weights is None:
            return "a new run"
        if config.model.start_folder is not None and self.data is not None:
            check_tokenizer(config.model.start_folder, self.data)
        if self.model_config is not None:
            with torch.device("meta"):
                model = LlmNormForCausalLM(assumed(self.model_config))
            check_weights(model, weights, key=config.start_key)
        return f"a new run with the weights of {weights}"

    def _check_teacher(self) -> None:
        """Look at the teacher's weights, vocabulary and tokenizer."""
        folder = self.config.distill.teacher_folder
        if folder is None:
            return
        with torch.device("meta"):
            teacher = LlmNormForCausalLM(read_config(folder))
        check_weights(teacher, folder, key=TEACHER)
        if self.model_config is not None:
            check_vocabularies(teacher.config, self.model_config)
        if self.data is not None:
            check_tokenizer(folder, self.data, key=TEACHER)

    def _find_checkpoint(self, directory: RunDirectory) -> Path | None:
        if self.data is None:
            return None
        facts = {"config": self.config.fingerprint(), "data": self.data.fingerprint}
        alone = Ranks(0, 1, torch.device("cpu"))
        asked = self.config.checkpoint.resume
        checkpoints = Checkpoints(directory.checkpoints, alone, facts=facts)
        return checkpoints.choose(None if asked in ("auto", "never") else Path(asked))
