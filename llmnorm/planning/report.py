"""Show a forecast to a reader."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_PARTS = ("weights", "gradients", "moments", "buffers", "activations", "peak")
_NOT_COUNTED = (
    "Not counted: an allocator's fragmentation, what kernels and collectives allocate inside, what "
    "compilation saves. Room leaves {reserve} a rank for the interpreter, libraries and a GPU's "
    "context."
)


def show(record: dict[str, Any], console: Console) -> None:
    """Print the forecast as a few lines and a table."""
    for line in _facts(record):
        console.print(line, soft_wrap=True, markup=False)
    console.print(_table(record))
    for line in _needs(record):
        console.print(line, soft_wrap=True, markup=False)


def _facts(record: dict[str, Any]) -> list[str]:
    batch, counts = record["batch"], record["parameters"]
    padding = f", {batch['padding']} sequences of padding in each" if batch["padding"] else ""
    return [
        f"run         {record['start']}",
        f"parameters  {counts['total']:,} ({counts['non_embedding']:,} non-embedding)",
        f"steps       {batch['steps']:,} of {batch['global_batch_size']} sequences, "
        f"{batch['tokens']:,} tokens{padding}",
        f"a step is   {record['world']} x {batch['accumulation']} micro-batches of "
        f"{batch['micro_batch_size']} sequences, {record['precision']['name']}",
    ]


def _table(record: dict[str, Any]) -> Table:
    memory = record["memory"]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("memory per rank")
    for part in _PARTS:
        table.add_column(part, justify="right")
    table.add_column("")
    for name, sizes in memory["engines"].items():
        verdict = "fits" if sizes["fits"] else "refused" if "refused" in sizes else "does not fit"
        chosen = "this run: " if name == record["engine"] else ""
        parts = [size(sizes[part]) if part in sizes else "-" for part in _PARTS]
        table.add_row(f"{name} x {record['world']}", *parts, chosen + verdict)
    return table


def _needs(record: dict[str, Any]) -> list[str]:
    memory, disk, time, ram = record["memory"], record["disk"], record["time"], record["ram"]
    activations = memory["activations"]
    now = "with" if activations["activation_checkpointing"] else "without"
    then = "without" if now == "with" else "with"
    low, high = (duration(seconds) for seconds in time["seconds"])
    efficiency = "-".join(f"{share:.0%}" for share in time["efficiency"])
    return [
        f"room        {size(memory['room'])} a rank on {memory['device']}"
        + (f", of it {size(memory['teacher'])} for the teacher" if memory["teacher"] else ""),
        f"activations {size(activations['as_is'])} {now} activation_checkpointing, "
        f"{size(activations['otherwise'])} {then}; of it a chunk of logits "
        f"{size(memory['logits_chunk'])}; validation holds {size(memory['validation'])}",
        f"RAM         {ram['ranks_here']} x {size(ram['building'])} while the model is built"
        + (f", {size(ram['copy_for_saving'])} more while saving" if ram["copy_for_saving"] else "")
        + f"; here are {size(ram['total'])}",
        f"disk        a checkpoint takes {size(disk['checkpoint'])}, the run "
        f"{size(disk['needed'])}; free are {size(disk['free'])}",
        f"time        {low} to {high}, an estimate: {time['flops_per_token']:.3g} operations a "
        f"token at {efficiency} of {time['rate']:.3g}/s ({time['rate_from']})",
        _NOT_COUNTED.format(reserve=size(memory["reserve"])),
    ]


def size(count: int) -> str:
    """Return bytes as text, such as `5.26 MB` (decimal units)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def duration(seconds: float) -> str:
    """Return seconds as text, such as `3.5 h`."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"
