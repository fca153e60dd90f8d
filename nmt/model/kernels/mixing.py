"""Random numbers that depend only on what they are for: a hash of counters, with no state and in no order."""

from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """Return a hash of the lower 32 bits of int64 numbers: a bijection whose every bit depends on all bits of x.

    It is "lowbias32" by C. Wellons. Products may overflow 64 bits, which leaves their lower 32 bits right.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
