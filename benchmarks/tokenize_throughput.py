"""MB/s of `llmnorm data prepare` beside `tokenizers.encode_batch_fast` alone, on the same text.

    python benchmarks/tokenize_throughput.py                          # the standard library
    python benchmarks/tokenize_throughput.py --jsonl FILE.jsonl.gz    # another corpus

The bar is one call of `encode_batch_fast` on all documents, already in memory. `prepare` reads and
hashes the input, splits it, encodes it, writes shards and hashes them. The tokenizer is trained
before. The two are timed in turn, `--repeats` times; medians, spreads and the ratio (at least 0.7
is wanted) are written to `results/tokenize_throughput.json`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from record import spread, write_result

from llmnorm.data import PrepareOptions, prepare
from llmnorm.data.sources import Jsonl, PythonStdlib, Source
from llmnorm.data.tokenizer import Encoder, saved_tokenizer

WANTED = 0.7


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(source: Source, vocab_size: int, repeats: int, folder: Path) -> dict[str, object]:
    """Time both ways in turn; figures in MB of UTF-8 text a second."""
    prepare(source, folder / "tokenizer", PrepareOptions(vocab_size=vocab_size))
    options = PrepareOptions(tokenizer=str(folder / "tokenizer"))
    backend = Encoder(saved_tokenizer(folder / "tokenizer")).backend
    texts = [str(document.content) for document in source.documents()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encode_batch_fast: list[float] = []
    whole: list[float] = []
    for turn in range(repeats + 1):  # the first one warms up
        alone = seconds(lambda: backend.encode_batch_fast(texts, add_special_tokens=False))
        ours = seconds(lambda turn=turn: prepare(source, folder / f"{turn}", options))
        if turn:
            encode_batch_fast.append(megabytes / alone)
            whole.append(megabytes / ours)
    return {
        "corpus": source.corpus,
        "documents": len(texts),
        "megabytes": megabytes,
        "vocab_size": vocab_size,
        "repeats": repeats,
        "encode_batch_fast_mb_per_second": spread(encode_batch_fast),
        "prepare_mb_per_second": spread(whole),
        "ratio": statistics.median(whole) / statistics.median(encode_batch_fast),
        "wanted_ratio": WANTED,
    }


def main() -> None:
    """Measure, write the result and say it in a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jsonl", type=Path, help="text to use instead of the standard library")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    source = Jsonl(args.jsonl, text_column="text") if args.jsonl else PythonStdlib()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(source, args.vocab_size, args.repeats, Path(folder))
    headline = f"preparation runs at {figures['ratio']:.0%} of encode_batch_fast alone"
    path = write_result("tokenize_throughput", headline, figures)
    print(f"{headline}; see {path}")  # noqa: T201


if __name__ == "__main__":
    main()
