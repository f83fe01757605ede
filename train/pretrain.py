"""Pretrain a language model.

    accelerate launch train/pretrain.py --config quickstart --output.dir runs/first
    accelerate launch --config_file configs/accelerate/ddp.yaml train/pretrain.py \
        --config configs/pretrain/130m.yaml --model.placement.name mix_ln --optimizer.lr 1e-3

Every key of the run file may follow as `--section.key VALUE`; `--help` lists them. The launcher's
file decides how many processes run, the run file everything that changes numbers. A run that was
killed or stopped continues when the same command is given again.
"""

from llmnorm.cli import run_command, run_main
from llmnorm.training import command


def main(words: list[str]) -> int:
    """Train as the words say."""
    return run_command(command, "train/pretrain.py", words)


if __name__ == "__main__":
    run_main(main)
