import gc

import pytest


@pytest.fixture(scope="module")
def own_objects_only():
    """A garbage collection that falls into a timed refusal must not search what the rest of the suite has left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
