"""Check a run before it is started: configuration, files, memory, disk, time. Nothing is built.

Memory is found by running one step on tensors without memory; all engines are shown, the verdict
is about the one asked for, on the machine here. Exit code 0 when all is well; otherwise that of the
first problem: 2 the configuration, 3 the machine (it does not fit), 4 the data, 5 a checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from llmnorm.config import RunConfig, add_run_file, load_run_config
from llmnorm.config.problems import one_line
from llmnorm.errors import ConfigError, EnvironmentProblem, LlmNormError
from llmnorm.planning.checks import Checks
from llmnorm.planning.forecast import Launch, Subject, forecast
from llmnorm.planning.launcher import from_file, from_options
from llmnorm.planning.machine import RESERVE, Machine, this_machine
from llmnorm.planning.report import show, size
from llmnorm.training.assembly import Plan, make_plan
from llmnorm.training.engines.memory import ENGINES
from llmnorm.training.precision import Precision, decide_precision

_MOST_WIDTH, _MOST_TOKENS = 1024, 512  # of the trial by which `auto` chooses a CPU's precision
_WIDTH = 110  # columns of the table where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run file and how it would be launched."""
    add_run_file(parser)
    parser.add_argument("--processes", type=int, help="number of processes (default 1)")
    parser.add_argument("--engine", choices=ENGINES, help="default: plain, or ddp for several")
    parser.add_argument("--accelerate", type=Path, help="a file of configs/accelerate/ instead")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--resolve", action="store_true", help="only print the run file with all its keys"
    )


def run(args: argparse.Namespace) -> int:
    """Print what the run will need, and every problem in one line."""
    config = load_run_config(args.config, args.overrides)
    if args.resolve:
        sys.stdout.write(config.to_yaml())
        return 0
    launch = _launch(args)
    checks = Checks(config)
    problems = checks.problems
    if checks.model_config is not None:
        machine, plan = this_machine(), make_plan(config, launch.world)
        subject = Subject(
            config=config,
            model_config=checks.model_config,
            plan=plan,
            launch=launch,
            precision=_precision(config, plan, checks.model_config.hidden_size, machine),
            machine=machine,
        )
        try:
            record = {"start": checks.start, **forecast(subject)}
            record["memory"]["reserve"] = RESERVE[machine.device.type]
            problems = [*problems, *_misfits(record, config)]
            _print(record, problems, as_json=args.json)
        except LlmNormError as refusal:  # of the engine, in its own words
            problems = [*problems, refusal]
    for problem in problems[1:]:
        sys.stderr.write(one_line(str(problem)) + "\n")
    if problems:
        raise problems[0]
    return 0


def _launch(args: argparse.Namespace) -> Launch:
    if args.accelerate is None:
        return from_options(args.engine, args.processes)
    if args.engine is not None:
        raise ConfigError("--engine and --accelerate both name an engine; give one of them")
    return from_file(args.accelerate, args.processes)


def _precision(config: RunConfig, plan: Plan, hidden_size: int, machine: Machine) -> Precision:
    """As the run decides, but for a smaller trial on wide models."""
    return decide_precision(
        config.training.precision,
        machine.device,
        hidden_size=min(hidden_size, _MOST_WIDTH),
        tokens=min(plan.micro_batch_size * config.data.seq_len, _MOST_TOKENS),
    )


def _misfits(record: dict[str, Any], config: RunConfig) -> list[LlmNormError]:
    """Return what of the forecast the machine here does not have."""
    problems: list[LlmNormError] = []
    memory, disk, ram = record["memory"], record["disk"], record["ram"]
    sizes = memory["engines"][record["engine"]]
    if not sizes["fits"]:
        problems.append(
            EnvironmentProblem(
                f"does not fit: {record['engine']} needs {size(sizes['peak'])} a rank, "
                f"{memory['device']} has room for {size(memory['room'])}; lower "
                "training.micro_batch_size, set training.activation_checkpointing, or shard more"
            )
        )
    if not ram["fits"]:
        problems.append(
            EnvironmentProblem(
                f"does not fit: {ram['ranks_here']} ranks each build {size(ram['building'])} in "
                f"RAM, here are {size(ram['total'])}; start fewer ranks on a machine"
            )
        )
    if not disk["fits"]:
        problems.append(
            EnvironmentProblem(
                f"output.dir={config.output.dir}: the run writes {size(disk['needed'])}, free are "
                f"{size(disk['free'])}; make room, lower checkpoint.keep or choose another disk"
            )
        )
    return problems


def _print(record: dict[str, Any], problems: list[LlmNormError], *, as_json: bool) -> None:
    if as_json:
        named = [{"code": problem.exit_code, "problem": str(problem)} for problem in problems]
        sys.stdout.write(json.dumps({**record, "problems": named}, indent=1) + "\n")
        return
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = _WIDTH
    show(record, console)
    if not problems:
        console.print("all checks passed: the run can start", markup=False)
