"""`python -m nmt` is `nmt`."""

from nmt.cli import program

program()
