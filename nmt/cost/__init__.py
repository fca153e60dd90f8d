"""Compute what a model costs, from its settings alone: operations, memory, time."""
