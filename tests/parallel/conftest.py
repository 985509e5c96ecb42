"""Worlds of 1 to 4 ranks, each started when a test first asks for it, and kept."""

import pytest
from parallel_worlds import World


@pytest.fixture(scope="session")
def worlds():
    """A function of the size, or of several, that gives the world; one in which a case has failed is started anew."""
    started = {}

    def world(size):
        if size in started and started[size].broken:
            started.pop(size).close()
        if size not in started:
            started[size] = World(size)
        return started[size]

    yield world
    for each in started.values():
        each.close()
