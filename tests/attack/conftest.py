"""`tries`: random numbers for one attack after the other, until the time of the test is up."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> Iterator[Iterator[random.Random]]:
    """Yields generators seeded with the test's name and the number of the try, so that every run begins alike.

    What is printed when a test fails says how to begin at the try that did it.
    """
    option = request.config.option
    number = option.attack_from

    def generate() -> Iterator[random.Random]:
        nonlocal number
        end = time.monotonic() + option.attack_seconds
        while number < option.attack_from + 5 or time.monotonic() < end:
            yield random.Random(f"{request.node.name}/{number}")
            number += 1

    yield generate()
    request.node.user_properties.append(("tries", number - option.attack_from))
    print(f"the last try was number {number} (--attack-from {number})")
