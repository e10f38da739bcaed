"""The one exception a user can cause."""

from collections.abc import Sequence


class RankgateError(ValueError):
    """Bad input; the message is one line that says what is wrong and what to do. The CLI exits with 2."""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are beside."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
