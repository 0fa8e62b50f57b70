"""What is told of an image may be older than what is known of it: which events are doubted, and who is asked instead.

The stream tells of changes in their order. But what this mount does itself is in the index as soon as it is done, and
may be before or after the stream's next event. So an event about an image that this mount is changing, or changed a
moment ago, is not applied: the sidecar is asked how the image is now. Its answer counts unless something was learned of
the image since it was asked; then it is asked again, and so it is when it gave no answer: no event is lost.
"""

import threading
from collections import Counter
from collections.abc import Callable

Key = tuple[str, str]  # datastore, image id

# How long an event of the stream may lag behind what this mount did.
DOUBT_SECONDS = 30.0


class Doubts:
    """Every method but `next` is called with `lock` held, which is the index's. `clock` is monotonic."""

    def __init__(self, lock: threading.RLock, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work = threading.Condition(lock)
        self._changing: Counter[Key] = Counter()  # by calls of this mount that have no answer yet
        self._changed: dict[Key, float] = {}  # until when its events are doubted; the first to end comes first
        self._open: dict[Key, None] = {}  # to be asked for, the oldest first
        self._asked: Key | None = None  # what is being asked for, until something else is learned of it
        self._ended = False

    def takes(self, key: Key) -> bool:
        """Whether an event about the image is not to be applied: then the sidecar will be asked for it."""
        if key not in self._changing and self._changed.get(key, 0.0) <= self._clock():
            return False
        self.add(key)
        return True

    def add(self, key: Key) -> None:
        """The sidecar is to be asked for the image."""
        self._open[key] = None
        self._work.notify_all()

    def begin_change(self, key: Key) -> None:
        self._changing[key] += 1
        self.learned(key)

    def end_change(self, key: Key) -> None:
        self._changing[key] -= 1
        if not self._changing[key]:
            del self._changing[key]
            self._work.notify_all()

    def changed(self, key: Key) -> None:
        """This mount changed the image."""
        now = self._clock()
        self._changed.pop(key, None)
        self._changed[key] = now + DOUBT_SECONDS
        while self._changed[first := next(iter(self._changed))] <= now:
            del self._changed[first]

    def learned(self, key: Key) -> None:
        """An answer that is still to come was asked for before this."""
        if self._asked == key:
            self._asked = None

    def next(self) -> Key | None:
        """The image to ask for, when there is one, for one thread that then says `answered`; None after `end`."""
        with self._work:
            while not self._ended:
                key = next((key for key in self._open if key not in self._changing), None)
                if key is not None:
                    del self._open[key]
                    self._asked = key
                    return key
                self._work.wait()
            return None

    def answered(self, key: Key) -> bool:
        """Whether the answer counts; it will be asked for again when it does not."""
        counts = self._asked == key
        self._asked = None
        if not counts:
            self.add(key)
        return counts

    def end(self) -> None:
        self._ended = True
        self._work.notify_all()
