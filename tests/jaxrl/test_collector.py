"""What exists before a run's lanes begin is walked by no collection while they run."""

import gc
import weakref

from jaxrl.collector import settled


class Node:
    """Something that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def test_what_existed_is_not_walked_until_the_end() -> None:
    before = Node()
    with settled():
        assert gc.get_freeze_count() > 0
        assert all(thing is not before for thing in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(thing is before for thing in gc.get_objects())


def test_rubbish_made_later_is_still_collected() -> None:
    with settled():
        seen = weakref.ref(Node())
        gc.collect()
        assert seen() is None


def test_rubbish_from_before_is_collected_at_the_beginning() -> None:
    seen = weakref.ref(Node())
    with settled():
        assert seen() is None
