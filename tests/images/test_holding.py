"""Files that are held for readers elsewhere: each is open exactly as long as it is wanted, whatever comes between."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from sidecar.client import SidecarClient
from sidecar.datastores.interface import ReadableFile
from sidecar.errors import (
    DatastoreUnavailable,
    FileChanged,
    FileNotInImage,
    HolderNotFound,
    ImageInUse,
    InvalidRequest,
    OperationCancelled,
    SidecarUnavailable,
    TooManyCalls,
)
from sidecar.images.admission import Admission
from sidecar.images.holding import Holder, Holders
from tests.support.processes import Sidecar

MakeImage = Callable[[str], object]


class File:
    """An open file that counts."""

    inode = modified_ns = size = 0

    def __init__(self) -> None:
        self.closed = 0

    def read(self, offset: int, length: int) -> bytes:
        return b""

    def data_ranges(self, offset: int, length: int) -> list[tuple[int, int]]:
        return []

    def require_same(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


class Broken(File):
    """Its close fails."""

    def close(self) -> None:
        super().close()
        raise OSError("it is gone")


def wanted() -> bool:
    return True


class Slow:
    """Opens a file in another thread, when it is told to."""

    def __init__(self) -> None:
        self.file = File()
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self) -> ReadableFile:
        self.asked.set()
        assert self.go.wait(10)
        return self.file


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_what_is_released_while_it_is_being_opened_does_not_stay_open(pool: ThreadPoolExecutor) -> None:
    holder, slow = Holder(), Slow()
    holding = pool.submit(holder.hold, 1, slow, wanted)
    assert slow.asked.wait(10)
    holder.release(1)
    again = File()
    holder.hold(1, lambda: again, wanted)
    slow.go.set()
    assert isinstance(holding.exception(10), OperationCancelled)
    assert (slow.file.closed, again.closed) == (1, 0)
    holder.release(1)
    assert again.closed == 1


def test_what_is_opened_when_its_holder_has_ended_does_not_stay_open(pool: ThreadPoolExecutor) -> None:
    holders, slow = Holders(), Slow()
    with holders.opened() as holder:
        holding = pool.submit(holder.hold, 1, slow, wanted)
        assert slow.asked.wait(10)
    slow.go.set()
    assert isinstance(holding.exception(10), OperationCancelled)
    assert slow.file.closed == 1
    with pytest.raises(HolderNotFound):
        holder.hold(2, File, wanted)
    with pytest.raises(HolderNotFound):
        holders.get(holder.id)


def test_what_nobody_waits_for_any_more_does_not_stay_open() -> None:
    file = File()
    with pytest.raises(OperationCancelled):
        Holder().hold(1, lambda: file, lambda: False)
    assert file.closed == 1


def test_a_number_and_a_place_are_free_after_an_error_and_taken_until_the_release() -> None:
    def fail() -> ReadableFile:
        raise FileNotInImage("not there")

    holder = Holder(most=1)
    with pytest.raises(FileNotInImage):
        holder.hold(1, fail, wanted)
    holder.hold(1, File, wanted)
    with pytest.raises(InvalidRequest, match="number 1 is used already"):
        holder.hold(1, File, wanted)
    with pytest.raises(TooManyCalls, match="1 files are held already"):
        holder.hold(2, File, wanted)
    holder.release(2)
    holder.release(1)
    holder.hold(2, File, wanted)


def test_files_stay_open_in_a_sidecar_that_ends_until_no_call_runs_any_more() -> None:
    """A purge that still runs would take them away, and the next sidecar could not hold them."""
    holders, file = Holders(), File()
    with pytest.raises(SidecarUnavailable), holders.opened() as holder:
        holder.hold(1, lambda: file, wanted)
        holders.end()
        holder.wait()
    assert file.closed == 0
    with pytest.raises(SidecarUnavailable), holders.opened():
        pass
    holders.close()
    assert file.closed == 1


def opening(file: File) -> Callable[[], ReadableFile]:
    return lambda: file


def test_a_file_that_cannot_be_closed_keeps_no_other_one_open(caplog: pytest.LogCaptureFixture) -> None:
    holders = Holders()
    of_one, of_the_end = [Broken(), File()], [Broken(), File()]
    with holders.opened() as holder:
        for number, file in enumerate(of_one):
            holder.hold(number, opening(file), wanted)
    assert [file.closed for file in of_one] == [1, 1]
    with pytest.raises(SidecarUnavailable), ExitStack() as stack:
        for file in of_the_end:
            stack.enter_context(holders.opened()).hold(1, opening(file), wanted)
        holders.end()
    holders.close()
    assert [file.closed for file in of_the_end] == [1, 1]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["held file not closed cause=it is gone"] * 2


def test_a_file_is_opened_and_closed_in_a_place_of_its_datastore(pool: ThreadPoolExecutor) -> None:
    admission = Admission("one", calls=1, patience=0)
    holder, slow = Holder(), Slow()

    def is_full() -> bool:
        try:
            with admission.call():
                return False
        except DatastoreUnavailable:
            return True

    class Placed(File):
        def close(self) -> None:
            assert is_full()
            super().close()

    slow.file, kept = Placed(), Placed()
    holding = pool.submit(holder.hold, 1, slow, wanted, admission.call)
    assert slow.asked.wait(10)
    assert is_full()
    holder.release(1)  # which is not there yet, and needs none
    slow.go.set()
    assert isinstance(holding.exception(10), OperationCancelled)
    holder.hold(2, lambda: kept, wanted, admission.call)
    with admission.call(), pytest.raises(DatastoreUnavailable):
        holder.release(2)
    assert (slow.file.closed, kept.closed) == (1, 0)
    admission.ask(lambda: "", lambda: "it has a fault")
    for _ in range(2):
        holder.release(2)
    assert kept.closed == 1


def test_a_close_that_hangs_at_the_end_of_a_holder_keeps_no_file_of_another_datastore(pool: ThreadPoolExecutor) -> None:
    over, closed = threading.Event(), threading.Event()

    class Hanging(File):
        def close(self) -> None:
            assert over.wait(10)
            super().close()

    class Told(File):
        def close(self) -> None:
            closed.set()

    holder, hanging = Holder(), Hanging()
    holder.hold(1, lambda: hanging, wanted, Admission("one").call)
    holder.hold(2, Told, wanted, Admission("two").call)
    closing = pool.submit(holder.close)
    assert closed.wait(5)
    assert not closing.done()
    over.set()
    closing.result(10)
    assert hanging.closed == 1


def test_a_held_file_is_the_expected_one_and_of_an_image(client: SidecarClient, make_image: MakeImage) -> None:
    make_image("one/a")
    file = next(file for file in client.image("one/a").files if file.name == "a-flat.vmdk")
    with client.open_holder() as holder:
        holder.hold(1, "one/a", file.name, expected=file)
        file.size_bytes += 1
        with pytest.raises(FileChanged):
            holder.hold(2, "one/a", file.name, expected=file)
        for name, error in (
            ("none.vmdk", FileNotInImage),
            ("image_timestamp.txt", InvalidRequest),
            ("../a", InvalidRequest),
        ):
            with pytest.raises(error):
                holder.hold(2, "one/a", name)
        with pytest.raises(ImageInUse, match="in use by image-sidecar"):
            client.delete("one/a", force=True)
        holder.release(1)
        client.delete("one/a", force=True)


def test_holders_leave_room_for_calls_and_are_bounded(sidecar: Sidecar, client: SidecarClient) -> None:
    holders = [client.open_holder() for _ in range(64)]  # max_watches
    for holder in holders:
        holder.__enter__()
    with pytest.raises(TooManyCalls, match="64 holders of files are running"), client.open_holder():
        pass
    assert len(client.datastores()) == 3
    # They are not waited for at the end: running calls have 10 s.
    assert sidecar.stop(timeout=8) == 0
    with pytest.raises(SidecarUnavailable):
        holders[0].wait()
