"""The training loop.

A step sums the gradients of its micro-batches, all divided by the step's number of target tokens, so that the result
does not depend on how the tokens are split. A checkpoint has the complete state of a run: parameters, moments, position
in the data and counters. Dropout and gate noise depend on the seed and the step. On a CPU, a run that stops and resumes
computes the same bits as one that does not stop.
"""

import math
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from nmt.batch import Batch
from nmt.checkpoint import Checkpoint, damaged_manifests, list_checkpoints, newest_verified
from nmt.config import Config
from nmt.cost.budget import checkpoint_bytes
from nmt.cost.operations import model_cost
from nmt.data.batching import BatchStream
from nmt.data.held_out import LONGEST_SIDE
from nmt.data.prepare import Prepared
from nmt.decoding.loading import longest_source
from nmt.decoding.translator import Translator
from nmt.device import set_float32_products, shortage_told
from nmt.errors import CheckpointError, NonFiniteError, ProcessError
from nmt.evaluation.perplexity import perplexity
from nmt.evaluation.tokenizers import bleu_tokenizer
from nmt.metrics.forecast import first_forecast, seconds_left
from nmt.metrics.gate_watch import GateWatch
from nmt.metrics.record import DevLine, TrainLine
from nmt.metrics.writer import MetricsWriter
from nmt.model.gate_statistics import GateFigures, first_not_finite, relative_load
from nmt.model.names import is_expert
from nmt.parallel.expert_parallel import make_model
from nmt.parallel.mesh import World
from nmt.parallel.saving import Saver, load_parameters, read_share
from nmt.parameters import Tensors, stored
from nmt.run import RunDirectory
from nmt.terminal import layer_lines, printable, summary
from nmt.training.clock import Clock
from nmt.training.ending import Ending, ending
from nmt.training.interval import Interval
from nmt.training.optim import has_moments, learning_rate, make_optimizer, state_shapes, tensors_to_save
from nmt.training.recording import can_record
from nmt.training.stopping import StopRequest
from nmt.training.update import Updater
from nmt.training.validation import LEAST_BLEU, doubts, validation_bleu
from nmt.wording import counted, duration, millions

# Training fails after this many lines of metrics in a row without a single finite gradient.
_MAX_BAD_INTERVALS = 3
# The forecast is printed after this many steps, or this many seconds. The first step after a start is not timed.
_FORECAST_AFTER = 10
_FORECAST_SECONDS = 30.0
_SMALLER_BATCH = (
    "choose another run.name with a lower training.batch_tokens or corpus.filters.max_pieces, a smaller model, or "
    "without the longest lines of the dev set"
)


@dataclass
class Progress:
    """State of training besides tensors; part of every checkpoint."""

    step: int = 0
    best_score: float = math.inf
    validations_since_best: int = 0
    bad_intervals: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    """`Clock.seconds` of the main process, in all processes."""
    next_rate: float | None = None
    """Learning rate of the next step, as planned when this was saved; None if an older version saved it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Progress":
        """Return the progress saved in a checkpoint. CheckpointError if it has fields that this version lacks."""
        try:
            return cls(**checkpoint.state()["progress"])
        except TypeError as error:
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'} was written by another version of this program: resume with that one"
            ) from error


class Stopped(Exception):  # noqa: N818 - not an error
    """Training was stopped by a signal, after a save."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} at step {step}; run the same command again to resume"
        )
        self.status = 128 + signal_number


