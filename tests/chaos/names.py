"""The names that a run works on: few at a time, so that operations meet, and new ones as time goes by."""

import random
import threading
from dataclasses import dataclass

SLOTS = 5
OPERATIONS_OF_A_NAME = 40  # the search of the checker is exact: a name must not have too many


@dataclass(slots=True)
class _Slot:
    generation: int = 0
    used: int = 0


class Names:
    """By datastore and slot, the name of now, and what is believed to be under it. Threads share it."""

    def __init__(self, datastores: list[str]) -> None:
        self._slots = {(datastore, number): _Slot() for datastore in datastores for number in range(SLOTS)}
        self._lock = threading.Lock()  # guards all
        self._believed: dict[str, str] = {}
        self._retired: list[str] = []

    def pick(self, choose: random.Random) -> str:
        key = choose.choice(list(self._slots))
        with self._lock:
            slot = self._slots[key]
            slot.used += 1
            if slot.used > OPERATIONS_OF_A_NAME:
                self._retired.append(self._name(key, slot))
                slot.generation += 1
                slot.used = 1
            return self._name(key, slot)

    def pick_retired(self, choose: random.Random) -> str | None:
        """A name that nobody uses any more, once: its bytes can go."""
        with self._lock:
            if not self._retired:
                return None
            return self._retired.pop(choose.randrange(len(self._retired)))

    def pick_valid(self, choose: random.Random) -> str | None:
        with self._lock:
            current = [self._name(key, slot) for key, slot in self._slots.items()]
            valid = [name for name in current if self._believed.get(name) == "valid"]
        return choose.choice(valid) if valid else None

    def believed(self, name: str) -> str:
        with self._lock:
            return self._believed.get(name, "absent")

    def believe(self, name: str, status: str) -> None:
        with self._lock:
            self._believed[name] = status

    def _name(self, key: tuple[str, int], slot: _Slot) -> str:
        return f"{key[0]}/{key[1]:02d}-{slot.generation}"
