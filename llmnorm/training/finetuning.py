"""Fine-tuning with a loop that is not ours: TRL's. `train/sft.py` puts these parts together.

transformers' Trainer and what stands on it (TRL, PEFT) know a loss, its gradients and an
optimizer's step. `check_foreign_loop` refuses the schemes that need more.
"""

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmnorm.config.problems import one_line
from llmnorm.errors import ConfigError, DataError, EnvironmentProblem, LlmNormError
from llmnorm.modeling.weights import WeightSpec
from llmnorm.training.optimizer import linear_matrices

logger = logging.getLogger(__name__)

# A turn is a line with its role, then its text; end-of-text ends an answer, as it ends a text in
# pretraining. `generation` marks what --assistant_only_loss trains.
CHAT_TEMPLATE = (
    "{{ bos_token or eos_token }}{% for message in messages %}"
    "{{ '<|' ~ message['role'] ~ '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_CONSTRAINED = ("unit", "project", "lawn")  # by what our trainer does after each step
_ROWS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"text"}, {"input_ids"})
_CHATS = ("messages", "conversations", "prompt", "completion")  # columns that may hold turns
_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.xz", ".jsonl.zst")


def needed(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        EnvironmentProblem: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{package} cannot be imported ({one_line(str(error))});"
            f" install it with: pip install 'llmnorm[{extra}]'"
        ) from error


@contextmanager
def setting_up() -> Iterator[None]:
    """Turn whatever a library says of settings and rows into one line.

    Raises:
        ConfigError: for every error inside that is not ours.
    """
    try:
        with warnings.catch_warnings():
            # PEFT and TRL use names that transformers changes.
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")
            yield
    except LlmNormError:
        raise
    except Exception as error:  # libraries raise anything, from KeyError to jinja2's own
        reason = one_line(str(error))
        raise ConfigError(f"{reason} ({type(error).__name__}; --debug shows where)") from error


def read_rows(sources: Sequence[str], text_field: str = "text") -> Any:
    """Open a dataset of chats, answers or texts.

    Args:
        sources: jsonl files, or one hub name, of which the split `train` is read.
        text_field: the column that holds a text.

    Raises:
        DataError: it cannot be read, is empty, or its rows are none that can be trained on.
    """
    import datasets

    files = [source for source in sources if source.endswith(_FILES)]
    if files and len(files) != len(sources):
        other = next(source for source in sources if source not in files)
        raise DataError(f"{other} is no jsonl file but stands beside some; expected files alone")
    absent = [file for file in files if not Path(file).is_file()]
    if absent:
        raise DataError(f"{absent[0]} does not exist; expected a jsonl file")
    if not files and len(sources) > 1:
        raise DataError(f"{' '.join(sources)} are not jsonl files; expected files, or one hub name")
    name, what = ("json", {"data_files": files}) if files else (sources[0], {})
    try:
        rows = datasets.load_dataset(name, split="train", **what)
    except Exception as error:  # a loader of anyone's may raise anything
        reason = one_line(str(error.__cause__ or error))
        raise DataError(f"{' '.join(sources)} cannot be read: {reason}") from error
    columns = set(rows.column_names)
    if not len(rows) or not any(needs <= columns for needs in (*_ROWS, {text_field})):
        raise DataError(
            f"{' '.join(sources)} has {len(rows)} rows of {', '.join(sorted(columns))}; "
            "expected messages, or prompt and completion, or text"
        )
    return rows


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], eos_token: str | None = None
) -> None:
    """Give a tokenizer what the rows need: an end-of-text token, for chats a template (ours).

    Raises:
        ConfigError: it has no end-of-text token, with which answers end.
        DataError: the turns of a chat have no role or no content.
    """
    if eos_token is not None and eos_token not in tokenizer.get_vocab():
        raise ConfigError(f"--eos_token {eos_token} is not a token of the model's tokenizer")
    tokenizer.eos_token = eos_token or tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer names no end-of-text token; name one with --eos_token")
    chats = [chat for key in _CHATS if isinstance(chat := row.get(key), list)]
    for turn in chain(*chats):
        if not ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)):
            raise DataError(f"a turn of the first chat is {turn!r:.80}; expected role and content")
    if chats and tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        logger.info("the tokenizer has no chat template; it gets that of %s", __name__)


def check_output(folder: str) -> None:
    """Refuse to write a model over a model or a run.

    Raises:
        ConfigError: the folder holds either.
    """
    held = [name for name in ("config.json", "config.yaml") if (Path(folder) / name).exists()]
    if held:
        raise ConfigError(f"{folder} already holds {held[0]}; choose another --output_dir")


def check_foreign_loop(model: PreTrainedModel, *, adapters: bool = False) -> None:
    """Refuse a model whose scheme needs more than a loss and an optimizer.

    Args:
        model: a causal language model; in stock classes there is nothing to refuse.
        adapters: whether low-rank adapters are trained, which are later added to the matrices.

    Raises:
        ConfigError: naming what the loop would leave out, or the adapters would break.
    """
    kind = WeightSpec.parse(getattr(model.config, "weights", "plain")).kind
    if kind in _CONSTRAINED:
        raise ConfigError(
            f"the model's weights are {kind!r}: its matrices must be corrected after each step, "
            "which TRL's trainer does not do; train it with train/pretrain.py"
        )
    moving = {type(module).__name__ for module in model.modules() if hasattr(module, "after_step")}
    if moving:
        raise ConfigError(
            f"the model's {', '.join(sorted(moving))} moves after each step, for which TRL's "
            "trainer does not call it; train it with train/pretrain.py"
        )
    head, after = model.get_output_embeddings(), getattr(model, "logits", nn.Identity())
    if type(head) is not nn.Linear or not isinstance(after, nn.Identity):
        raise ConfigError(
            "the model's logits are more than its head's product with the hidden states, which is "
            "all that TRL computes its loss from; train it with train/pretrain.py"
        )
    if adapters and kind == "weight_norm":
        raise ConfigError(
            "the model's weights are 'weight_norm', which rescales rows, so that a trained adapter "
            "cannot be added to them; train all weights: leave --lora_rank out"
        )


def adapters(rank: int) -> Any:
    """LoRA of this rank on every linear layer but the head, for TRL; None for rank 0."""
    if rank == 0:
        return None
    peft = needed("peft", "sft")
    return peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def train(trainer: Any) -> None:
    """Run TRL's trainer and write the model, its adapters merged, with the tokenizer.

    What is decayed is what ours decays; Trainer goes by names and would decay our gains.

    Raises:
        ConfigError: adapters under an engine that shards the model, which cannot merge them.
    """
    merges = hasattr(trainer.model, "merge_and_unload")
    if merges and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(
            "adapters are merged into whole matrices, and this engine shards them; use "
            "configs/accelerate/ddp.yaml, or leave --lora_rank out"
        )
    trainer.get_decay_parameter_names = lambda model: sorted(linear_matrices(model))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if merges:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model()
    if trainer.args.should_save:  # a pickle, which nothing here reads
        (Path(trainer.args.output_dir) / "training_args.bin").unlink(missing_ok=True)
    logger.info("the fine-tuned model is in %s", trainer.args.output_dir)
