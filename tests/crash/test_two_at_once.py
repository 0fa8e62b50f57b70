"""Several who want the same image at the same time: threads of one sidecar, and two sidecars on one datastore."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
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
        copies = f"copied-{number}"
        assert_one_winner(at_once([partial(copy, client, "source", copies) for client in (first, second)]))
        imports = f"one/imported-{number}"
        assert_one_winner(at_once([partial(import_image, client, imports, disk) for client in (first, second)]))
        assert_same_disk(disk, image_directory(root, layout, f"imported-{number}") / f"imported-{number}.vmdk")
        first.validate(f"one/{copies}")
    made = [f"{kind}-{number}" for kind in ("copied", "imported") for number in range(ROUNDS)]
    assert remains(root, "source", *made) == []
    wait_until(lambda: len(listing(first)) == len(listing(second)) == 2 * ROUNDS + 1, "both know all of them")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_eight_threads_that_copy_to_the_same_image_one_wins(tmp_path: Path, stack: ExitStack, layout: str) -> None:
    root = tmp_path / "one"
    write_image(root, layout, "source", dense=True)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    for number in range(ROUNDS):
        assert_one_winner(at_once([partial(copy, client, "source", f"t-{number}")] * 8))
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
            calls += [
                ("copy", partial(copy, client, "source", "a")),
                ("delete", partial(client.delete, "one/a")),
                ("restore", partial(client.restore, "one/a")),
                ("purge", partial(client.purge, "one/a")),
                ("force", partial(client.delete, "one/a", force=True)),
                ("touch", partial(client.touch, "one/a")),
                ("get", partial(client.image, "one/a")),
                ("away", partial(copy, client, "a", "b")),
            ]
        found = at_once([call for _, call in calls])
        for (kind, _), answer in zip(calls, found, strict=True):
            seen[kind, answer] += 1
    wrong = {pair: count for pair, count in seen.items() if pair[1] not in documented[pair[0]]}
    assert not wrong, wrong
    assert remains(root, "source", "a", "b") == []
    first, second = clients
    for ref in ("one/a", "one/b"):
        state = answers(partial(first.image, ref))
        assert state == answers(partial(second.image, ref))
        if state == "IMAGE_NOT_FOUND":
            assert not image_directory(root, layout, ref.partition("/")[2]).exists()
        elif first.image(ref).state == IMAGE_STATE_VALID:
            first.validate(ref)
    wait_until(lambda: listing(first) == listing(second), "both catalogues agree")


def copy(client: SidecarClient, source: str, destination: str) -> None:
    client.copy(f"one/{source}", f"one/{destination}").wait()


def listing(client: SidecarClient) -> list[tuple[str, int]]:
    return [(image.ref.image_id, image.state) for image in client.images("one", states=STATES)]
