"""The cycle collector runs after the chosen steps and at no other time, and is given back."""

import gc
import weakref

import pytest

from modalities_core.training.garbage import GarbageCollection


class Ring:
    """Garbage that only the cycle collector can free."""

    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_is_set_apart():
    """As in a program; a test run may have set apart what it has loaded."""
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    if was_frozen:
        gc.freeze()


def test_collects_after_every_so_many_steps_and_at_no_other_time():
    freed = []
    with GarbageCollection(every=4) as garbage:
        assert not gc.isenabled()
        rings = []
        for step in range(9, 17):
            ring = Ring()
            rings.append(weakref.ref(ring))
            del ring
            # Enough allocations for automatic collections, were they on.
            [[] for _ in range(5000)]
            garbage.after_step(step)
            freed.append(sum(ref() is None for ref in rings))
    # Step 9 is the first of the process; 12 and 16 are multiples of 4.
    assert freed == [1, 1, 1, 4, 4, 4, 4, 8]
    assert gc.isenabled()


def test_what_exists_is_set_apart_and_given_back():
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), GarbageCollection() as garbage:
        before = gc.get_freeze_count()
        assert before > 1000
        made = [Ring() for _ in range(100)]
        garbage.after_step(1)
        assert gc.get_freeze_count() >= before + len(made)
        raise KeyError
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()


def test_what_the_user_chose_stays():
    gc.disable()
    gc.freeze()
    try:
        with GarbageCollection():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()
