"""Score a causal language model on lm-eval tasks, each beside its chance level.

    accelerate launch eval/harness.py --model runs/mine --tasks blimp,lambada_openai
    accelerate launch eval/harness.py --model runs/mine --tasks my_task --include-path my_tasks

One JSON on stdout, and in the run's eval/. `llmnorm eval harness` does the same on one process.
"""

from llmnorm.cli import run_command, run_main
from llmnorm.evaluation.commands import harness

if __name__ == "__main__":
    run_main(lambda words: run_command(harness, "eval/harness.py", words))
