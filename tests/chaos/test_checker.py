"""The checker can fail: for each promise, a history and a datastore by hand that break it, and are found."""

import ast
import fcntl
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import tests
from tests.chaos.checker import Checker, Violation
from tests.chaos.content import BLOCK, NOTES, content_of, metadata
from tests.chaos.history import ERROR, OK, UNKNOWN, Event, History, Operation, Recorder, read_history
from tests.chaos.reading import LOCK, TIMESTAMP, TOMBSTONE, Reading, read_datastore

NAME, ID = "one/a", "a"
LAYOUTS = ("compound", "sharded", "vsan")


class Made:
    """A history and a datastore. Operations follow each other unless they are told when."""

    def __init__(self, root: Path, layout: str = "compound") -> None:
        self.root, self.layout = root, layout
        root.mkdir(exist_ok=True)
        self.history = History()

    def did(
        self,
        kind: str,
        outcome: str = OK,
        reason: str = "",
        *,
        at: tuple[float, float] | None = None,
        target: str = NAME,
        source: str = "",
        via: str = "sidecar-0",
        **said: object,
    ) -> Operation:
        number = len(self.history.operations) + 1
        begin, end = at or (10.0 * number, 10.0 * number + 1)
        end = math.inf if outcome == UNKNOWN else end
        operation = Operation(number, "w", kind, target, (via,), begin, source, end, outcome, reason, dict(said))
        self.history.operations.append(operation)
        return operation

    def saw(self, what: str, at: float, process: str = "sidecar-0", **details: object) -> None:
        self.history.events.append(Event(what, process, at, dict(details)))

    def directory(self, image_id: str = ID) -> Path:
        if self.layout == "sharded":
            return self.root / "images" / image_id[:2] / image_id
        return self.root / f"image_{image_id}"

    def there(self, content_id: int, image_id: str = ID, *, update: int = 0, deleted: bool = False) -> Path:
        """An image of that content, whole."""
        directory = self.directory(image_id)
        directory.parent.mkdir(parents=True, exist_ok=True)
        content_of(content_id).write(directory, image_id)
        (directory / f"{image_id}.ecv").write_bytes(metadata(update))
        for name in (TIMESTAMP, *([TOMBSTONE] if deleted else [])):
            (directory / name).touch()
        return directory

    def read(self) -> Reading:
        return read_datastore(self.root, self.layout)

    def violations(self, afterwards: Reading | None = None) -> list[Violation]:
        verdict = Checker(self.history, {"one": self.read()}, {"one": afterwards} if afterwards else None).check()
        assert not verdict.undecided
        return verdict.violations

    def promises(self) -> set[str]:
        return {violation.promise for violation in self.violations()}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "one")


