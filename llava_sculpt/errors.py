"""The one exception that means "the user can fix this"."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input (configuration, data, checkpoint, environment), described in the user's terms.

    Command-line entry points print the message and exit with code 2, without a traceback. Build it from one
    message, or from several when a file or a configuration has several problems, so that all are reported at once.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
