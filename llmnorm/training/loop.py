"""The training loop, from a run file to a finished model.

One story: open the run directory, build data and model, resume, step, validate, save, finish.
What moves numbers is elsewhere and small: `objective.py` (the loss), `engines/` (gradients and the
step), `optimizer.py`, `schedule.py`. Where a run can be lost: `saving.py`, `directory.py`.
"""

import logging
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from llmnorm.build import self_test
from llmnorm.config import RunConfig
from llmnorm.errors import LlmNormError
from llmnorm.evaluation.perplexity import score_documents
from llmnorm.training import assembly, environment
from llmnorm.training.checkpoint import Checkpoints, read_rng
from llmnorm.training.compiling import compile_blocks, decide_compile
from llmnorm.training.directory import RunDirectory, remember_start, tracker_config
from llmnorm.training.engines import Engine, MicroBatch, StepResult, choose_engine
from llmnorm.training.manifest import read_state
from llmnorm.training.metrics import Display, MetricsFile, Pace, Record, Reporter, open_trackers
from llmnorm.training.objective import IGNORED, Objective
from llmnorm.training.optimizer import describe_groups, make_optimizer
from llmnorm.training.precision import Precision, decide_precision, peak_flops
from llmnorm.training.rng import prefer_determinism, seed_generators
from llmnorm.training.saving import Saver
from llmnorm.training.signals import STOPPED_BY_SIGNAL, StopRequest

logger = logging.getLogger(__name__)

MOST_BAD_STEPS = 5
"""A run stops after so many steps in a row whose loss or gradient is not finite."""


class Diverged(LlmNormError):  # noqa: N818 (what happened to the run)
    """Loss or gradient was not finite for `MOST_BAD_STEPS` steps in a row."""

    exit_code = 6


def train(config: RunConfig) -> int:
    """Train as the run file says, continuing what its run directory holds.

    Returns:
        0 when the run is finished, `signals.STOPPED_BY_SIGNAL` when a signal stopped it.

    Raises:
        LlmNormError: in one line; the run directory's exit.json keeps code, step and cause.
    """
    engine = choose_engine()
    directory = RunDirectory(config.output.dir)
    with StopRequest() as stop:
        if engine.ranks.on_main(lambda: directory.open(config)):
            logger.info("run %s is finished: its model is %s", directory.path, directory.final)
            engine.finish(None)
            directory.close()
            return 0
        trainer = Trainer(config, engine, directory, stop)
        try:
            with directory.telling_when_full():
                code, cause = trainer.run()
            if engine.ranks.is_main:
                trainer.record_exit(code, cause)
        except Exception as error:
            kind = "" if isinstance(error, LlmNormError) else f"{type(error).__name__}: "
            trainer.record_exit(getattr(error, "exit_code", 1), f"{kind}{error}")
            raise
        finally:
            trainer.close()
        return code


