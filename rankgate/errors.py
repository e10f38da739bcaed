"""The one exception a user can cause."""


class RankgateError(ValueError):
    """Bad input; the message is one line that says what is wrong and what to do. The CLI exits with 2."""
