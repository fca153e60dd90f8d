"""Sentence pairs from anyone's files, the hub or the phrasebook, and what is left out."""
