"""The images in the making of one mount: made by mkdir; published by a close, a sync or time passing; or dropped.

An image that was just published keeps a little of its past for some seconds: the names that its copier used go on
resolving, for the chmod, chown and utimens that copiers end with, and companion files may still arrive.
"""

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from fusefs.contents import RemotePlace, open_place
from fusefs.doubts import Key
from fusefs.errors import fail, is_transient
from fusefs.patience import LOCK_SECONDS
from fusefs.processes import caller
from fusefs.pulse import Pulse
from fusefs.rules import Rules
from fusefs.staged import Commit, StagedDirectory, State
from fusefs.tree import IndexedDatastore, Tree
from sidecar.client import MAX_COMPANION_BYTES, Image, ImageRef, ImageState, SidecarClient
from sidecar.client_calls import new_request_id
from sidecar.errors import (
    DatastoreUnavailable,
    DeadlineExceeded,
    ImageAlreadyExists,
    ImageNotFound,
    ImagesError,
    ImageTombstoned,
    InternalError,
    OperationCancelled,
    SidecarUnavailable,
    StagingNotFound,
    TooManyCalls,
)

_log = logging.getLogger(__name__)

# How long an image that was just published remembers its copier, after the last time that this was needed.
RECENT_SECONDS = 10.0
_MOST_RECENT_SECONDS = 60.0
# How long the end of the mount waits for a sidecar that does not answer.
_END_SECONDS = 5.0
# Until a publish that failed by what may pass is tried again.
_RETRY_SECONDS = 5.0
# With these it may be an image. With any other error of a commit the sidecar says that it did not publish, and that
# what is staged is as it was.
_NO_ANSWERS = (SidecarUnavailable, DeadlineExceeded, OperationCancelled, InternalError)
# With these a commit may not have begun, which tells nothing of one that was sent before.
_NOT_BEGUN = (TooManyCalls, DatastoreUnavailable)


@dataclass(slots=True, eq=False)
class LateCompanion:
    """A companion file on its way into an image that is published already."""

    name: str  # as its writer calls it
    inode: int
    data: bytearray = field(default_factory=bytearray)
    changed: bool = True
    is_cut: bool = False  # it was written to beyond what an image can get so
    handles: int = 1

    @property
    def is_temporary(self) -> bool:
        """Whether no image has a file called that: its writer renames it when it is complete, as rsync does."""
        return self.name.startswith(".")

    def write(self, data: memoryview, offset: int) -> None:
        end = offset + len(data)
        if end > MAX_COMPANION_BYTES:
            self.is_cut = True
        self.require_whole()
        if len(self.data) < end:
            self.data.extend(bytes(end - len(self.data)))
        self.data[offset:end] = data
        self.changed = True

    def truncate(self, size: int) -> None:
        self.is_cut = size > MAX_COMPANION_BYTES
        self.require_whole()
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.changed = True

    def require_whole(self) -> None:
        if self.is_cut:
            fail(
                errno.EFBIG,
                f"{self.name} came after its image was published, and is larger than {MAX_COMPANION_BYTES} bytes: "
                "the image is without it; remove the image, and copy it anew with this file before its disk",
            )


@dataclass(slots=True)
class Recent:
    """What is remembered of the making of an image that was just published."""

    ref: ImageRef
    renamed: dict[str, str]  # names that the copier used, and what the files are called now
    until: float
    last: float  # never any longer than this
    late: dict[str, LateCompanion] = field(default_factory=dict)

    def final_name(self, name: str) -> str:
        """What a file that the copier calls `name` is to be called: companions follow the disk."""
        if name in self.renamed:
            return self.renamed[name]
        for old, new in self.renamed.items():
            stem, new_stem = old.removesuffix(".vmdk"), new.removesuffix(".vmdk")
            if old.endswith(".vmdk") and new == f"{self.ref.image_id}.vmdk" and name.startswith(f"{stem}."):
                return new_stem + name[len(stem) :]
        return name


