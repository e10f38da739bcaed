"""`rankgate VERB`. Thin: each verb calls the same public functions as a program would."""

from rankgate.cli.parser import main

__all__ = ["main"]
