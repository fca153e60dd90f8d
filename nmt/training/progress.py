"""How far a run has come: the state of training besides tensors."""

import math
from dataclasses import dataclass, field

from nmt.checkpoint import Checkpoint
from nmt.config import TrainingConfig
from nmt.errors import CheckpointError
from nmt.training.ending import Ending, ending
from nmt.training.optim import learning_rate
from nmt.training.watching import Lowest


@dataclass
class Progress:
    """State of training besides tensors; part of every checkpoint."""

    step: int = 0
    best_score: float = math.inf
    score_before: float = math.inf
    """Score of the validation before the first step; inf if there was none. Like all scores, lower is better."""
    validations_since_best: int = 0
    bad_intervals: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    """`Clock.seconds` of the main process, in all processes."""
    next_rate: float | None = None
    """Learning rate of the next step, as planned when this was saved; None if an older version saved it."""
    warm_from: int = 0
    """Step after which the learning rate is warmed up once more, because the network was changed; 0: it was not."""
    lowest: dict[str, Lowest] = field(default_factory=dict)
    """The lowest perplexity of each watched text, by its name."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Progress":
        """Return the progress saved in a checkpoint. CheckpointError if it has fields that this version lacks."""
        try:
            saved = dict(checkpoint.state()["progress"])
            lowest = {name: Lowest(*each) for name, each in saved.pop("lowest", {}).items()}
            return cls(**saved, lowest=lowest)
        except TypeError as error:
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'} was written by another version of this program: resume with that one"
            ) from error

    def rate(self, training: TrainingConfig, step: int) -> float:
        """Return the learning rate of step `step`, if it starts now."""
        return learning_rate(training, step, self.seconds, self.warm_from)

    def ended(self, training: TrainingConfig) -> Ending | None:
        """Return why training ends before the next step; None if it does not."""
        return ending(training, self.step, self.seconds, self.validations_since_best)

    def at_limit(self, training: TrainingConfig) -> bool:
        """Whether this is the last step by `max_steps`, or the first after `max_minutes` are used up."""
        return self.step == training.max_steps or 0.0 < training.max_minutes <= self.seconds / 60.0
