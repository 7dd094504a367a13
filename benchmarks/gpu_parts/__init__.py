"""The parts of `gpu_report.py`: each module measures one thing and yields its rows as they are known.

`cases(world)` of a module is a generator of flat dictionaries with `table`, `case` and what that table's columns say
(numbers, texts, or `spread`). A row with the same table and case as one before replaces it. `NotRun` says why nothing
can be measured here.
"""


class NotRun(Exception):
    """Why a part cannot run on this machine."""
