"""The cases of scripts/faults.py, and what they share."""
