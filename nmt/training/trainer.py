"""The training loop.

A step sums the gradients of its micro-batches, all divided by the step's number of target tokens, so that the result
does not depend on how the tokens are split. A checkpoint has the complete state of a run: parameters, moments, position
in the data and counters. Dropout and gate noise depend on the seed and the step. On a CPU, a run that stops and resumes
computes the same bits as one that does not stop.
"""

import math
import signal
import sys
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from nmt.batch import Batch
from nmt.checkpoint import Checkpoint, damaged_manifests, list_checkpoints, newest_verified
from nmt.config import Config
from nmt.cost.budget import checkpoint_bytes
from nmt.cost.operations import model_cost
from nmt.data.batching import BatchStream
from nmt.data.mixture import Corpora
from nmt.data.resampling import resampled
from nmt.device import set_float32_products, shortage_told
from nmt.errors import CheckpointError, ProcessError
from nmt.metrics.record import DevLine
from nmt.metrics.writer import MetricsWriter
from nmt.model.names import is_expert
from nmt.parallel.expert_parallel import make_model
from nmt.parallel.mesh import World
from nmt.parallel.saving import Saver, load_parameters, read_share
from nmt.parameters import Tensors, stored
from nmt.run import RunDirectory
from nmt.terminal import printable, written
from nmt.training.clock import Clock
from nmt.training.freezing import Frozen
from nmt.training.interval import Interval
from nmt.training.optim import has_moments, make_optimizer, state_shapes, tensors_to_save
from nmt.training.progress import Progress
from nmt.training.recording import can_record
from nmt.training.reports import Reports
from nmt.training.stopping import StopRequest
from nmt.training.transfer import Origin, start_from
from nmt.training.update import Updater
from nmt.training.validation import LEAST_BLEU, Validated, Validation
from nmt.training.watching import forgotten

_SMALLER_BATCH = (
    "choose another run.name with a lower training.batch_tokens or corpus.filters.max_pieces, a smaller model, or "
    "without the longest lines of the dev set"
)