def first_extent(directory: Path, image_id: str = ID) -> Path:
    return next(path for path in sorted(directory.iterdir()) if path.name.endswith(("-flat.vmdk", "-f001.vmdk")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_as_it_was_answered_is_no_violation(tmp_path: Path, layout: str) -> None:
    made = Made(tmp_path / "one", layout)
    made.did("import")
    made.did("copy", source=NAME, target="one/b")
    made.did("update")
    made.did("copy", ERROR, "IMAGE_ALREADY_EXISTS", source="one/b")
    made.did("delete")
    made.did("touch", ERROR, "IMAGE_TOMBSTONED")
    made.did("restore")
    made.did("read", content=1)
    made.did("import", target="one/c")
    made.did("delete", target="one/c")
    made.there(1, update=3)
    made.there(1, "b")
    made.there(9, "c", deleted=True)
    assert made.violations() == []


def damage_zero(extent: Path) -> None:
    with extent.open("r+b") as file:
        file.write(bytes(BLOCK * 2))


def damage_mix(extent: Path) -> None:
    content = content_of(1)
    last = next(number for number in reversed(range(content.extents[0])) if content.has_data(number))
    with extent.open("r+b") as file:
        os.pwrite(file.fileno(), content_of(2).extent_runs(0)[0][1][:BLOCK], last * BLOCK)


def damage_short(extent: Path) -> None:
    os.truncate(extent, extent.stat().st_size - BLOCK)


def damage_hole(extent: Path) -> None:
    content = content_of(1)
    hole = next(number for number in range(content.extents[0]) if not content.has_data(number))
    with extent.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", hole * BLOCK)


def damage_all(extent: Path) -> None:
    extent.unlink()


def damage_companion(extent: Path) -> None:
    (extent.parent / NOTES).write_bytes(content_of(2).notes())


def damage_metadata(extent: Path) -> None:
    (extent.parent / f"{ID}.ecv").write_bytes(metadata(0)[:-1])


def damage_descriptor(extent: Path) -> None:
    (extent.parent / f"{ID}.vmdk").write_bytes(content_of(1).descriptor("other"))


@pytest.mark.parametrize(
    "damage",
    [
        damage_zero, damage_mix, damage_short, damage_hole, damage_all, damage_companion, damage_metadata,
        damage_descriptor,
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_is_not_whole(tmp_path: Path, layout: str, damage: Callable[[Path], None]) -> None:
    made = Made(tmp_path / "one", layout)
    made.did("import")
    damage(first_extent(made.there(1)))
    assert "whole" in made.promises()


def test_an_image_of_another_content_than_its_history_has(made: Made) -> None:
    made.did("import")
    made.there(2)
    assert made.promises() == {"order"}


def test_a_copy_that_is_not_its_sources(made: Made) -> None:
    made.did("import")
    made.did("import", target="one/b")
    made.did("copy", source="one/b", target="one/c")
    made.there(1)
    made.there(2, "b")
    made.there(1, "c")
    assert [violation.promise for violation in made.violations()] == ["order"]


def test_a_publish_that_is_lost(made: Made) -> None:
    made.did("import")
    assert made.promises() == {"order"}


@pytest.mark.parametrize("removal", ["force", "purge", "sweep"])
def test_a_publish_that_somebody_may_have_taken_is_not_lost(made: Made, removal: str) -> None:
    made.did("import")
    if removal == "purge":
        made.did("delete")
    made.did("scan")
    made.did(removal, UNKNOWN)
    assert made.violations() == []
    made.there(1, deleted=removal == "purge")
    assert made.violations() == []


def test_two_publishes_of_one_name_with_nothing_between(made: Made) -> None:
    made.did("import")
    made.did("import")
    made.there(2)
    assert made.promises() == {"order"}
    evidence = "\n".join(made.violations()[0].evidence)
    assert "#1 " in evidence and "#2 " in evidence


def test_two_publishes_at_once(made: Made) -> None:
    made.did("import", at=(0, 5))
    made.did("import", at=(1, 4))
    made.there(1)
    assert made.promises() == {"order"}


def test_two_publishes_with_a_removal_that_overlaps_are_lawful(made: Made) -> None:
    made.did("import", at=(0, 5))
    made.did("force", at=(3, 8))
    made.did("import", at=(1, 9))
    made.there(3)
    assert made.violations() == []


def test_a_delete_that_is_undone(made: Made) -> None:
    made.did("import")
    made.did("delete")
    made.there(1)
    assert made.promises() == {"order"}


def test_a_delete_whose_mark_is_gone_for_a_while(made: Made) -> None:
    made.did("import")
    made.did("delete")
    made.did("touch", wall=0.0)
    made.there(1, deleted=True)
    assert made.promises() == {"order"}


def test_a_restored_image_that_lost_its_metadata(made: Made) -> None:
    made.did("import")
    made.did("update")
    made.did("delete")
    made.did("restore")
    made.there(1, update=0)
    assert made.promises() == {"order"}


def test_a_restored_image_that_lost_a_companion_file(made: Made) -> None:
    made.did("import")
    made.did("delete")
    made.did("restore")
    (made.there(1) / NOTES).unlink()
    assert made.promises() == {"companions"}


def test_a_file_that_nobody_put_there(made: Made) -> None:
    made.did("import")
    (made.there(1) / "b.ecv").touch()
    assert made.promises() == {"companions"}


def test_a_purge_and_a_restore_that_both_succeed(made: Made) -> None:
    """As when one of them does not take the lock."""
    made.did("import")
    made.did("delete")
    made.did("purge", at=(30, 40))
    made.did("restore", at=(31, 39))
    assert made.promises() == {"order"}


def test_a_touch_that_is_forgotten(made: Made) -> None:
    made.did("import")
    made.did("touch", wall=2_000_000_000.0)
    made.there(1)
    assert made.promises() == {"touches"}


def test_a_sweep_of_what_was_touched_in_time(made: Made) -> None:
    made.did("import", at=(0, 1))
    made.did("scan", at=(2, 5))
    made.did("touch", at=(6, 7), wall=0.0)
    made.did("sweep", at=(8, 9), deleted=True, grace=1.0)
    assert made.promises() == {"sweep"}
    made.history.operations.insert(3, Operation(5, "w", "scan", NAME, ("sidecar-1",), 7.0, "", 7.5, OK))
    assert made.violations() == []


def test_a_call_is_repeated_when_its_sidecar_dies(made: Made) -> None:
    """The first try took effect, the second is told that there was one."""
    made.did("import")
    made.did("delete", ERROR, "IMAGE_TOMBSTONED", at=(20, 30))
    made.there(1, deleted=True)
    assert made.promises() == {"order"}
    made.saw("kill", 25)
    made.saw("started", 28)
    assert made.violations() == []


def test_a_lock_that_is_held_when_nobody_is_left(made: Made) -> None:
    made.did("import")
    lock = made.there(1).with_name(f"image_{ID}{LOCK}")
    made.saw("kill", 5)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert made.promises() == {"leftovers"}
    assert made.violations() == []


@pytest.mark.parametrize("left", ["tmp_image_x/a.vmdk", "deleted_images/x/a.vmdk", f"image_b{LOCK}", "image_a/.0123"])
def test_leftovers_of_which_nobody_died(made: Made, left: str) -> None:
    made.did("import")
    made.there(1)
    (made.root / left).parent.mkdir(parents=True, exist_ok=True)
    (made.root / left).touch()
    assert made.promises() == {"leftovers"}
    made.saw("kill", 5)
    assert made.violations() == []
    assert {violation.promise for violation in made.violations(made.read())} == {"leftovers"}, "a reap left it"


def test_half_an_image(made: Made) -> None:
    made.did("import", UNKNOWN)
    (made.there(1) / TIMESTAMP).unlink()
    assert made.promises() == {"order"}
    # Where images are moved file by file, who is killed leaves that.
    made.layout = "vsan"
    assert made.violations() == []


def test_a_stranger(made: Made) -> None:
    (made.root / "what").touch()
    assert made.promises() == {"leftovers"}


def test_a_start_that_changes_an_image(made: Made) -> None:
    made.did("import")
    made.there(1)
    before = made.read()
    (made.directory() / TOMBSTONE).touch()
    after = made.read()
    violations = Checker(made.history, {"one": before}, {"one": after}).check().violations
    assert [violation.promise for violation in violations] == ["restart"]


def events_that_tell() -> Iterable[tuple[str, str, dict[str, object]]]:
    quiet = {"pid": 1, "descriptors": 10, "threads": 10, "open": []}
    yield "leaks", "sample", quiet | {"open": ["/one/image_a/a.vmdk"]}
    yield "leaks", "sample", quiet | {"descriptors": 30}
    yield "leaks", "sample", quiet | {"threads": 60}
    yield "leaks", "mounts", {"left": ["/mnt"]}
    yield "processes", "died", {"status": -11}
    yield "processes", "not-started", {"error": "no"}
    yield "processes", "ended", {"status": 1}
    yield "hangs", "hangs", {"when": "after SIGTERM"}
    yield "restart", "listing", {"differs": {"one/a": [1, 3]}}


@pytest.mark.parametrize(("promise", "what", "details"), list(events_that_tell()))
def test_processes_that_leak_or_die(made: Made, promise: str, what: str, details: dict[str, object]) -> None:
    made.saw("sample", 1, pid=1, descriptors=10, threads=10, open=[])
    made.history.events.append(Event(what, "sidecar-0", 2, details))
    assert made.promises() == {promise}


@pytest.mark.parametrize("reason", ["INTERNAL", "INVALID_DISK", "DATASTORE_UNAVAILABLE"])
def test_answers_that_nobody_should_get(made: Made, reason: str) -> None:
    made.did("touch", ERROR, reason)
    assert made.promises() == {"answers"}


def test_a_reader_who_is_given_other_bytes(made: Made) -> None:
    made.did("import")
    made.did("read", content=1, fault="block 3 is zeroed")
    made.there(1)
    assert made.promises() == {"whole"}


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    times = iter(range(100))
    with Recorder(tmp_path / "history", clock=lambda: float(next(times))) as recorder:
        first = recorder.begin("w", "copy", "one/b", ["sidecar-0"], "one/a")
        recorder.begin("w", "import", "one/c", ["sidecar-0"])
        recorder.event("kill", "sidecar-0", pid=1)
        recorder.end(first, ERROR, "NO_SPACE", {"message": "full"})
    history = read_history(tmp_path / "history")
    assert [(one.id, one.kind, one.outcome, one.begin, one.end) for one in history.operations] == [
        (1, "copy", ERROR, 1.0, 4.0),
        (2, "import", UNKNOWN, 2.0, math.inf),
    ]
    assert history.operations[0] == first
    assert history.events == [Event("kill", "sidecar-0", 3.0, {"pid": 1})]


def test_the_checker_imports_nothing_of_what_it_judges() -> None:
    root = Path(tests.__file__).parent.parent
    seen: set[str] = set()
    left = ["tests.chaos.checker", "tests.chaos.report"]
    while left:
        module = left.pop()
        seen.add(module)
        for node in ast.walk(ast.parse((root / f"{module.replace('.', '/')}.py").read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in ("sidecar", "fusefs", "protos")], module
            left += [name for name in names if name.startswith("tests.") and name not in seen]
    assert "tests.chaos.content" in seen
