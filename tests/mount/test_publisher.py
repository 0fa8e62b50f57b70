"""What is published, dropped or asked for again, by whom and when: one image's trouble is no other one's."""

import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from fusefs.attributes import Owner
from fusefs.contents import Content, LocalContent, LocalPlace, RemotePlace
from fusefs.deleting import Deletions
from fusefs.errors import AskAgain
from fusefs.generations import Generations
from fusefs.processes import NOBODY
from fusefs.provenance import Generation, SourceFile
from fusefs.publisher import ABANDONED_SECONDS, Publisher
from fusefs.pulse import Pulse
from fusefs.reading import Reader
from fusefs.rules import Rules
from fusefs.staged import Commit, StagedDirectory, State
from fusefs.staging import StagingArea
from fusefs.tree import IndexedDatastore, Tree
from fusefs.watching import Watcher
from fusefs.workers import Workers
from sidecar.client import ImageRef, ImageState, SidecarClient, Staging
from sidecar.errors import ImageAlreadyExists, ImagesError, LockTimeout, SidecarUnavailable
from tests.crash.stopping import held_back
from tests.mount.relay import Relay
from tests.support.disks import import_image, make_disk
from tests.support.processes import Mount, Sidecar, run, wait_until

SETTLE_SECONDS = 2.0
# For a test to find a publish that waits: longer than a mount has it wait.
LOCK_SECONDS = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def not_asked(source: SourceFile) -> Reader:
    raise AssertionError(f"{source} is no file of an image")


class Making:
    """What a mount makes images with, without the mount; the datastores are on another host when they are `hidden`."""

    def __init__(
        self,
        client: SidecarClient,
        stack: ExitStack,
        *,
        hidden: bool = False,
        changed: Callable[[Iterable[str]], None] = lambda paths: None,
    ) -> None:
        self.clock = Clock()
        tree = Tree()
        watcher = Watcher(client, tree)
        watcher.start()
        stack.callback(watcher.stop)
        assert tree.wait_complete(20)
        rules, pulse = Rules(tree, not_asked), Pulse(client)
        self.generations = Generations(5.0, clock=self.clock)
        self.area = StagingArea(
            client,
            pulse,
            tree,
            rules,
            lock_timeout=LOCK_SECONDS,
            clock=self.clock,
            changed=changed,
            change=self.generations.change,
        )
        deletions = Deletions(client, pulse, tree, SETTLE_SECONDS, clock=self.clock)
        self.publisher = Publisher(self.area, rules, deletions, SETTLE_SECONDS, clock=self.clock)
        found = tree.datastore("one")
        assert found is not None
        self.datastore: IndexedDatastore = found
        self.root = Path(found.info.root_path)
        if hidden:
            self.datastore.info.ClearField("root_path")

    def stage(self, *files: Path) -> StagedDirectory:
        directory = self.area.make(self.datastore, "new", 0)
        for path in files:
            file = directory.create(path.name)
            file.content.write(memoryview(path.read_bytes()), 0)
            directory.released(file, writable=True)
        return directory


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(lambda: None)
    yield workers
    workers.stop()


def test_a_lock_of_one_datastore_holds_up_no_other_ones_import(mount: Mount, tmp_path: Path) -> None:
    outside = make_disk(tmp_path / "outside", "x.vmdk").parent
    with held_back(tmp_path / "one", "compound", "new"):
        run("cp", "-r", outside, mount.path / "one" / "new")
        (staging,) = (path for path in (tmp_path / "one").glob("tmp_image_*") if path.is_dir())
        wait_until((staging / "image_timestamp.txt").exists, "it waits for its lock")
        run("cp", "-r", outside, mount.path / "two" / "new")
        wait_until(
            lambda: "new" in [path.name for path in (mount.path / "two").iterdir()], "the other one is there", 15
        )
        assert not (tmp_path / "one" / "image_new").exists()


def test_work_that_hangs_holds_up_no_other_groups_and_is_begun_once(workers: Workers) -> None:
    release, begun, done = threading.Event(), list[int](), threading.Event()

    def hang(number: int) -> None:
        begun.append(number)
        release.wait(60)

    try:
        for number in range(8):
            workers.begin("hangs", number, partial(hang, number))
            workers.begin("hangs", number, partial(hang, -1))
        workers.begin("other", "other", done.set)
        assert done.wait(20)
        assert workers.is_running(0)
    finally:
        release.set()
    wait_until(lambda: not any(map(workers.is_running, range(8))), "all of it is done")
    assert sorted(begun) == list(range(8))


