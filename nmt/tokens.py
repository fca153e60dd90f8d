"""Ids of the special tokens: padding, unknown text, begin and end of a sentence."""

PAD, UNK, BOS, EOS = 0, 1, 2, 3
NUM_SPECIAL = 4
"""Number of these. The ids of all other tokens follow."""
