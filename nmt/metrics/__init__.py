"""Figures of training: what a line of metrics.jsonl holds, and where lines go."""
