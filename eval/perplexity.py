"""Score a causal language model on documents, exactly.

    accelerate launch eval/perplexity.py --model runs/mine --data data/python-stdlib
    accelerate launch --num_processes 8 eval/perplexity.py --model allenai/OLMo-2-0425-1B \
        --data book.txt --seq-len 2048 --stride 1024 --dtype bf16 --out olmo.json

One JSON on stdout, and in the run's eval/. `llmnorm eval perplexity` does the same on one process.
"""

from llmnorm.cli import run_command, run_main
from llmnorm.evaluation.commands import perplexity

if __name__ == "__main__":
    run_main(lambda words: run_command(perplexity, "eval/perplexity.py", words))
