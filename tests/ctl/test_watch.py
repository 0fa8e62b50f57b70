"""imagectl watch: one line for each thing that happens, over restarts of the sidecar."""

import json
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from tests.ctl.conftest import Imagectl
from tests.support.processes import Sidecar

MakeImage = Callable[[str], Path]


class Lines:
    """What a process writes, line by line, with a limit on the waiting."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))

    def next(self) -> str:
        return self._lines.get(timeout=20)

    def event(self) -> tuple[str, Any]:
        document = json.loads(self.next())
        return document["event"], document.get("image") or document["datastore"]

    def rest(self) -> list[str]:
        """What was written and not looked at."""
        rest = []
        while not self._lines.empty():
            rest.append(self._lines.get())
        return rest


@contextmanager
def watching(imagectl: Imagectl, *arguments: str) -> Iterator[tuple["subprocess.Popen[str]", Lines, Lines]]:
    process = imagectl.start("watch", *arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process, Lines(process.stdout), Lines(process.stderr)
    finally:
        process.kill()
        process.wait(10)


def test_what_is_there_and_what_happens_is_told(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    with watching(imagectl, "-o", "json") as (process, events, messages):
        kind, image = events.event()
        assert (kind, image["image"], image["state"]) == ("present", "one/a", "VALID")
        imagectl("cp", "one/a", "two/b")
        assert until(events, "added")["image"] == "two/b"
        imagectl("rm", "two/b")
        assert until(events, "deleted")["state"] == "TOMBSTONED"
        imagectl("restore", "two/b")
        assert until(events, "restored")["image"] == "two/b"
        imagectl("rm", "--force", "two/b")
        assert until(events, "removed") == {"image": "two/b", "datastore": "two", "image_id": "b"}
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert messages.next() == "imagectl: interrupted"


def until(events: Lines, wanted: str) -> Any:
    """The next event of that kind; a file that changes on the way to it is told too."""
    while True:
        kind, image = events.event()
        if kind == wanted:
            return image
        assert kind == "changed"


def test_people_get_a_line_for_each(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    make_image("two/b")
    with watching(imagectl, "one") as (_, lines, _):
        assert lines.next().split()[:3] == ["present", "one/a", "VALID"]
        imagectl("rm", "two/b")
        imagectl("rm", "one/a")
        assert lines.next().split()[:3] == ["deleted", "one/a", "TOMBSTONED"]


def test_a_watch_outlives_the_sidecar_and_tells_what_it_missed(
    imagectl: Imagectl, make_image: MakeImage, sidecar: Sidecar, tmp_path: Path
) -> None:
    for ref in ("one/same", "one/changed", "one/gone"):
        make_image(ref)
    with watching(imagectl) as (_, lines, messages):
        assert {lines.next().split()[1] for _ in range(3)} == {"one/same", "one/changed", "one/gone"}
        for end in (sidecar.kill, sidecar.stop):
            end()
            assert "waiting for it" in messages.next()
            if end == sidecar.kill:
                (tmp_path / "one" / "image_changed" / "image_tombstone.txt").touch()
                (tmp_path / "one" / "image_gone").rename(tmp_path / "elsewhere")
            sidecar.start()
            assert messages.next() == "imagectl: the sidecar is back"
            if end == sidecar.kill:
                told = {tuple(lines.next().split()[:2]) for _ in range(2)}
                assert told == {("deleted", "one/changed"), ("removed", "one/gone")}
        imagectl("rm", "one/same")
        assert lines.next().split()[:2] == ["deleted", "one/same"]
        # A change may be told in two steps, and then it is told as one more.
        assert [line for line in lines.rest() if line.split()[:2] != ["changed", "one/same"]] == []


def test_a_sidecar_that_was_never_there_is_an_error(tmp_path: Path) -> None:
    Imagectl(f"unix:{tmp_path}/none.sock").error("watch", code=6)


def test_a_datastore_that_is_not_there_is_an_error(imagectl: Imagectl) -> None:
    imagectl.error("watch", "nowhere", code=3)


def test_a_datastore_that_cannot_be_reached_is_an_event(tmp_path: Path, stack: ExitStack) -> None:
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"away={tmp_path / 'away'}"))
    with watching(Imagectl(sidecar.address), "-o", "json") as (_, events, _):
        kind, datastore = events.event()
        assert (kind, datastore["name"], datastore["accessible"]) == ("datastore", "away", False)
        assert datastore["fault"]
        (tmp_path / "away").mkdir()
        kind, datastore = events.event()
        assert (kind, datastore["name"], datastore["accessible"]) == ("datastore", "away", True)
