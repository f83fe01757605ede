"""The training loop, from a run file to a finished model.

One story: open the run directory, build data and model, resume, step, validate, save, finish.
What moves numbers is elsewhere and small: `objective.py` (the loss), `engines/` (gradients and the
step), `optimizer.py`, `schedule.py`. Where a run can be lost: `saving.py`, `directory.py`.
"""

import logging
import time
from functools import partial
from pathlib import Path

from llmnorm.build import self_test
from llmnorm.config import RunConfig
from llmnorm.training import assembly, environment
from llmnorm.training.checkpoint import Checkpoints, read_rng
from llmnorm.training.compiling import compile_blocks, decide_compile
from llmnorm.training.directory import RunDirectory, remember_start, tracker_config
from llmnorm.training.endings import Ending
from llmnorm.training.engines import Engine, MicroBatch, StepResult, choose_engine
from llmnorm.training.manifest import read_state, reading
from llmnorm.training.metrics import Display, MetricsFile, Pace, Record, Reporter, open_trackers
from llmnorm.training.objective import IGNORED
from llmnorm.training.optimizer import make_optimizer
from llmnorm.training.precision import Precision, peak_flops
from llmnorm.training.ranks import meet
from llmnorm.training.rng import prefer_determinism, seed_generators
from llmnorm.training.saving import Saver
from llmnorm.training.signals import STOPPED_BY_SIGNAL, Stopping, StopRequest
from llmnorm.training.soundness import Soundness
from llmnorm.training.validation import score_validation
from llmnorm.training.watch import Watch

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train as the run file says, continuing what its run directory holds.

    Returns:
        0 when the run is finished, `signals.STOPPED_BY_SIGNAL` when a signal stopped it.

    Raises:
        LlmNormError: in one line; the run directory's exit.json keeps code, step and cause.
    """
    directory = RunDirectory(config.output.dir)
    with StopRequest() as stop:
        meeting = meet(str(directory.path), config.faults.meet_seconds)
        engine = choose_engine()
        del meeting  # the group has formed
        if directory.enter(config, engine.ranks):
            logger.info("run %s is finished: its model is %s", directory.path, directory.final)
            engine.finish(None)
            directory.close()
            return 0
        trainer = Trainer(config, engine, directory, stop)
        try:
            with directory.telling_when_full():
                code, cause = trainer.run()
            if engine.ranks.is_main:
                trainer.ending.record(code, cause)
        except Exception as error:
            trainer.ending.settle(error)
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
        self.unvalidated: Record | None = None  # of a step whose validation was cut short
        self.soundness = Soundness(config.faults)
        self.ending = Ending(directory, self.ranks, step=lambda: self.step)
        self.watch = Watch(directory, self.ranks, self.ending, stop, config.faults)
        self.reporter: Reporter | None = None

    def run(self) -> tuple[int, str]:
        """Live the whole run; return exit code and cause."""
        self.watch.begin()
        self.stop.leave_at_once(self.ending.leave)
        self.build()
        with reading(self.found):
            self.resume()
        self.ranks.on_main(self.open_reporter)
        try:
            self.continue_to_the_end()
        except Stopping:
            self.watch.tick("saving")
            self.save(last=True)
            self.engine.finish(None)
            return STOPPED_BY_SIGNAL, self.stop.describe()
        self.finish()
        return 0, "finished"

    def continue_to_the_end(self) -> None:
        """Take the remaining steps.

        Raises:
            Stopping: on all ranks, at a step boundary.
        """
        if self.unvalidated is not None:
            self.complete(self.unvalidated)
        batches = assembly.make_batches(self.config, self.data, self.plan, self.ranks)
        steps = batches.iterate(self.step)
        begun = time.perf_counter()
        for micro_batches in self.stop.waiting(steps, self.plan.steps - self.step):
            result = self.take_step(micro_batches)
            self.stop.stay()
            self.complete(self.record(result, time.perf_counter() - begun))
            if self.step == self.config.checkpoint.stop_at_step < self.plan.steps:
                self.stop.signal_name = "checkpoint.stop_at_step"
                raise Stopping
            self.watch.tick("data")
            begun = time.perf_counter()

    def complete(self, record: Record) -> None:
        """Do what is due after a step: validate, report, save."""
        self.unvalidated = record
        if self.is_due(self.config.eval.interval_steps):
            record.update(self.validate())
        self.unvalidated = None
        if self.reporter is not None:
            self.reporter.report(record)
        self.soundness.check(self.step, self.last_checkpoint)
        bad = self.soundness.bad_in_a_row  # a bad step displaces no earlier checkpoint
        if self.is_due(0 if bad else self.config.checkpoint.interval_steps):
            self.watch.tick("saving")
            self.save(last=self.step == self.plan.steps)

    def build(self) -> None:
        """Make data, plan, model and engine; find the checkpoint to continue from."""
        config, training = self.config, self.config.training
        seed_generators(training.seed + self.ranks.rank)  # dropout differs between ranks
        prefer_determinism(self.device)
        self.data = assembly.open_data(config, self.ranks)
        self.plan = assembly.make_plan(config, self.ranks.world)
        self.found = self.find_checkpoint()
        init_from = config.start_folder if self.found is None else None
        self.model = assembly.make_model(config, self.data, init_from)
        start = environment.start_record(self.ranks)
        parts = config, self.data, self.plan, self.model
        describe = partial(assembly.describe_run, *parts, self.device, self.found)
        remember = partial(remember_start, self.directory.environment_file, describe, start)
        self.facts = self.ranks.on_main(
            lambda: assembly.check_same_inputs(remember(), config, self.data)
        )
        self.precision = Precision(**{**self.facts["precision"], "device_type": self.device.type})
        self.objective = assembly.make_objective(config, self.model, self.data, self.device)
        self.objective.register_forward_pre_hook(lambda *_: self.watch.tick())
        if self.ranks.on_main(lambda: decide_compile(training.compile, self.device)):
            compile_blocks(self.objective)
        self.engine.prepare(
            self.objective, lambda model: make_optimizer(model, config.optimizer), self.precision
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

    def resume(self) -> None:
        """Take weights, optimizer, random states and counters from the checkpoint, if any."""
        if self.found is None:
            return
        self.engine.load_pieces(self.found)
        read_rng(self.found, self.ranks.rank)
        state = read_state(self.found)
        self.step = state["step"]
        self.soundness.load_state(state["soundness"])
        self.unvalidated = state["unvalidated"]
        logger.info("continuing from %s", self.found)

    def open_reporter(self) -> None:
        """Open metrics.jsonl, display and trackers (rank 0)."""
        log = self.config.log
        trackers = open_trackers(log.trackers, self.directory.path, tracker_config(self.config))
        file = MetricsFile(self.directory.metrics_file, self.step - bool(self.unvalidated))
        display = Display(steps=self.plan.steps, completed=self.step, interval=log.interval_steps)
        self.reporter = Reporter(file, display, trackers)
        flops, source = peak_flops(self.device, self.precision)
        logger.info("MFU is relative to %.3g flop/s (%s)", flops, source)
        per_token = environment.flops_per_token(self.model, self.config.data.seq_len)
        self.pace = Pace(self.plan, per_token / (flops * self.ranks.world))

    def take_step(self, micro_batches: list[MicroBatch]) -> StepResult:
        """Do one optimizer step.

        Raises:
            Stopping: instead, on all ranks, if some rank was told to stop.
        """
        self.watch.tick("step")
        own = sum(int((batch["targets"] != IGNORED).sum()) for batch in micro_batches)
        count, stopping, saving = self.ranks.sums(own, self.stop.requested, self.saver.busy)
        if stopping:
            raise Stopping
        if not saving:
            self.saver.advance()
        loss_sum = self.engine.backward(micro_batches, count)
        self.parts = self.objective.means(len(micro_batches), count, self.ranks)
        factor, max_norm = self.plan.schedule(self.step), self.config.training.clip_norm
        applied = self.step - self.soundness.skipped
        result = self.engine.clip_and_step(
            loss_sum, count, factor=factor, max_norm=max_norm, step=applied + 1
        )
        self.step += 1
        return result

    def record(self, result: StepResult, seconds: float) -> Record:
        """Return the metrics of the step just taken."""
        record: Record = {
            "step": self.step,
            "tokens": self.step * self.plan.tokens_per_step,
            "train/loss": result.loss,
            **self.parts,
            "lr": self.config.optimizer.lr * self.plan.schedule(self.step - 1),
            "grad_norm": result.grad_norm,
            **self.soundness.judge(self.step, result),
        }
        if self.reporter is not None:
            record.update(self.pace.measure(self.step, seconds, self.device))
        return record

    def is_due(self, interval: int) -> bool:
        """Whether something done every `interval` steps (0: never) and at the end is due."""
        return self.step == self.plan.steps or (interval > 0 and self.step % interval == 0)

    def validate(self) -> Record:
        """Score the validation documents (of which there may be none) in the run's precision."""
        how = self.config, self.ranks, self.precision
        return score_validation(self.model, self.data, *how, between=self.between_batches)

    def between_batches(self) -> None:
        """Cut a validation short, on all ranks, if some rank was told to stop."""
        self.watch.tick("validation")
        (stopping,) = self.ranks.sums(self.stop.requested)
        if stopping:
            raise Stopping

    def last_checkpoint(self) -> str:
        """Return the run's newest checkpoint, after the save under way."""
        self.watch.tick("saving")
        self.saver.wait()
        return str(next(iter(self.checkpoints.folders()), "none"))

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of the completed steps, metrics first; `last`: nothing follows."""
        first = (lambda: None) if self.reporter is None else self.reporter.file.sync
        state = {
            "step": self.step,
            "tokens": self.step * self.plan.tokens_per_step,
            "soundness": self.soundness.state(),
            "unvalidated": self.unvalidated,
            "precision": self.precision.name,
        }
        self.saver.save(self.step, self.engine.pieces(), state, first=first, last=last)

    def finish(self) -> None:
        """Write the Hugging Face folder `final/`: model and tokenizer."""
        self.watch.tick("finishing")
        self.engine.finish(self.directory.final_in_making)
        if self.ranks.is_main:
            self.data.tokenizer().save_pretrained(self.directory.final_in_making)
            self.directory.publish_final()
            logger.info("finished: the model is in %s", self.directory.final)

    def close(self) -> None:
        """Close files; let other runs into the directory."""
        self.watch.close()
        if hasattr(self, "saver"):
            self.saver.close()
        if self.reporter is not None:
            self.reporter.close()
        self.directory.close()
        self.ending.close()
