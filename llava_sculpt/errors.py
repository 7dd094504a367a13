"""The one exception that means "the user can fix this"."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input (configuration, data, checkpoint, environment), described in the user's terms.

    Command-line entry points print the message and exit with code 2, without a traceback. Build it from one
    message, or from several when a file or a configuration has several problems, so that all are reported at once.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        found = [problems] if isinstance(problems, str) else problems
        # JSON may hold halves of characters, which can be printed nowhere.
        self.problems = [problem.encode(errors="backslashreplace").decode() for problem in found]
        super().__init__("\n".join(self.problems))


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