class Trainer:
    """A run on one rank.

    Args:
        config: the run file.
        engine: holds the weights.
        directory: the run directory, opened and locked by rank 0.
        stop: set by signals.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, directory: RunDirectory, stop: StopRequest
    ) -> None:
        self.config = config
        self.engine = engine
        self.ranks = engine.ranks
        self.device = engine.ranks.device
        self.directory = directory
        self.stop = stop
        self.step = 0  # completed steps
        self.skipped = 0  # steps not applied since the run began
        self.bad_in_a_row = 0
        self.reporter: Reporter | None = None

    def run(self) -> tuple[int, str]:
        """Live the whole run; return exit code and cause."""
        self.build()
        self.resume()
        self.ranks.on_main(self.open_reporter)
        batches = assembly.make_batches(self.config, self.data, self.plan, self.ranks)
        begun = time.perf_counter()
        for micro_batches in islice(batches.iterate(self.step), self.plan.steps - self.step):
            result, stopping = self.take_step(micro_batches)
            if self.step == self.config.checkpoint.stop_at_step:
                stopping, self.stop.signal_name = True, "checkpoint.stop_at_step"
            record = self.record(result, time.perf_counter() - begun)
            if self.is_due(self.config.eval.interval_steps):
                record.update(self.validate())
            if self.reporter is not None:
                self.reporter.report(record)
            self.check_soundness(result)
            every = 0 if self.bad_in_a_row else self.config.checkpoint.interval_steps
            if stopping or self.is_due(every):  # a bad step displaces no earlier checkpoint
                self.save(last=stopping or self.step == self.plan.steps)
            if stopping and self.step < self.plan.steps:
                self.engine.finish(None)
                return STOPPED_BY_SIGNAL, self.stop.describe()
            begun = time.perf_counter()
        self.finish()
        return 0, "finished"

    def build(self) -> None:
        """Make data, plan, model and engine; find the checkpoint to continue from."""
        config, training = self.config, self.config.training
        seed_generators(training.seed + self.ranks.rank)  # dropout differs between ranks
        prefer_determinism(self.device)
        self.data = assembly.open_data(config, self.ranks)
        self.plan = assembly.make_plan(config, self.ranks.world)
        self.found = self.find_checkpoint()
        init_from = training.init_from if self.found is None else None
        self.model = assembly.make_model(config, self.data, init_from)
        start = environment.start_record(self.ranks)
        self.facts = self.ranks.on_main(
            lambda: remember_start(self.directory.environment_file, self.describe, start)
        )
        assembly.check_same_data(self.facts, self.data, self.directory.path)
        self.precision = Precision(**{**self.facts["precision"], "device_type": self.device.type})
        objective = Objective(self.model)
        if training.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        if self.ranks.on_main(lambda: decide_compile(training.compile, self.device)):
            compile_blocks(objective)
        self.engine.prepare(
            objective, lambda model: make_optimizer(model, config.optimizer), self.precision
        )
        self_test(self.model, fresh=init_from is None)
        self.model.train()

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from: the run's newest, or the one asked for."""
        facts = {"config": self.config.fingerprint(), "data": self.data.fingerprint}
        facts["engine"] = self.engine.name
        self.checkpoints = Checkpoints(self.directory.checkpoints, self.ranks, facts=facts)
        section = self.config.checkpoint
        self.saver = Saver(self.checkpoints, keep=section.keep, overlap=section.overlap)
        asked = section.resume
        return self.checkpoints.choose(None if asked in ("auto", "never") else Path(asked))

    def describe(self) -> dict[str, Any]:
        """Return what environment.json says of a run at its first start (rank 0)."""
        saved = {} if self.found is None else read_state(self.found)
        precision = decide_precision(
            saved.get("precision", self.config.training.precision),
            self.device,
            hidden_size=self.model.config.hidden_size,
            tokens=self.plan.micro_batch_size * self.config.data.seq_len,
        )
        return {
            **assembly.describe_run(self.config, self.data, self.plan, self.model),
            "optimizer": describe_groups(self.model, self.config.optimizer),
            "precision": asdict(precision),
        }

    def resume(self) -> None:
        """Take weights, optimizer, random states and counters from the checkpoint, if any."""
        if self.found is None:
            return
        self.engine.load_pieces(self.found)
        read_rng(self.found, self.ranks.rank)
        state = read_state(self.found)
        self.step = state["step"]
        self.skipped = state["skipped_steps"]
        self.bad_in_a_row = state["bad_in_a_row"]
        logger.info("continuing from %s", self.found)

    def open_reporter(self) -> None:
        """Open metrics.jsonl, display and trackers (rank 0)."""
        log = self.config.log
        trackers = open_trackers(log.trackers, self.directory.path, tracker_config(self.config))
        file = MetricsFile(self.directory.metrics_file, completed=self.step)
        display = Display(steps=self.plan.steps, completed=self.step, interval=log.interval_steps)
        self.reporter = Reporter(file, display, trackers)
        flops, source = peak_flops(self.device, self.precision)
        logger.info("MFU is relative to %.3g flop/s (%s)", flops, source)
        per_token = environment.flops_per_token(self.model, self.config.data.seq_len)
        self.pace = Pace(self.plan, per_token / (flops * self.ranks.world))

    def take_step(self, micro_batches: list[MicroBatch]) -> tuple[StepResult, bool]:
        """Do one optimizer step; return its outcome and whether some rank was told to stop."""
        own = sum(int((batch["targets"] != IGNORED).sum()) for batch in micro_batches)
        count, stopping, saving = self.ranks.sums(own, self.stop.requested, self.saver.busy)
        if not saving:
            self.saver.advance()
        loss_sum = self.engine.backward(micro_batches, count)
        factor, max_norm = self.plan.schedule(self.step), self.config.training.clip_norm
        result = self.engine.clip_and_step(
            loss_sum, count, factor=factor, max_norm=max_norm, step=self.step - self.skipped + 1
        )
        self.step += 1
        self.skipped += not result.applied
        self.bad_in_a_row = 0 if result.applied else self.bad_in_a_row + 1
        return result, stopping > 0

    def record(self, result: StepResult, seconds: float) -> Record:
        """Return the metrics of the step just taken."""
        record: Record = {
            "step": self.step,
            "tokens": self.step * self.plan.tokens_per_step,
            "train/loss": result.loss,
            "lr": self.config.optimizer.lr * self.plan.schedule(self.step - 1),
            "grad_norm": result.grad_norm,
            "skipped_steps": self.skipped,
        }
        if self.reporter is not None:
            record.update(self.pace.measure(self.step, seconds, self.device))
        return record

    def is_due(self, interval: int) -> bool:
        """Whether something done every `interval` steps (0: never) and at the end is due."""
        return self.step == self.plan.steps or (interval > 0 and self.step % interval == 0)

    def validate(self) -> Record:
        """Score the validation documents (of which there may be none) in the run's precision."""
        documents = self.data.validation_documents(self.config.eval.max_documents)
        if documents is None:
            return {}
        with self.precision.autocast():
            score = score_documents(
                self.model,
                documents,
                eos_token_id=self.data.eos_token_id,
                seq_len=self.config.data.seq_len,
                batch_size=self.config.eval.batch_size,
                rank=self.ranks.rank,
                world=self.ranks.world,
            )
        return {"val/loss": score.loss, "val/bits_per_byte": score.bits_per_byte}

    def check_soundness(self, result: StepResult) -> None:
        """Speak of a skipped step; stop after too many in a row.

        Raises:
            Diverged: naming the last checkpoint.
        """
        if result.applied:
            return
        logger.warning(
            "step %d skipped: loss %s, gradient norm %s; weights and optimizer are unchanged",
            *(self.step, result.loss, result.grad_norm),
        )
        if self.bad_in_a_row >= MOST_BAD_STEPS:
            self.saver.wait()
            last = next(iter(self.checkpoints.folders()), "none")
            raise Diverged(
                f"loss or gradient was not finite for {MOST_BAD_STEPS} steps in a row up to step "
                f"{self.step}; last checkpoint: {last}; start again with a lower optimizer.lr in "
                "another output.dir"
            )

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of the completed steps, metrics first; `last`: nothing follows."""
        first = (lambda: None) if self.reporter is None else self.reporter.file.sync
        state = {
            "step": self.step,
            "tokens": self.step * self.plan.tokens_per_step,
            "skipped_steps": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "precision": self.precision.name,
        }
        self.saver.save(self.step, self.engine.pieces(), state, first=first, last=last)

    def finish(self) -> None:
        """Write the Hugging Face folder `final/`: model and tokenizer."""
        self.engine.finish(self.directory.final_in_making)
        if self.ranks.is_main:
            self.data.tokenizer().save_pretrained(self.directory.final_in_making)
            self.directory.publish_final()
            logger.info("finished: the model is in %s", self.directory.final)

    def record_exit(self, code: int, cause: str) -> None:
        """Keep the exit code and its cause in exit.json, whatever a launcher makes of them."""
        self.directory.write_exit(code=code, step=self.step, cause=cause, rank=self.ranks.rank)

    def close(self) -> None:
        """Close files; let other runs into the directory."""
        if hasattr(self, "saver"):
            self.saver.close()
        if self.reporter is not None:
            self.reporter.close()
        self.directory.close()
