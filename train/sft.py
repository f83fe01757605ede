"""Fine-tune a model on chats, answers or texts with TRL's SFTTrainer.

    accelerate launch train/sft.py --model runs/mix_ln --data chats.jsonl --output_dir runs/chat
    accelerate launch train/sft.py --model runs/mix_ln --data trl-lib/Capybara --lora_rank 16 \\
        --packing true --assistant_only_loss true --output_dir runs/chat-lora

DATA is a hub name or jsonl files; rows have `messages`, or `prompt` and `completion`, or `text`.
The other flags are SFTConfig's, with its defaults but for max_length: by default what the model was
trained with. The result is a Hugging Face folder, adapters merged. Needs the extra `sft`.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from llmnorm.cli import Parser, run_main
from llmnorm.evaluation.loading import load
from llmnorm.training import finetuning as parts

USAGE = "train/sft.py --model MODEL --data DATA [DATA ...] [FLAG ...]"


@dataclass
class Arguments:
    model: str = field(metadata={"help": "a run, a Hugging Face folder or a hub name"})
    data: list[str] = field(metadata={"help": "jsonl files, or a hub name"})
    eval_data: list[str] | None = field(default=None, metadata={"help": "rows for --eval_strategy"})
    lora_rank: int = field(default=0, metadata={"help": "adapters on all linear layers; 0: none"})


class Flags(Parser, HfArgumentParser):
    """The fields of dataclasses as flags; complaints are one line."""


def main(words: list[str]) -> None:
    """Fine-tune as the words say."""
    trl = parts.needed("trl", "sft")
    flags = Flags(dataclass_types=[Arguments, trl.SFTConfig], prog="train/sft.py", usage=USAGE)
    flags.set_defaults(max_length=None, use_cpu=not torch.accelerator.is_available())
    with parts.setting_up():
        given, config = flags.parse_args_into_dataclasses(words, look_for_args_file=False)
        parts.check_output(config.output_dir)
        loaded, rows = load(given.model, dtype="fp32"), parts.read_rows(given.data)
        parts.check_foreign_loop(loaded.model, adapters=given.lora_rank > 0)
        parts.prepare_tokenizer(loaded.require_tokenizer(), rows[0], config.eos_token)
        config.max_length = config.max_length or loaded.seq_len(None)
        trainer = trl.SFTTrainer(
            loaded.model,
            config,
            train_dataset=rows,
            eval_dataset=parts.read_rows(given.eval_data) if given.eval_data else None,
            processing_class=loaded.tokenizer,
            peft_config=parts.adapters(given.lora_rank),
        )
    parts.train(trainer)


if __name__ == "__main__":
    run_main(main)
