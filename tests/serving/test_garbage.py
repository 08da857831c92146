"""What is left to the collector of cyclic garbage."""

import gc
from collections.abc import Iterator

import pytest

from serving.freeze_gc import keep_what_is_loaded


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_full_collections_walk_nothing_of_what_was_loaded() -> None:
    keep_what_is_loaded()
    assert len(gc.get_objects(generation=2)) < 1000 < gc.get_freeze_count()
