"""Figures of training: what a line of metrics.jsonl contains, where lines go, and warnings about gates."""
