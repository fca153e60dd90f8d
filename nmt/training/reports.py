"""What training prints and records: its start, a forecast, lines of metrics, and warnings for what is wrong in them."""

import shlex

import torch

from nmt.checkpoint import Checkpoint
from nmt.config import Config
from nmt.cost.operations import Cost
from nmt.errors import NonFiniteError
from nmt.metrics.forecast import first_forecast, seconds_left
from nmt.metrics.gate_watch import GateWatch
from nmt.metrics.record import TrainLine
from nmt.metrics.writer import MetricsWriter
from nmt.model.gate_statistics import GateFigures, first_not_finite, relative_load
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from nmt.terminal import layer_lines, summary
from nmt.training.clock import Clock
from nmt.training.interval import Interval
from nmt.training.progress import Progress
from nmt.wording import counted, duration, millions

# Training fails after this many lines of metrics in a row without a single finite gradient.
_MAX_BAD_INTERVALS = 3
# The forecast is printed after this many steps, or this many seconds. The first step after a start is not timed.
_FORECAST_AFTER = 10
_FORECAST_SECONDS = 30.0


class Reports:
    """Reports of one start of a run, to `out`. All processes call the same methods; only the main one is heard.

    `progress` is that of the training loop, which changes as it runs.
    """

    def __init__(self, config: Config, run: RunDirectory, world: World, out: MetricsWriter, progress: Progress) -> None:
        self._config, self._run, self._world, self._out, self._progress = config, run, world, out, progress
        self._first = progress.step + 1
        self._forecast_told = False
        # New gates of a grown network have to settle too.
        self._gate_watch = GateWatch(config.model.moe, progress.warm_from + config.training.warmup_steps)

    def introduce(
        self, cost: Cost, num_pairs: int, notes: list[str], resumed_from: Checkpoint | None, skipped: int | None
    ) -> None:
        """Print what is trained, from where, on how many pairs, and `notes` about it.

        `skipped` is the epoch of `resumed_from` whose rest is skipped, since it was in another order; None: none is.
        If nothing is left to train, only print how to train longer.
        """
        training, out = self._config.training, self._out
        if resumed_from:
            ended = self._progress.ended(training)
            if ended:
                command = shlex.join(["nmt", "train", str(self._run.path), ended.longer])
                out.say(f"{ended.reason}, at {resumed_from.path}; train longer: {command}")
                return
            out.say(f"resuming from {resumed_from.path}, to step {training.max_steps:,}")
            if skipped is not None:
                out.say(
                    f"{resumed_from.path} was saved by a version with another order of sentences: training resumes "
                    f"with epoch {skipped + 1} and skips the rest of epoch {skipped}"
                )
            self._report_moved_rate()
        out.say(
            f"{millions(cost.num_parameters)} parameters, {millions(cost.ops_per_timestep)} ops/timestep, "
            f"{num_pairs:,} pairs, {training.micro_batches} x {training.batch_tokens:,} tokens per step, "
            f"on {_name(self._world)}"
        )
        for line in notes:
            out.say(line)

    def _report_moved_rate(self) -> None:
        """Warn if a changed end of the schedule makes the learning rate jump."""
        training, progress = self._config.training, self._progress
        rate = progress.rate(training, progress.step + 1)
        if progress.next_rate not in (None, rate):
            minutes = f" or after training.max_minutes={training.max_minutes:g}" if training.max_minutes else ""
            self._out.say(
                f"warning: the learning rate of step {progress.step + 1} is {rate:.3g}, not {progress.next_rate:.3g} "
                f"as planned: training.schedule={training.schedule} now ends at "
                f"training.max_steps={training.max_steps}{minutes}"
            )

    def forecast(self, clock: Clock) -> None:
        """After a step: once per start, print how long the run will take."""
        measured = self._progress.step - self._first
        if measured == 0:
            self._wait_for_device()
            clock.mark()
        elif not self._forecast_told and (measured == _FORECAST_AFTER or clock.since_mark() >= _FORECAST_SECONDS):
            self._wait_for_device()
            per_update = clock.since_mark() / measured
            on_cpu = self._world.device.type == "cpu"
            training, progress = self._config.training, self._progress
            line = first_forecast(training, progress.step, progress.seconds, per_update, on_cpu)
            self._out.say(f"step {progress.step:,}: {line}")
            self._forecast_told = True

    def _wait_for_device(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def log(self, interval: Interval, rate: float, clock: Clock, keep: bool) -> None:
        """Write a line of metrics for the steps of `interval`, of which the last had the learning rate `rate`.

        The line stays on the terminal if `keep`. NonFiniteError if training cannot recover.
        """
        means, gates = interval.read(self._world)
        # `read` waited for the device, so the lap has the whole time of what was counted.
        seconds = clock.lap()
        training, moe, step = self._config.training, self._config.model.moe, self._progress.step
        on_gpu = self._world.device.type == "cuda"
        line = TrainLine(
            step,
            *means,
            learning_rate=rate,
            tokens_per_second=(interval.source_tokens + interval.target_tokens) / seconds,
            tflops=interval.flops / seconds / 1e12,
            processes=self._world.size,
            gpu_memory_gb=torch.cuda.max_memory_allocated(self._world.device) / 1e9 if on_gpu else None,
            gates={layer: gate.to_dict(moe) for layer, gate in gates.items()},
        )
        self._out.write(line)
        loads = {f"{layer}.load_per_expert": relative_load(gate.count_E) for layer, gate in gates.items()}
        self._out.write_histograms(step, "train", loads)
        per_update = seconds / max(interval.updates, 1)
        left = duration(seconds_left(training, step, self._progress.seconds, per_update, clock.mean_pause))
        short = f"ppl {line.perplexity:.2f}, {line.tokens_per_second:,.0f} tokens/s"
        place = f"step {step:,}/{training.max_steps:,}"
        lines = [f"{place}  loss {line.loss:.3f}, {short}, {left} left", *layer_lines(line.gates)]
        self._out.show(f"{left} left, {short}{summary(line.gates)}", "\n".join(lines), keep)
        self._judge(interval, line, gates)

    def _judge(self, interval: Interval, line: TrainLine, gates: dict[str, GateFigures]) -> None:
        """Print warnings for what is wrong in a line. NonFiniteError if training cannot recover."""
        progress = self._progress
        for warning in self._gate_watch.judge(line.step, interval.updates, line.loss, gates):
            self._out.say(warning)
        if line.skipped_updates:
            gate = first_not_finite(gates)
            cause = f" (first gate not finite: {gate})" if gate else ""
            count = f"{counted(round(line.skipped_updates), 'step')} skipped"
            self._out.say(f"step {line.step}: {count}: gradient not finite{cause}")
        all_bad = line.skipped_updates == interval.updates
        progress.bad_intervals = progress.bad_intervals + 1 if all_bad else 0
        at_end = progress.at_limit(self._config.training)
        if progress.bad_intervals >= _MAX_BAD_INTERVALS or (all_bad and at_end):
            raise NonFiniteError(
                f"no finite gradient in the last {progress.bad_intervals * interval.updates} steps up to step "
                f"{progress.step}: lower training.learning_rate; checkpoints in {self._run.checkpoints} are good"
            )


def _name(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU, {counted(threads, 'thread')}"
    return name if world.size == 1 else f"{world.size} processes of {name}"
