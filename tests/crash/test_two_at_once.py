"""Several who want the same image at the same time: threads of one sidecar, and two sidecars on one datastore."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar.client import SidecarClient
from tests.crash.support import LAYOUTS, answers, image_directory, remains, write_image
from tests.support.disks import assert_same_disk, import_image
from tests.support.processes import Sidecar, wait_until

ROUNDS = 6
STATES = (IMAGE_STATE_VALID, IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED)


def two_sidecars(tmp_path: Path, stack: ExitStack, layout: str) -> list[SidecarClient]:
    root = tmp_path / "one"
    root.mkdir(exist_ok=True)
    started = [
        stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}", name=name)) for name in "ab"
    ]
    return [stack.enter_context(sidecar.client()) for sidecar in started]


def at_once(calls: Sequence[Callable[[], object]]) -> list[str]:
    """Each call in a thread of its own, all let go together; their answers in the order of the calls."""
    found = [""] * len(calls)
    gate = threading.Barrier(len(calls))

    def work(index: int) -> None:
        gate.wait(10)
        found[index] = answers(calls[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(found), "every call ends"
    return found


def assert_one_winner(found: list[str]) -> None:
    assert Counter(found) == {"ok": 1, "IMAGE_ALREADY_EXISTS": len(found) - 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_two_sidecars_that_make_the_same_image_one_wins(
    tmp_path: Path, stack: ExitStack, layout: str, disk: Path
) -> None:
    root = tmp_path / "one"
    write_image(root, layout, "source", dense=True)
    first, second = two_sidecars(tmp_path, stack, layout)
    for number in range(ROUNDS):
        copies = f"one/copied-{number}"
        assert_one_winner(at_once([lambda c=c: c.copy("one/source", copies).wait() for c in (first, second)]))  # type: ignore[misc]
        imports = f"one/imported-{number}"
        assert_one_winner(at_once([lambda c=c: import_image(c, imports, disk) for c in (first, second)]))  # type: ignore[misc]
        assert_same_disk(disk, image_directory(root, layout, f"imported-{number}") / f"imported-{number}.vmdk")
        first.validate(copies)
    made = [f"{kind}-{number}" for kind in ("copied", "imported") for number in range(ROUNDS)]
    assert remains(root, "source", *made) == []
    for client in (first, second):
        wait_until(lambda: len(list(client.images("one"))) == 2 * ROUNDS + 1, "both know all of them")  # noqa: B023


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_eight_threads_that_copy_to_the_same_image_one_wins(tmp_path: Path, stack: ExitStack, layout: str) -> None:
    root = tmp_path / "one"
    write_image(root, layout, "source", dense=True)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    for number in range(ROUNDS):
        assert_one_winner(at_once([lambda n=number: client.copy("one/source", f"one/t-{n}").wait()] * 8))  # type: ignore[misc]
        client.validate(f"one/t-{number}")
    assert remains(root, "source", *(f"t-{number}" for number in range(ROUNDS))) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_at_once_on_one_image_gives_documented_answers_and_a_consistent_end(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = tmp_path / "one"
    write_image(root, layout, "source", dense=True)
    clients = two_sidecars(tmp_path, stack, layout)
    documented = {
        "copy": {"ok", "IMAGE_ALREADY_EXISTS", "IMAGE_NOT_FOUND", "LOCK_TIMEOUT"},
        "delete": {"ok", "IMAGE_TOMBSTONED", "IMAGE_NOT_FOUND"},
        "restore": {"ok", "IMAGE_NOT_TOMBSTONED", "IMAGE_NOT_FOUND", "IMAGE_INCOMPLETE"},
        "purge": {"ok", "IMAGE_NOT_TOMBSTONED", "IMAGE_NOT_FOUND", "IMAGE_IN_USE"},
        "force": {"ok", "IMAGE_NOT_FOUND", "IMAGE_IN_USE"},
        "touch": {"ok", "IMAGE_TOMBSTONED", "IMAGE_NOT_FOUND", "IMAGE_INCOMPLETE"},
        "get": {"ok", "IMAGE_NOT_FOUND"},
        "away": {
            "ok",
            "IMAGE_ALREADY_EXISTS",
            "IMAGE_NOT_FOUND",
            "IMAGE_TOMBSTONED",
            "IMAGE_INCOMPLETE",
            "IMAGE_IN_USE",
        },
    }
    seen: Counter[tuple[str, str]] = Counter()
    for _ in range(ROUNDS * 2):
        calls: list[tuple[str, Callable[[], object]]] = []
        for client in clients:
            c = client
            calls += [
                ("copy", lambda c=c: c.copy("one/source", "one/a").wait()),  # type: ignore[misc]
                ("delete", lambda c=c: c.delete("one/a")),  # type: ignore[misc]
                ("restore", lambda c=c: c.restore("one/a")),  # type: ignore[misc]
                ("purge", lambda c=c: c.purge("one/a")),  # type: ignore[misc]
                ("force", lambda c=c: c.delete("one/a", force=True)),  # type: ignore[misc]
                ("touch", lambda c=c: c.touch("one/a")),  # type: ignore[misc]
                ("get", lambda c=c: c.image("one/a")),  # type: ignore[misc]
                ("away", lambda c=c: c.copy("one/a", "one/b").wait()),  # type: ignore[misc]
            ]
        found = at_once([call for _, call in calls])
        for (kind, _), answer in zip(calls, found, strict=True):
            seen[kind, answer] += 1
    wrong = {pair: count for pair, count in seen.items() if pair[1] not in documented[pair[0]]}
    assert not wrong, wrong
    assert remains(root, "source", "a", "b") == []
    first, second = clients
    for image_id in ("a", "b"):
        state = answers(lambda image_id=image_id: first.image(f"one/{image_id}"))  # type: ignore[misc]
        assert state == answers(lambda image_id=image_id: second.image(f"one/{image_id}"))  # type: ignore[misc]
        if state == "IMAGE_NOT_FOUND":
            assert not image_directory(root, layout, image_id).exists()
        elif first.image(f"one/{image_id}").state == IMAGE_STATE_VALID:
            first.validate(f"one/{image_id}")
    listings = [lambda c=c: [(i.ref.image_id, i.state) for i in c.images("one", states=STATES)] for c in clients]  # type: ignore[misc]
    wait_until(lambda: listings[0]() == listings[1](), "both catalogues agree")