class Stopped(Exception):  # noqa: N818 - not an error
    """Training was stopped by a signal, after a save."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} at step {step}; run the same command again to resume"
        )
        self.status = 128 + signal_number


class Trainer:
    """Training of one run, from its newest checkpoint or from the start, to its end.

    A start is from new parameters, except those that are taken from `origin`. A run with a checkpoint has no `origin`.
    """

    def __init__(
        self,
        config: Config,
        corpora: Corpora,
        run: RunDirectory,
        world: World,
        asked: StopRequest,
        origin: Origin | None,
    ) -> None:
        self.config, self.run, self.world, self.asked = config, run, world, asked
        self.device = world.device
        set_float32_products(self.device, config.training.precision)
        self.subwords = corpora.own.subwords()
        self.validation = Validation(config, corpora, world)
        self.saver = Saver(run.checkpoints, self.subwords.fingerprint, config.training.keep_checkpoints, world)
        self.resumed_from = world.on_main(self._newest, self.saver.group)
        parameters: Tensors | None = None
        if self.resumed_from:
            vocabulary = self.subwords.size, self.subwords.fingerprint
            parameters = load_parameters(self.resumed_from, config, *vocabulary, world)
        torch.manual_seed(config.training.seed)
        model = make_model(config, self.subwords.size, world, parameters)
        self.notes = start_from(model, origin, config, self.subwords, corpora.symbols, world) if origin else []
        self.notes += [f"validation: {line}" for line in self.validation.doubts]
        self.model = model.to(self.device)
        self.frozen = Frozen(self.model, config.training.freeze) if config.training.freeze else None
        self.notes += [str(self.frozen)] if self.frozen else []
        self.cost = model_cost(config.model, self.subwords.size)
        self.optimizer = make_optimizer(self.model, config.training)
        self.updater = Updater(self.model, self.optimizer, config, world, self.frozen)
        self.progress = Progress()
        self.clock = Clock()
        self.rate = 0.0
        mixture = corpora.mixture(config.training.seed)
        self.num_pairs = mixture.num_pairs
        self.notes += mixture.notes
        text = resampled(mixture, self.subwords, config.corpus, config.training.seed)
        on_gpu = self.device.type == "cuda"
        self.stream = BatchStream(text, config.training, world.rank, world.size, on_gpu, can_record(config, world))

    # ------------------------------------------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Train to the end, and return False if nothing was left. Raises Stopped after a signal, once all is saved."""
        skipped = self._resume(self.resumed_from) if self.resumed_from else None
        metrics = (self.run.metrics_path, self.run.tensorboard) if self.world.is_main else None
        with (
            MetricsWriter(metrics, self.progress.step, self.config.training.max_steps) as out,
            self.stream,
        ):
            reports = Reports(self.config, self.run, self.world, out, self.progress)
            reports.introduce(self.cost, self.num_pairs, self.notes, self.resumed_from, skipped)
            left = self.config.training.max_steps - self.progress.step
            every = min(self.config.training.checkpoint_every, self.config.training.validate_every)
            self.saver.check_space(checkpoint_bytes(self.config, self.cost), math.ceil(max(left, 0) / every))
            self.model.train()
            try:
                with self.world.report_peer_failures(self.where):
                    self._loop(out, reports)
            except ProcessError:
                raise  # without the other processes, no checkpoint can be completed
            except BaseException:
                self.saver.wait()
                raise
            finally:
                self.updater.release()
            self.saver.wait()
        return self.resumed_from is None or self.progress.step > self.resumed_from.step

    def where(self) -> str:
        """Return the current step, for messages."""
        return f"at step {self.progress.step}"

    def _loop(self, out: MetricsWriter, reports: Reports) -> None:
        training, progress = self.config.training, self.progress
        self.clock = Clock(progress.seconds)
        first, interval = progress.step + 1, self._interval()
        if not self.resumed_from and (training.watch or self.config.run.start_from):
            # What later validations are compared with.
            self._validate_safely(out)
        while progress.ended(training) is None:
            with shortage_told(lambda: f"step {progress.step}", _SMALLER_BATCH):
                self._update(next(self.stream), interval)
            stop = self._meet()
            out.advance(progress.step)
            last = progress.at_limit(training)
            validates = progress.step % training.validate_every == 0 or last
            reports.forecast(self.clock)
            if progress.step % training.log_every == 0 or last:
                self._check_replicas()
                reports.log(interval, self.rate, self.clock, keep=validates)
                interval = self._interval()
            score = self._validate_safely(out) if validates else None
            improved = score is not None and progress.validations_since_best == 0
            if validates:
                # A signal during a validation, which takes long, must not wait for one more step.
                stop = stop or self.world.max_int(self.asked.signal)
            if improved or last or stop or progress.step % training.checkpoint_every == 0 or progress.ended(training):
                self._save(score)
            if stop:
                self.saver.wait()
                raise Stopped(stop, progress.step)
        ended = progress.ended(training)
        if ended and first <= progress.step < training.max_steps:
            out.say(f"{ended.reason}: stopped at step {progress.step}")

    def _meet(self) -> int:
        """After a step, return the signal that any process received (0: none), and share the main process's time.

        All processes thus stop after the same step and have the same learning rates.
        """
        microseconds = int(self.clock.seconds * 1e6) if self.world.is_main else 0
        stop, agreed = self.world.max(torch.tensor([self.asked.signal, microseconds])).tolist()
        self.progress.seconds = agreed / 1e6
        return stop

    def _interval(self) -> Interval:
        return Interval(self.device, self.config.model.moe)

    def _update(self, micro_batches: list[Batch], interval: Interval) -> None:
        progress = self.progress
        progress.step += 1
        self.rate = progress.rate(self.config.training, progress.step)
        done = self.updater.update(micro_batches, progress.step, self.rate)
        interval.add(done.loss, done.nll, done.gradient_norm, done.skipped)
        interval.watch(done.sums, done.gates)
        for batch in micro_batches:
            sizes = batch.num_source_tokens, batch.num_target_tokens
            flops = self.cost.training_flops(*sizes, batch.num_sentences) * self.config.training.passes
            interval.count(*sizes, flops)
        progress.target_tokens += done.target_tokens

    # ------------------------------------------------------------------------------------------- validation

    def _validate_safely(self, out: MetricsWriter) -> float | None:
        """Run `_validate`. If it fails, save before the error is raised."""
        with self.clock.paused():
            try:
                with shortage_told(lambda: f"the validation {self.where()}", _SMALLER_BATCH):
                    return self._validate(out)
            except ProcessError:
                raise
            except Exception:
                # Several processes cannot save now: the others are still in the validation.
                if self.world.size == 1 and self.progress.step:
                    self._save(None)
                raise

    def _validate(self, out: MetricsWriter) -> float | None:
        """Score the dev set and the watched texts, and update the best score. Return what `_rank` does."""
        progress = self.progress
        done, watched = self.validation.run(self.model)
        texts = {name: each.curves() for name, each in (*done.directions.items(), *watched.items())}
        out.write(DevLine(progress.step, done.perplexity, done.word_perplexity, done.bleu, texts))
        score, verdict = self._rank(done)
        out.say(f"step {progress.step:,}: {done}{verdict}")
        for name, each in watched.items():
            out.say(f"step {progress.step:,}: {name}: {each}")
            if warning := forgotten(progress.lowest, name, each.perplexity, progress.step):
                out.say(warning)
        return score

    def _rank(self, done: Validated) -> tuple[float | None, str]:
        """Update the best score. Return the new score (lower is better, None if there is none) and what to say of it.

        What training starts with, before its first step, is no score of this run.
        """
        progress = self.progress
        score = done.score(self.config.training.best_by)
        if not progress.step:
            progress.score_before = math.inf if score is None or math.isnan(score) else score
            return None, " (before training)"
        if score is None:
            return None, f": below BLEU {LEAST_BLEU:g}, no checkpoint is best and training.patience does not count"
        better = score < progress.best_score
        progress.validations_since_best = 0 if better else progress.validations_since_best + 1
        if better:
            progress.best_score = score
        worse = ", but worse than before training" if score > progress.score_before else ""
        return None if math.isnan(score) else score, f" (best so far{worse})" if better else ""

    # ------------------------------------------------------------------------------------- saving and resuming

    def _save(self, score: float | None) -> None:
        # Only one copy of what all processes have is written: it must not hide that they differ.
        self._check_replicas()
        self.progress.next_rate = self.progress.rate(self.config.training, self.progress.step + 1)
        state = {"progress": asdict(self.progress), "data": self.stream.state_dict()}
        self.saver.save(self.progress.step, tensors_to_save(self.model, self.optimizer), state, score)

    def _resume(self, checkpoint: Checkpoint) -> int | None:
        """Restore all state except the parameters, with which the model was built.

        Return the epoch whose rest is skipped, as it was in another order; None if no rest is.
        """
        self.progress = Progress.of(checkpoint)
        same_order = self.stream.load_state_dict(checkpoint.state()["data"])
        kind = self.config.training.expert_optimizer
        parameters = dict(self.model.named_parameters())
        # A parameter that is frozen only now has moments in the checkpoint, which are left there.
        shapes = {name: state_shapes(name, each.shape, kind) for name, each in parameters.items() if each.requires_grad}
        trained = has_moments(checkpoint, stored(checkpoint.path / "training"), shapes)
        moments = {f"{moment}.{name}": torch.empty(size) for name in trained for moment, size in shapes[name].items()}
        read_share(checkpoint.path / "training", moments, self.world)
        for name in trained:
            own = {moment: moments[f"{moment}.{name}"].to(self.device) for moment in shapes[name]}
            if self.frozen:
                self.frozen.clear_moments(name, own)
            self.optimizer.state[parameters[name]].update(own)
        return None if same_order else self.stream.state_dict()["epoch"]

    def _newest(self) -> Checkpoint | None:
        checkpoint, warnings = newest_verified(list_checkpoints(self.run.checkpoints))
        warnings = damaged_manifests(self.run.checkpoints) + warnings
        for warning in warnings:
            written(partial(print, printable(warning), file=sys.stderr, flush=True))
        if checkpoint is None and warnings:
            raise CheckpointError(f"every checkpoint in {self.run.checkpoints} is damaged: choose another run.name")
        return checkpoint

    # --------------------------------------------------------------------------------- other processes

    def _check_replicas(self) -> None:
        """Raise ProcessError if parameters that must be equal (dense ones, replicas of experts) differ."""
        if self.world.size == 1:
            return
        bits: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, value in tensors_to_save(self.model, self.optimizer)["model"].items():
            # Sums of the bits show any single difference, and NaN does not hide it.
            same_size = torch.int32 if value.element_size() == 4 else torch.int16
            bits[is_expert(name)].append(value.detach().view(same_size).sum(dtype=torch.int64))
        shared, experts = (torch.stack([*each, torch.zeros_like(bits[False][0])]).cpu() for each in bits.values())
        if not self.world.equal_on_all_ranks(shared, experts):
            raise ProcessError(
                f"step {self.progress.step}: the {self.world.size} processes no longer have the same parameters; run "
                f"the same command again to resume from the last checkpoint in {self.run.checkpoints}"
            )
