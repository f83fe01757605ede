"""Tokens/s of a training step beside transformers' Llama of the same shape, in one run.

    python benchmarks/training_throughput.py                 # debug shape, on this processor
    python benchmarks/training_throughput.py --preset 130m --batch 16 --seq 1024     # on a GPU

Both models take the same steps: forward, backward, AdamW; eager and compiled block by block; fp32
and bf16 autocast. The two are timed in turn, `--repeats` times; medians and their ratio are written
to `results/training_throughput.json`. Absolute figures of a shared processor say little: read the
ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from record import spread, write_result
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmnorm import build_config, build_model

SCHEMES = {
    "pre_ln+rmsnorm": ("rmsnorm", "pre_ln"),
    "peri_ln+rmsnorm": ("rmsnorm", "peri_ln"),
    "lns+rmsnorm": ("rmsnorm", "lns"),
    "pre_ln+derf": ("derf", "pre_ln"),
}
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def stepper(model: nn.Module, ids: torch.Tensor, *, compiled: bool, bf16: bool) -> Callable:
    """A function that takes one training step."""
    model.train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(models: dict[str, Callable[[], nn.Module]], ids, args, **mode) -> dict:
    """Tokens/s of every model in one mode, timed in turn."""
    torch._dynamo.reset()
    steps = {name: stepper(make().to(ids.device), ids, **mode) for name, make in models.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            rates[name].append(args.steps * ids.numel() / (time.perf_counter() - start))
    llama = statistics.median(rates["llama"])
    return {
        name: {"tokens_per_second": spread(r), "relative_to_llama": statistics.median(r) / llama}
        for name, r in rates.items()
    }


def main() -> None:
    """Measure every mode and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=5, help="steps a timing")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each model")
    parser.add_argument("--eager-only", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {f: getattr(build_config(args.preset), f) for f in SHAPE_FIELDS}
    ids = torch.randint(0, shape["vocab_size"], (args.batch, args.seq), device=device)
    models: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape))
    }
    for name, (norm, placement) in SCHEMES.items():
        config = build_config(args.preset, norm=norm, placement=placement)
        models[name] = lambda config=config: build_model(config)
    modes = {
        f"{'compiled' if compiled else 'eager'} {'bf16' if bf16 else 'fp32'}": measure(
            models, ids, args, compiled=compiled, bf16=bf16
        )
        for compiled in ([False] if args.eager_only else [False, True])
        for bf16 in (False, True)
    }
    figures = {"shape": shape, "batch": args.batch, "seq": args.seq, "modes": modes}
    ratio = modes["eager bf16"]["pre_ln+rmsnorm"]["relative_to_llama"]
    headline = (
        f"pre_ln+rmsnorm trains {ratio:.2f} times as fast as transformers' Llama (eager bf16)"
    )
    path = write_result(f"training_throughput_{device}", headline, figures)
    for mode, rows in modes.items():
        for name, row in rows.items():
            rate = row["tokens_per_second"]["median"]
            print(f"{mode:14} {name:16} {rate:12,.0f} {row['relative_to_llama']:6.2f}")  # noqa: T201
    print(path)  # noqa: T201


if __name__ == "__main__":
    main()
