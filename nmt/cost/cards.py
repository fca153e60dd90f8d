"""What GPUs reach at best, and how much of that the training step reaches: the constants of the time model.

`Card` has the ceilings of a GPU, `Rates` the shares of them. `step.py` computes times from both.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """Ceilings of one GPU."""

    name: str
    tflops: float
    """10^12 operations per second of a large bf16 matrix product."""
    copy_tbs: float
    """10^12 bytes per second of a device copy, read and write together."""
    memory_gb: float
    link_gbs: float
    """10^9 bytes per second that a GPU sends to the others of its host, while it receives as many."""
    source: str
    """Where the figures come from."""


CARDS = {
    "h100": Card("H100", 776.0, 3.01, 80.0, 248.0, "make bench-gpu, results/speed.json; link as on an H200"),
    "h200": Card("H200", 768.0, 4.22, 141.0, 248.0, "make bench-gpu at 6338d36; link from results/two_gpus.json"),
    # Peaks of NVIDIA's data sheet (312 TFLOP/s, 2.04 TB/s, 600 GB/s both ways) times the share of an H100's peaks (989,
    # 3.35, 900) that was measured.
    "a100": Card("A100", 243.0, 1.83, 80.0, 165.0, "NVIDIA's data sheet, times what an H100 reaches of its own"),
}
GPUS_PER_HOST = 8
NETWORK_GBS = 50.0
"""GB/s per GPU and direction between hosts: one 400 Gb/s adapter per GPU, by its data sheet."""


def card_called(device: str) -> Card | None:
    """Return the card that a device is by its name, such as NVIDIA H100 80GB HBM3; None if it is none of ours."""
    return next((card for card in CARDS.values() if card.name in device), None)


def link_of(card: Card, gpus: int) -> float:
    """Return the GB/s per GPU and direction among this many of these cards: of one host, or of full hosts."""
    return card.link_gbs if gpus <= GPUS_PER_HOST else NETWORK_GBS


class Rates(NamedTuple):
    """What the training step reaches. Shares are of a card's ceilings, so that they carry over between cards.

    `scripts/results/step_time.py` fits them to measured steps.
    """

    products: float = 0.835
    """Share of the product ceiling in large products: inputs and weight gradients of LSTMs, attention, gates."""
    recurrent: float = 0.766
    """The same for the recurrent products, of few rows per position."""
    softmax: float = 0.387
    """The same for the softmax and its loss."""
    experts: float = 0.773
    """The same for the experts' products."""
    weights: float = 1.0
    """Share of the copy bandwidth at which experts' weights are read and their gradients written."""
    memory: float = 0.981
    """Share of the copy bandwidth that the optimiser and element-wise work reach."""
    passes: float = 2.17
    """Times that each byte kept for the backward pass is read or written in a step."""
    position_us: float = 7.8
    """Microseconds per position, pass and product of an LSTM, besides its operations."""
    launch_ms: float = 0.85
    """Milliseconds per micro-batch in which the GPU waits for the host or runs its smallest kernels."""
    message_us: float = 1.77
    """Microseconds per message of an exchange. Assumed: two GPUs are too few to measure it."""


RATES = Rates()
