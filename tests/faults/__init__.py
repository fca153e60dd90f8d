"""The cases of tests/faults/__main__.py, and what they share."""