class StagingArea:
    """The staged images of a mount by key.

    `changed` makes the kernel ask again about paths, `gone` makes it forget a name. In `change`, an image is shown
    where a staged one was, or the other way round, until the kernel knows.

    `lock_timeout`: seconds that a change waits for the lock of its image, until `end`.
    """

    def __init__(
        self,
        client: SidecarClient,
        pulse: Pulse,
        tree: Tree,
        rules: Rules,
        *,
        lock_timeout: float = LOCK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[Iterable[str]], None] = lambda paths: None,
        gone: Callable[[str], None] = lambda path: None,
        change: Callable[[Key], AbstractContextManager[None]] = lambda key: contextlib.nullcontext(),
    ) -> None:
        self._client = client
        self._pulse = pulse
        self._tree = tree
        self._rules = rules
        self._clock = clock
        self._changed = changed
        self._gone = gone
        self._change = change
        self._lock = threading.Lock()  # guards the dictionaries
        self._directories: dict[Key, StagedDirectory] = {}
        self._recent: dict[Key, Recent] = {}
        self._settled: set[StagedDirectory] = set()
        self._lock_timeout: float | None = lock_timeout
        self.work = threading.Condition()  # notified when there may be something to publish

    @property
    def directories(self) -> list[StagedDirectory]:
        with self._lock:
            return list(self._directories.values())

    def directory(self, key: Key) -> StagedDirectory | None:
        return self._directories.get(key)

    def recent(self, key: Key) -> Recent | None:
        """What is remembered of an image's making."""
        recent = self._recent.get(key)
        if recent is None:
            return None
        if self._clock() > recent.until:
            with self._lock:
                self._recent.pop(key, None)
            return None
        return recent

    def is_taken(self, directory: StagedDirectory) -> bool:
        """Whether there is an image of its name by now, which another host published, or another client."""
        image = self._tree.image(*_key(directory))
        return image is not None and image.is_valid and image.number != directory.number

    def keep(self, recent: Recent) -> None:
        """Its copier is still at it: it is remembered a while longer."""
        recent.until = min(self._clock() + RECENT_SECONDS, recent.last)

    def forget_recent(self, key: Key) -> None:
        """The image is deleted: whatever has its name next is another one."""
        with self._lock:
            self._recent.pop(key, None)

    def make(self, datastore: IndexedDatastore, image_id: str, pid: int) -> StagedDirectory:
        """Opens a staging directory; raises what the sidecar says at once when there can be no such image."""
        ref = ImageRef(datastore=datastore.name, image_id=image_id)
        self._pulse.require()
        try:
            staging = self._client.create_staging(ref)
        except ImageTombstoned as error:
            fail(errno.EEXIST, error.message)
        place = open_place(self._client, self._pulse, staging, datastore.info.root_path, datastore.info.reserve_bytes)
        directory = StagedDirectory(ref, staging, place, self._tree.new_number(), caller(pid), self._clock)
        key = (datastore.name, image_id)
        with self._lock:
            lost = key in self._directories
            if not lost:
                self._directories[key] = directory
                self._recent.pop(key, None)
        if lost:
            self._drop(directory, "made twice")
            fail(errno.EEXIST)
        _log.info(
            "staging begun image=%s directory=%s local=%s", directory, staging.directory, not _is_remote(directory)
        )
        self.wake()
        return directory

    def closing(self, directory: StagedDirectory) -> None:
        """A file that was open for writing is being closed: publishes what is wholly a copy of one image.

        Raises what went wrong, so that the close reports it: also that what is staged is gone, which nothing else
        would tell a copier whose last write is behind it.
        """
        if directory.state is State.OPEN and directory.lease_in_doubt:
            self._pulse.require()
            self.renew(directory)
        if directory.state is State.GONE:
            fail(errno.ESTALE, f"{directory} is gone: {directory.reason}")
        if directory.state is State.OPEN and directory.writers == 1:
            self._publish_copy(directory, closing=True)

    def renamed(self, directory: StagedDirectory) -> None:
        """A file has its name now: the same question as when one is closed."""
        if directory.state is State.OPEN and directory.writers == 0:
            self._publish_copy(directory, closing=False)

    def publish(self, directory: StagedDirectory, *, closing: bool = False) -> None:
        """Publishes, whatever the rules say of completeness: the sidecar checks the disk.

        EIO for a file whose writer failed or was killed. EBUSY while a file is open for writing. After another
        error the directory is still there, unless the image exists already; `reason` says why, and `retry_at` when it
        is tried again, if it is. It is UNCERTAIN when the error does not say whether it was published.
        """
        directory.wait_published()  # another's try: this one is told what came of it
        with directory.publishing(closing) as allowed:
            if not allowed:
                match directory.state:
                    case State.PUBLISHED:
                        return
                    case State.GONE:
                        fail(errno.ESTALE, f"{directory} is gone: {directory.reason}")
                    case State.UNCERTAIN:
                        fail(errno.EIO, f"it is not known whether {directory} was published: {directory.reason}")
                    case _:
                        fail(errno.EBUSY, f"{directory} has a file open for writing")
            directory.tried_version = directory.version
            directory.retry_at = 0.0
            try:
                if directory.spoiled:
                    fail(errno.EIO, f"{directory} can only be removed: {directory.spoiled}")
                for file in directory.files:
                    if file.given_up:
                        fail(errno.EIO, f"{file.name} is not complete: {file.given_up}")
                    with file.complete_or_given_up():
                        file.content.sync()
            except OSError as error:
                directory.reason = str(error)
                directory.let_go()
                raise
            self._commit(directory)

    def resolve(self, directory: StagedDirectory) -> None:
        """Gets the answer to a publish that was lost, and publishes when it was not begun."""
        with directory.publishing(closing=False, resolving=True) as allowed:
            if allowed:
                self._commit(directory)

    def _commit(self, directory: StagedDirectory) -> None:
        """While publishing: published, or dropped, or uncertain, or an error that left everything as it was.

        In the last case it is tried again when that may help, whether or not a tool was told of the error.
        """
        try:
            with self._tree.changing(_key(directory)):
                self._ask_to_publish(directory)
        except ImagesError as error:
            if is_transient(error) and directory.unanswered is None:
                directory.retry_at = self._clock() + _RETRY_SECONDS
                self.wake()
            elif directory.unanswered is None:
                directory.let_go()
            raise

    def _ask_to_publish(self, directory: StagedDirectory) -> None:
        try:
            self._pulse.require()
        except SidecarUnavailable as error:
            directory.reason = error.message
            raise
        started = self._clock()
        key = _key(directory)
        repeated = directory.unanswered
        commit = repeated or Commit(new_request_id(), self._rules.copied_from(directory))
        copied_from = commit.copied_from
        self._tree.expect(key, directory.number)
        try:
            answer = directory.staging.commit(
                copied_from=copied_from, request_id=commit.request_id, lock_timeout=self._lock_timeout
            )
        except (ImageAlreadyExists, StagingNotFound) as error:
            # Another's image; or this one, and the sidecar that made it was restarted.
            directory.doubt(commit, error.message)
            if self._adopt(directory):
                return
            self._tree.expect(key, None)
            self._drop(directory, error.message)
            raise
        except ImagesError as error:
            if isinstance(error, _NO_ANSWERS) or (repeated and isinstance(error, _NOT_BEGUN)):
                directory.doubt(commit, error.message)
                if not repeated:
                    _log.warning("not known whether published image=%s cause=%s", directory, error.message)
            else:
                self._tree.expect(key, None)
                directory.unanswered = None
                directory.reason = error.message
            raise
        _log.info(
            "published image=%s copied_from=%s seconds=%.2f",
            directory,
            f"{copied_from.datastore}/{copied_from.image_id}" if copied_from else "",
            self._clock() - started,
        )
        self._published(directory, answer.image, dict(answer.renamed_files))

    def _adopt(self, directory: StagedDirectory) -> bool:
        """Whether there is an image of the staged files: then it was published.

        Only their inodes prove that: of a staging directory on another host they are not known. Then the image may be
        another's, of which nobody must be told that it is what they wrote.
        """
        try:
            image = self._client.image(directory.ref)
        except ImageNotFound:
            return False
        staged = {inode: file.name for file in directory.files if (inode := file.content.status().inode)}
        renamed = {staged[file.inode]: file.name for file in image.files if file.inode in staged}
        if image.state != ImageState.IMAGE_STATE_VALID or not renamed:
            return False
        _log.info("published image=%s copied_from= although its answer was lost", directory)
        self._published(directory, image, renamed)
        return True

    def abort(self, directory: StagedDirectory, reason: str) -> None:
        """Drops a staged image."""
        with directory.publishing(closing=False) as allowed:
            if not allowed:
                if directory.state is State.UNCERTAIN:
                    fail(errno.EIO, f"it is not known whether {directory} was published")
                if directory.state is not State.OPEN:
                    return
                fail(errno.EBUSY, f"{directory} has a file open for writing")
            self._drop(directory, reason)

    def doubt_leases(self) -> None:
        """The sidecar was away: if it was restarted, it knows of nothing that was staged before."""
        for directory in self.directories:
            directory.doubt_lease()

    def renew(self, directory: StagedDirectory) -> None:
        """Renews its lease; an image whose sidecar dropped it, or was restarted, is dropped here, too."""
        try:
            with directory.settling_lease():
                directory.staging.renew()
        except (StagingNotFound, ImageAlreadyExists) as error:
            self._lost(directory, error.message)
        except ImagesError:
            directory.doubt_lease()
            raise

    def _lost(self, directory: StagedDirectory, reason: str) -> None:
        if directory.state is State.OPEN:  # one that is being published, or may be, ends otherwise
            _log.warning("staging lost image=%s reason=%s", directory, reason)
            self._drop(directory, reason)

    def add_companion(self, recent: Recent, companion: LateCompanion) -> None:
        """A companion file arrived after its image was published: the image gets it now."""
        companion.require_whole()
        final = recent.final_name(companion.name)
        self._pulse.require()
        companion.changed = False
        files = {final: bytes(companion.data)}
        try:
            with self._tree.changing((recent.ref.datastore, recent.ref.image_id)):
                self._tree.changed(
                    self._client.update_metadata(recent.ref, files=files, lock_timeout=self._lock_timeout)
                )
        except BaseException:
            companion.changed = True  # for whoever else closes it
            raise
        recent.renamed[companion.name] = final

    def serving_ended(self, settle_seconds: float) -> None:
        """Nobody writes any more: what was left alone for the settle time by now is complete."""
        self._settled = {directory for directory in self.directories if directory.quiet_seconds >= settle_seconds}

    def end(self) -> None:
        """The mount is gone: publishes what is complete, drops the rest."""
        self._lock_timeout = None  # nobody waits in a request any more, and nothing is tried again
        if self.directories:
            with contextlib.suppress(ImagesError):
                self._pulse.require(_END_SECONDS)
        for directory in self.directories:
            why = "it was not complete, or not left alone for long enough: sync it before the mount ends"
            try:
                if directory.state is State.UNCERTAIN:
                    self.resolve(directory)
                elif directory in self._settled:
                    untried = directory.tried_version != directory.version or directory.retry_at
                    if untried and not self._rules.held_back(directory):
                        self.publish(directory)
                else:
                    self.renamed(directory)
            except (ImagesError, OSError) as error:
                why = str(error)
            if directory.state is State.UNCERTAIN:
                _log.warning("left to the sidecar, which may publish it or not image=%s cause=%s", directory, why)
            elif directory.state not in {State.PUBLISHED, State.GONE}:
                _log.warning("dropped image=%s reason=the mount ended cause=%s", directory, why)
                self._drop(directory, "the mount ended")

    def wake(self) -> None:
        with self.work:
            self.work.notify_all()

    def _publish_copy(self, directory: StagedDirectory, *, closing: bool) -> None:
        if self._rules.copied_from(directory) is not None:
            self.publish(directory, closing=closing)

    def _published(self, directory: StagedDirectory, image: Image, renamed: dict[str, str]) -> None:
        key = _key(directory)
        names = {file.name: renamed.get(file.name, file.name) for file in directory.files}
        with self._lock:
            now = self._clock()
            self._recent[key] = Recent(directory.ref, names, now + RECENT_SECONDS, now + _MOST_RECENT_SECONDS)
        path = f"/{key[0]}/{key[1]}"
        with self._change(key):
            self._tree.changed(image)
            with self._lock:
                self._directories.pop(key, None)
            directory.end(State.PUBLISHED)
            self._tree.expect(key, None)
            self._changed([*(f"{path}/{name}" for name in {*names, *names.values()}), path])

    def _drop(self, directory: StagedDirectory, reason: str) -> None:
        key = _key(directory)
        path = f"/{key[0]}/{key[1]}"
        directory.end(State.GONE, reason)
        with self._change(key):
            with self._lock:
                if self._directories.get(key) is directory:
                    del self._directories[key]
            self._changed([*(f"{path}/{file.name}" for file in directory.files), path])
        self._gone(path)
        try:
            self._pulse.require()
            directory.staging.abort()
        except ImagesError as error:
            # The lease is not renewed any more: the sidecar drops it by itself.
            _log.warning("staging not aborted image=%s cause=%s", directory, error.message)
        _log.info("staging dropped image=%s reason=%s", directory, reason)


def _key(directory: StagedDirectory) -> Key:
    return (directory.ref.datastore, directory.ref.image_id)


def _is_remote(directory: StagedDirectory) -> bool:
    return isinstance(directory.place, RemotePlace)