class Trainer:
    """Training of one run, from its newest checkpoint or from the start, to its end."""

    def __init__(self, config: Config, prepared: Prepared, run: RunDirectory, world: World, asked: StopRequest) -> None:
        self.config, self.run, self.world, self.asked = config, run, world, asked
        self.device = world.device
        set_float32_products(self.device, config.training.precision)
        self.subwords = prepared.subwords()
        self.dev_sources, self.dev_targets, _ = prepared.text("dev")
        self.tokenizer = bleu_tokenizer(config.evaluation.tokenize, config.corpus.target_language)
        self.doubts = doubts(config.training, self.tokenizer, self.dev_targets)
        self.saver = Saver(run.checkpoints, self.subwords.fingerprint, config.training.keep_checkpoints, world)
        self.resumed_from = world.on_main(self._newest, self.saver.group)
        parameters: Tensors | None = None
        if self.resumed_from:
            vocabulary = self.subwords.size, self.subwords.fingerprint
            parameters = load_parameters(self.resumed_from, config, *vocabulary, world)
        torch.manual_seed(config.training.seed)
        self.model = make_model(config, self.subwords.size, world, parameters).to(self.device)
        self.cost = model_cost(config.model, self.subwords.size)
        self.optimizer = make_optimizer(self.model, config.training)
        self.updater = Updater(self.model, self.optimizer, config, world)
        self.progress = Progress()
        self.clock = Clock()
        self.rate = 0.0
        self.forecast_told = False
        self.gate_watch = GateWatch(config.model.moe, config.training.warmup_steps)
        pairs = prepared.train()
        self.num_pairs = len(pairs)
        on_gpu = self.device.type == "cuda"
        self.stream = BatchStream(pairs, config.training, world.rank, world.size, on_gpu, can_record(config, world))
        # Experts as in training: validation scores must not depend on settings for translation.
        self.greedy = replace(
            config.decoding, beam_size=1, precision=config.training.precision, experts_per_token=0, retry=False
        )
        self.longest = longest_source(prepared.manifest, config)

    # ------------------------------------------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Train to the end, and return False if nothing was left. Raises Stopped after a signal, once all is saved."""
        if self.resumed_from:
            self._resume(self.resumed_from)
        metrics = (self.run.metrics_path, self.run.tensorboard) if self.world.is_main else None
        with (
            MetricsWriter(metrics, self.progress.step, self.config.training.max_steps) as out,
            self.stream,
        ):
            self._introduce(out, self.resumed_from)
            left = self.config.training.max_steps - self.progress.step
            every = min(self.config.training.checkpoint_every, self.config.training.validate_every)
            self.saver.check_space(checkpoint_bytes(self.config, self.cost), math.ceil(max(left, 0) / every))
            self.model.train()
            try:
                with self.world.report_peer_failures(self.where):
                    self._loop(out)
            except ProcessError:
                raise  # without the other processes, no checkpoint can be completed
            except BaseException:
                self.saver.wait()
                raise
            self.saver.wait()
        return self.resumed_from is None or self.progress.step > self.resumed_from.step

    def where(self) -> str:
        """Return the current step, for messages."""
        return f"at step {self.progress.step}"

    def _loop(self, out: MetricsWriter) -> None:
        training, progress = self.config.training, self.progress
        self.clock = Clock(progress.seconds)
        first, interval = progress.step + 1, self._interval()
        while self._ended() is None:
            with shortage_told(lambda: f"step {progress.step}", _SMALLER_BATCH):
                self._update(next(self.stream), interval)
            stop = self._meet()
            out.advance(progress.step)
            last = progress.step == training.max_steps or self._time_is_up()
            validates = progress.step % training.validate_every == 0 or last
            self._forecast(out, first)
            if progress.step % training.log_every == 0 or last:
                self._log(out, interval, keep=validates)
                interval = self._interval()
            score = self._validate_safely(out) if validates else None
            improved = score is not None and progress.validations_since_best == 0
            if validates:
                # A signal during a validation, which takes long, must not wait for one more step.
                stop = stop or self.world.max_int(self.asked.signal)
            if improved or last or stop or progress.step % training.checkpoint_every == 0 or self._ended():
                self._save(score)
            if stop:
                self.saver.wait()
                raise Stopped(stop, progress.step)
        ended = self._ended()
        if ended and first <= progress.step < training.max_steps:
            out.say(f"{ended.reason}: stopped at step {progress.step}")

    def _ended(self) -> Ending | None:
        """Return why training ends before the next step; None if it does not."""
        progress = self.progress
        return ending(self.config.training, progress.step, progress.seconds, progress.validations_since_best)

    def _time_is_up(self) -> bool:
        minutes = self.config.training.max_minutes
        return 0.0 < minutes <= self.progress.seconds / 60.0

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

    def _rate(self, step: int) -> float:
        return learning_rate(self.config.training, step, self.progress.seconds)

    def _update(self, micro_batches: list[Batch], interval: Interval) -> None:
        progress = self.progress
        progress.step += 1
        self.rate = self._rate(progress.step)
        done = self.updater.update(micro_batches, progress.step, self.rate)
        interval.add(done.loss, done.nll, done.gradient_norm, done.skipped)
        interval.watch(done.sums, done.gates)
        for batch in micro_batches:
            sizes = batch.num_source_tokens, batch.num_target_tokens
            interval.count(*sizes, self.cost.training_flops(*sizes, batch.num_sentences))
        progress.target_tokens += done.target_tokens

    # ---------------------------------------------------------------------------------- figures and validation

    def _introduce(self, out: MetricsWriter, resumed_from: Checkpoint | None) -> None:
        training = self.config.training
        if resumed_from:
            ended = self._ended()
            if ended:
                command = shlex.join(["nmt", "train", str(self.run.path), ended.longer])
                out.say(f"{ended.reason}, at {resumed_from.path}; train longer: {command}")
                return
            out.say(f"resuming from {resumed_from.path}, to step {training.max_steps:,}")
            if not self.same_order:
                epoch = self.stream.state_dict()["epoch"]
                out.say(
                    f"{resumed_from.path} was saved by a version with another order of sentences: training resumes "
                    f"with epoch {epoch + 1} and skips the rest of epoch {epoch}"
                )
            self._report_moved_rate(out)
        cost = self.cost
        out.say(
            f"{millions(cost.num_parameters)} parameters, {millions(cost.ops_per_timestep)} ops/timestep, "
            f"{self.num_pairs:,} pairs, {training.micro_batches} x {training.batch_tokens:,} tokens per step, "
            f"on {_name(self.world)}"
        )
        for line in self.doubts:
            out.say(f"validation: {line}")

    def _report_moved_rate(self, out: MetricsWriter) -> None:
        """Warn if a changed end of the linear schedule makes the learning rate jump."""
        training, progress = self.config.training, self.progress
        rate = self._rate(progress.step + 1)
        if self._ended() is None and progress.next_rate not in (None, rate):
            minutes = f" or after training.max_minutes={training.max_minutes:g}" if training.max_minutes else ""
            out.say(
                f"warning: the learning rate of step {progress.step + 1} is {rate:.3g}, not {progress.next_rate:.3g} "
                f"as planned: training.schedule={training.schedule} now ends at "
                f"training.max_steps={training.max_steps}{minutes}"
            )

    def _forecast(self, out: MetricsWriter, first: int) -> None:
        """Once per start, which was at step `first`, print how long the run will take."""
        measured = self.progress.step - first
        if measured == 0:
            self._wait_for_device()
            self.clock.mark()
            self.forecast_told = False
        elif not self.forecast_told and (measured == _FORECAST_AFTER or self.clock.since_mark() >= _FORECAST_SECONDS):
            self._wait_for_device()
            per_update = self.clock.since_mark() / measured
            on_cpu = self.device.type == "cpu"
            line = first_forecast(self.config.training, self.progress.step, self.progress.seconds, per_update, on_cpu)
            out.say(f"step {self.progress.step:,}: {line}")
            self.forecast_told = True

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _log(self, out: MetricsWriter, interval: Interval, keep: bool) -> None:
        self._check_replicas()
        means, gates = interval.read(self.world)
        # `read` waited for the device, so the lap has the whole time of what was counted.
        seconds = self.clock.lap()
        training, moe, step = self.config.training, self.config.model.moe, self.progress.step
        on_gpu = self.device.type == "cuda"
        line = TrainLine(
            step,
            *means,
            learning_rate=self.rate,
            tokens_per_second=(interval.source_tokens + interval.target_tokens) / seconds,
            tflops=interval.flops / seconds / 1e12,
            processes=self.world.size,
            gpu_memory_gb=torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else None,
            gates={layer: gate.to_dict(moe) for layer, gate in gates.items()},
        )
        out.write(line)
        loads = {f"{layer}.load_per_expert": relative_load(gate.count_E) for layer, gate in gates.items()}
        out.write_histograms(step, "train", loads)
        per_update = seconds / max(interval.updates, 1)
        left = duration(seconds_left(training, step, self.progress.seconds, per_update, self.clock.mean_pause))
        short = f"ppl {line.perplexity:.2f}, {line.tokens_per_second:,.0f} tokens/s"
        place = f"step {step:,}/{training.max_steps:,}"
        lines = [f"{place}  loss {line.loss:.3f}, {short}, {left} left", *layer_lines(line.gates)]
        out.show(f"{left} left, {short}{summary(line.gates)}", "\n".join(lines), keep)
        self._judge(out, interval, line, gates)

    def _judge(self, out: MetricsWriter, interval: Interval, line: TrainLine, gates: dict[str, GateFigures]) -> None:
        """Print warnings for what is wrong in a line. NonFiniteError if training cannot recover."""
        for warning in self.gate_watch.judge(line.step, interval.updates, line.loss, gates):
            out.say(warning)
        if line.skipped_updates:
            gate = first_not_finite(gates)
            cause = f" (first gate not finite: {gate})" if gate else ""
            count = f"{counted(round(line.skipped_updates), 'step')} skipped"
            out.say(f"step {line.step}: {count}: gradient not finite{cause}")
        all_bad = line.skipped_updates == interval.updates
        self.progress.bad_intervals = self.progress.bad_intervals + 1 if all_bad else 0
        at_end = self.progress.step == self.config.training.max_steps or self._time_is_up()
        if self.progress.bad_intervals >= _MAX_BAD_INTERVALS or (all_bad and at_end):
            raise NonFiniteError(
                f"no finite gradient in the last {self.progress.bad_intervals * interval.updates} steps up to step "
                f"{self.progress.step}: lower training.learning_rate; checkpoints in {self.run.checkpoints} are good"
            )

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
                if self.world.size == 1:
                    self._save(None)
                raise

    def _validate(self, out: MetricsWriter) -> float | None:
        """Score the dev set and update the best score. Return the score: lower is better, None if there is none."""
        training = self.config.training
        # In bf16, the translator has a copy of the parameters, which is freed when this function returns.
        language = self.config.corpus.source_language
        translator = Translator(
            self.model.eval(), self.subwords, self.greedy, self.device, self.longest, language=language
        )
        measured = perplexity(
            translator.model,
            self.subwords,
            self.dev_sources,
            self.dev_targets,
            training.batch_tokens,
            self.world,
        )
        bleu: float | None = None
        line = f"step {self.progress.step:,}: dev perplexity {measured.pieces:.2f}"
        if measured.cut:
            line += f" ({counted(len(measured.cut), 'pair')} cut to {LONGEST_SIDE:,} subwords per side)"
        score, count = measured.pieces, training.validation_sentences
        if count:
            sentences = self.dev_sources[:count], self.dev_targets[:count]
            bleu = validation_bleu(translator, *sentences, self.tokenizer.name, self.world)
            line += f", greedy BLEU {bleu:.1f} of {min(count, len(self.dev_sources))} sentences"
            score = -bleu if training.best_by == "bleu" else score
        self.model.train()
        if training.best_by == "bleu" and bleu is not None and bleu < LEAST_BLEU:
            out.write(DevLine(self.progress.step, measured.pieces, measured.words, bleu))
            out.say(f"{line}: below BLEU {LEAST_BLEU:g}, no checkpoint is best and training.patience does not count")
            return None
        better = score < self.progress.best_score
        self.progress.validations_since_best = 0 if better else self.progress.validations_since_best + 1
        if better:
            self.progress.best_score = score
        out.write(DevLine(self.progress.step, measured.pieces, measured.words, bleu))
        out.say(line + (" (best so far)" if better else ""))
        return None if math.isnan(score) else score

    # ------------------------------------------------------------------------------------- saving and resuming

    def _save(self, score: float | None) -> None:
        # Only one copy of what all processes have is written: it must not hide that they differ.
        self._check_replicas()
        self.progress.next_rate = self._rate(self.progress.step + 1)
        state = {"progress": asdict(self.progress), "data": self.stream.state_dict()}
        self.saver.save(self.progress.step, tensors_to_save(self.model, self.optimizer), state, score)

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Restore all state except the parameters, with which the model was built."""
        self.progress = Progress.of(checkpoint)
        self.same_order = self.stream.load_state_dict(checkpoint.state()["data"])
        kind = self.config.training.expert_optimizer
        shapes = {name: state_shapes(name, each.shape, kind) for name, each in self.model.named_parameters()}
        trained = has_moments(checkpoint, stored(checkpoint.path / "training"), shapes)
        moments = {f"{moment}.{name}": torch.empty(size) for name in trained for moment, size in shapes[name].items()}
        read_share(checkpoint.path / "training", moments, self.world)
        for name, parameter in self.model.named_parameters():
            own = {moment: moments[f"{moment}.{name}"].to(self.device) for moment in shapes[name] if name in trained}
            self.optimizer.state[parameter].update(own)

    def _newest(self) -> Checkpoint | None:
        checkpoint, warnings = newest_verified(list_checkpoints(self.run.checkpoints))
        warnings = damaged_manifests(self.run.checkpoints) + warnings
        for warning in warnings:
            print(printable(warning), file=sys.stderr, flush=True)
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


def _name(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU, {counted(threads, 'thread')}"
    return name if world.size == 1 else f"{world.size} processes of {name}"
