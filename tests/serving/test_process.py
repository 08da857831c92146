"""What is left to the collector of cyclic garbage."""

import gc
from collections.abc import Iterator

import pytest

from serving.process import freeze_gc


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_full_collections_walk_nothing_of_what_was_loaded() -> None:
    freeze_gc()
    assert len(gc.get_objects(generation=2)) < 1000 < gc.get_freeze_count()