def test_a_close_says_that_the_lease_is_lost_also_while_the_publisher_asks_for_it(
    client: SidecarClient, stack: ExitStack, tmp_path: Path
) -> None:
    """Its question is not answered yet: what is in doubt is not settled by asking."""
    making = Making(client, stack)
    (tmp_path / "notes.txt").write_text("n")
    directory = making.stage(tmp_path / "notes.txt")
    directory.staging.abort()  # as who was restarted: the sidecar knows nothing of it
    making.area.doubt_leases()
    pool = stack.enter_context(ThreadPoolExecutor())
    asking, answer = threading.Event(), threading.Event()
    stack.callback(answer.set)

    class Slow:
        def renew(self) -> None:
            asking.set()
            assert answer.wait(60)

    real, directory.staging = directory.staging, cast(Staging, Slow())
    renewing = pool.submit(making.area.renew, directory)
    assert asking.wait(60)
    directory.staging = real
    with pytest.raises(OSError) as caught:
        making.area.closing(directory)
    assert caught.value.errno == errno.ESTALE
    answer.set()
    renewing.result(60)


@pytest.mark.parametrize(
    "end", [StagingArea.publish, partial(StagingArea.abort, reason="removed")], ids=["published", "dropped"]
)
def test_where_an_image_was_staged_nothing_is_opened_before_the_kernel_was_told(
    end: Callable[[StagingArea, StagedDirectory], None],
    client: SidecarClient,
    stack: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be read with the size of the staged file."""
    monkeypatch.setattr("fusefs.generations._TOLD_SECONDS", 0.0)
    key, path, generation = ("one", "new"), "/one/new/new.vmdk", Generation(1, 1, 1)
    attributes = Owner(0, 0).file(7, 1, 1, 1)

    def open_file() -> None:
        making.generations.opened(key, path, generation, attributes, 0)

    def ask_and_open() -> None:
        making.generations.shown(key, path, generation, attributes, making.generations.begin())
        open_file()

    def changed(paths: Iterable[str]) -> None:
        assert path in paths
        with pytest.raises(AskAgain):
            ask_and_open()

    making = Making(client, stack, changed=changed)
    descriptor = make_disk(tmp_path / "outside", "new.vmdk")
    end(making.area, making.stage(*sorted(descriptor.parent.iterdir())))
    with pytest.raises(AskAgain):
        open_file()
    ask_and_open()


def test_what_nobody_goes_on_with_is_dropped_and_named(
    client: SidecarClient, stack: ExitStack, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    making = Making(client, stack)
    directory = stage_notes(making, tmp_path)
    making.clock.now += ABANDONED_SECONDS
    act(making, directory)
    assert directory.state is State.GONE
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "dropped image=one/new reason=nobody went on with it for 600 s: no file named *.vmdk yet",
    ]


def test_what_is_not_complete_hides_no_image_that_another_one_publishes_under_its_name(
    client: SidecarClient, stack: ExitStack, tmp_path: Path
) -> None:
    making = Making(client, stack)
    directory = stage_notes(making, tmp_path)
    import_image(client, "one/new", make_disk(tmp_path / "source"))
    wait_until(lambda: making.area.is_taken(directory), "the image is in the index")
    act(making, directory)
    assert directory.state is State.GONE
    assert client.image("one/new").state == ImageState.IMAGE_STATE_VALID


def test_what_became_of_a_publish_is_asked_for_less_and_less_often(
    sidecar: Sidecar, stack: ExitStack, tmp_path: Path
) -> None:
    client = stack.enter_context(sidecar.client())
    making = Making(client, stack)
    directory = making.stage()
    with directory.publishing(closing=False):
        directory.doubt(Commit("lost", None), "the answer was lost")
    client.cancel_calls()  # no answer any more
    pauses = []
    for _ in range(7):
        act(making, directory)
        assert directory.state is State.UNCERTAIN
        assert making.publisher.due(directory) is None
        pauses.append(directory.retry_at - making.clock.now)
        making.clock.now = directory.retry_at
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@pytest.fixture
def relayed(tmp_path: Path, stack: ExitStack) -> tuple[Relay, SidecarClient, SidecarClient]:
    """A connection to a sidecar that can be cut, a client by way of it, and one beside it."""
    (tmp_path / "one").mkdir()
    limits = "[limits]\nlock_timeout_seconds = 3\n"
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={tmp_path / 'one'}", config=limits))
    relay = stack.enter_context(Relay(sidecar.address, tmp_path / "run" / "relay.sock"))
    client = stack.enter_context(SidecarClient(relay.address))
    return relay, client, stack.enter_context(sidecar.client())


def lose_the_answer(relay: Relay, making: Making, directory: StagedDirectory) -> None:
    """Publishes while somebody has the image's lock, and cuts the connection."""
    errors: list[ImagesError] = []

    def publish() -> None:
        try:
            making.area.publish(directory)
        except ImagesError as error:
            errors.append(error)

    publishing = threading.Thread(target=publish)
    publishing.start()
    try:
        staging = making.root / directory.staging.directory
        wait_until((staging / "image_timestamp.txt").exists, "it is being published")
        relay.cut()
    finally:
        publishing.join(60)
    assert [type(error) for error in errors] == [SidecarUnavailable]
    assert directory.state is State.UNCERTAIN


def test_an_answer_that_was_lost_is_got_where_no_file_of_the_datastore_can_be_seen(
    relayed: tuple[Relay, SidecarClient, SidecarClient], disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    relay, client, _ = relayed
    making = Making(client, stack, hidden=True)
    directory = making.stage(disk, disk.with_name("disk-flat.vmdk"))
    assert isinstance(directory.place, RemotePlace)
    with held_back(tmp_path / "one", "compound", "new"):
        lose_the_answer(relay, making, directory)
    relay.join_again()
    making.area.resolve(directory)
    assert directory.state is State.PUBLISHED
    recent = making.area.recent(("one", "new"))
    assert recent is not None
    assert recent.renamed["disk-flat.vmdk"] == "new-flat.vmdk"


def test_anothers_image_is_not_taken_for_what_was_written(
    relayed: tuple[Relay, SidecarClient, SidecarClient], disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """The answer was lost, and said that it was refused; then somebody else made an image of that name."""
    relay, client, other = relayed
    making = Making(client, stack, hidden=True)
    directory = making.stage(disk, disk.with_name("disk-flat.vmdk"))
    with held_back(tmp_path / "one", "compound", "new"):
        lose_the_answer(relay, making, directory)
        log = tmp_path / "run" / "sidecar.log"
        wait_until(lambda: "LOCK_TIMEOUT" in log.read_text(), "it was refused")
    import_image(other, "one/new", make_disk(tmp_path / "others", seed=99))
    relay.join_again()
    with pytest.raises(ImageAlreadyExists):
        making.area.resolve(directory)
    assert directory.state is State.GONE


@pytest.mark.parametrize("lost", [False, True], ids=["answered", "answer lost"])
def test_a_publish_that_was_refused_for_a_lock_is_tried_again_whoever_asked_for_it(
    lost: bool, relayed: tuple[Relay, SidecarClient, SidecarClient], disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    relay, client, _ = relayed
    making = Making(client, stack)
    directory = making.stage(disk, disk.with_name("disk-flat.vmdk"))
    with held_back(tmp_path / "one", "compound", "new"):
        if lost:
            lose_the_answer(relay, making, directory)
            relay.join_again()
        with pytest.raises(LockTimeout):
            making.area.resolve(directory) if lost else making.area.publish(directory)
    assert directory.unanswered is None
    assert "is held by" in directory.reason
    making.clock.now += SETTLE_SECONDS
    assert making.publisher.due(directory) is None
    making.clock.now = directory.retry_at
    act(making, directory)
    assert directory.state is State.PUBLISHED


class SlowPlace(LocalPlace):
    """A place where a file is made as late as the test likes."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lambda fd: True)
        self.asked, self.goes_on = threading.Event(), threading.Event()

    def create(self, name: str) -> Content:
        self.asked.set()
        self.goes_on.wait(60)
        return super().create(name)


def test_who_looks_into_a_staged_directory_does_not_wait_for_a_file_that_is_being_made(tmp_path: Path) -> None:
    place = SlowPlace(tmp_path)
    ref = ImageRef(datastore="one", image_id="new")
    directory = StagedDirectory(ref, cast(Staging, None), place, number=1, maker=NOBODY, clock=lambda: 0.0)
    looked = threading.Event()

    def look() -> None:
        directory.wait_published()
        if not directory.files and directory.file("a.vmdk") is None:
            looked.set()

    threads = [threading.Thread(target=directory.create, args=("a.vmdk",)), threading.Thread(target=look)]
    try:
        threads[0].start()
        assert place.asked.wait(20)
        threads[1].start()
        assert looked.wait(20)
    finally:
        place.goes_on.set()
        for thread in threads:
            thread.join(20)
    [file] = directory.files
    assert isinstance(file.content, LocalContent)
    file.content.close()
    place.close()


def stage_notes(making: Making, directory: Path) -> StagedDirectory:
    """What was left alone for the settle time and is no image: it is kept, and nothing is due."""
    (directory / "notes.txt").write_text("n")
    staged = making.stage(directory / "notes.txt")
    making.clock.now += SETTLE_SECONDS
    act(making, staged)
    assert making.publisher.due(staged) is None
    return staged


def act(making: Making, directory: StagedDirectory) -> None:
    """Does what is due."""
    action = making.publisher.due(directory)
    assert action is not None
    action()
