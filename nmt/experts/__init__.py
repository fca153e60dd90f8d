"""Experts seen, explained, added and taken away."""
