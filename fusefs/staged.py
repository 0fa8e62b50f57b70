"""One image in the making: its staged files, who is writing to them, and whether it may change at all."""

import contextlib
import enum
import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fusefs.attributes import Attributes, Owner
from fusefs.claims import Claim
from fusefs.contents import Content, NamesUnknownError, Place
from fusefs.errors import fail
from fusefs.processes import NOBODY, Caller
from fusefs.provenance import Provenance
from fusefs.tree import directory_inode, staged_inode
from sidecar.client import ImageRef, Staging
from sidecar.errors import ImagesError

# Files of the sidecar's own, which nobody else writes into an image.
_OWN_NAMES = {"image_timestamp.txt", "image_timestamp.txt.renamed", "image_tombstone.txt", "unused_image_marker.txt"}
_OWN_SUFFIX = ".ec_lock"
_OWN_PREFIX = "tmp_image_"

# For how long a process that made a directory is believed to be about to go on with it.
_MAKER_SECONDS = 2.0

# What a call that wants to change a staged image waits at most for a publish of it to end.
PUBLISH_WAIT_SECONDS = 300.0

RENAME_NOREPLACE = 1

# With these nothing was done, and programs do the same in another way.
_NOT_TRIED = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}


class State(enum.Enum):
    OPEN = "open"
    PUBLISHING = "publishing"
    UNCERTAIN = "uncertain"  # the answer to its publish was lost: its files may be an image's already
    PUBLISHED = "published"
    GONE = "gone"  # aborted, or dropped by the sidecar


class Commit(NamedTuple):
    """What the sidecar is asked to publish: asked for once more, the same one gets the answer of the first time."""

    request_id: str
    copied_from: ImageRef | None


class StagedFile:
    """A file that is being written. `lock` guards its provenance, and keeps a write and its record together."""

    def __init__(self, name: str, content: Content, inode: int, maker: Caller) -> None:
        self.name = name
        self.maker = maker  # who made it, if that is known
        self.inode = inode  # as the mount shows it
        self.content = content
        self.lock = threading.Lock()
        self.provenance = Provenance()
        self.handles = 0
        self.removed = False
        self.given_up = ""  # why it is not complete, whatever it looks like, until it is written anew

    @contextlib.contextmanager
    def complete_or_given_up(self) -> Iterator[None]:
        """For the time of one change: when it fails, the file lacks what its writer wanted in it."""
        try:
            yield
        except (OSError, ImagesError) as error:
            if error.errno not in _NOT_TRIED:
                self.given_up = f"a change of it failed: {error}"
            raise

    def attributes(self, owner: Owner) -> Attributes:
        status = self.content.status()
        return owner.file(self.inode, status.size, status.allocated, status.modified_ns, writable=True)


class StagedDirectory:
    """A staging directory as the mount shows it. `clock` is monotonic; times are in its seconds.

    `_condition` guards the state, the files, and the counts. A change holds the directory open for its duration, so
    that a publish begins when no change runs and none begins while it runs.

    Names are made and changed one at a time, with `_naming`, which is taken before `_condition`: where the staging
    directory is on another host that takes as long as the sidecar likes, and whoever looks at what is there must not
    wait for it.
    """

    def __init__(
        self,
        ref: ImageRef,
        staging: Staging,
        place: Place,
        number: int,
        maker: Caller,
        clock: Callable[[], float],
    ) -> None:
        self.ref = ref
        self.staging = staging
        self.place = place
        self.number = number
        self.maker = maker  # whose mkdir it was
        self._claim = Claim(maker)
        self._clock = clock
        self._condition = threading.Condition()
        self._naming = threading.Lock()
        self._files: dict[str, StagedFile] = {}
        self._serials = itertools.count()
        self._changes_running = 0
        self.state = State.OPEN
        self.writers = 0  # open handles that may write
        self.version = 0  # counts what changed
        self.touched_at = clock()
        self.modified_ns = time.time_ns()
        self.tried_version = -1  # the version that could not be published
        self.retry_at = 0.0  # when to try that version again; 0: not before it changes
        self.unanswered: Commit | None = None  # nobody knows what became of it
        self.resolve_pause = 0.0  # since the last question what became of its publish, in seconds
        self.reason = ""  # why it is not published
        self.spoiled = ""  # why it will never be published, and takes no change but removals
        self._doubt = self._settled = object()
        self.maker_was_killed = False

    @property
    def inode(self) -> int:
        return directory_inode(self.number)

    @property
    def lease_in_doubt(self) -> bool:
        """Whether the sidecar may have been restarted since it answered last."""
        return self._doubt is not self._settled

    def doubt_lease(self) -> None:
        self._doubt = object()

    @contextlib.contextmanager
    def settling_lease(self) -> Iterator[None]:
        """Asking the sidecar, in the block: without an error, what was in doubt before is settled, and only that."""
        doubt = self._doubt
        yield
        self._settled = doubt

    @property
    def files(self) -> list[StagedFile]:
        with self._condition:
            return list(self._files.values())

    def file(self, name: str) -> StagedFile | None:
        return self._files.get(name)

    @property
    def quiet_seconds(self) -> float:
        return self._clock() - self.touched_at

    def require_left(self, caller: Caller, *, removing: bool = False) -> None:
        """EBUSY while the directory's maker is at it, and the caller is neither that nor a child of it."""
        is_busy = self.writers > 0 or self.quiet_seconds < _MAKER_SECONDS
        self._claim.require_left(self, caller, is_busy=is_busy, removing=removing)

    def require_writable(self, file: StagedFile, caller: Caller) -> None:
        """EBUSY when the file is another's."""
        self.require_left(caller)
        self._require_over(file, caller)
        self._claim.wrote(caller)

    def _require_over(self, file: StagedFile, caller: Caller) -> None:
        try:
            self._claim.require_over(self, file.name, file.maker, caller)
        except OSError:
            # What it has made here before is of another image, of which nothing else will come.
            for other in self.files:
                if other.maker.process == caller.process:
                    other.given_up = "whoever made it was refused the next file"
            raise

    def let_go(self) -> None:
        """It cannot be published as it is: whoever likes goes on with it."""
        self._claim.let_go()

    def wait_published(self) -> None:
        """Returns when no publish is running."""
        with self._condition:
            if not self._condition.wait_for(lambda: self.state is not State.PUBLISHING, PUBLISH_WAIT_SECONDS):
                fail(errno.EBUSY, f"{self} is being published")

    @contextlib.contextmanager
    def change(self, *, of_content: bool = True, removing: bool = False) -> Iterator[None]:
        """For the time of one change: waits for a publish to end, then EROFS when it succeeded."""
        with self._condition:
            self.wait_published()
            if self.spoiled and not removing:
                fail(errno.EIO, f"{self} can only be removed: {self.spoiled}")
            if self.state is State.PUBLISHED:
                fail(errno.EROFS, f"{self} is published")
            if self.state is State.GONE:
                fail(errno.ESTALE, f"{self} is gone: {self.reason}")
            if self.state is State.UNCERTAIN:
                fail(errno.EIO, f"it is not known whether {self} was published: {self.reason}")
            self._changes_running += 1
        try:
            yield
        finally:
            with self._condition:
                self._changes_running -= 1
                self.touched_at = self._clock()
                if of_content:
                    self.version += 1
                    self.modified_ns = time.time_ns()
                self._condition.notify_all()

    @contextlib.contextmanager
    def publishing(self, closing: bool, *, resolving: bool = False) -> Iterator[bool]:
        """For the time of a publish; whether it may be, which it may not when somebody has a file open for writing.

        `closing`: the caller has one open, which is being closed. `resolving`: the publish of one that is uncertain,
        in which nobody writes. Whoever enters sets the state before leaving, or it is as it was.
        """
        with self._condition:
            if resolving:
                allowed = self.state is State.UNCERTAIN
            else:
                allowed = self.state is State.OPEN and self.writers == int(closing)
            if allowed:
                self.state = State.PUBLISHING
                self._condition.wait_for(lambda: self._changes_running == 0)
        try:
            yield allowed
        finally:
            if allowed:
                with self._condition:
                    if self.state is State.PUBLISHING:
                        self.state = State.UNCERTAIN if self.unanswered else State.OPEN
                    self._condition.notify_all()

    def spoil(self, reason: str) -> None:
        """Whatever is written from now on, something else may come over it: it can only be removed."""
        self.spoiled = self.reason = reason

    def sync(self, file: StagedFile) -> None:
        """Makes what was written durable. The kernel tells once that it could not, so the file is given up then."""
        try:
            with self.change(of_content=False), file.complete_or_given_up():
                file.content.sync()
        except OSError:
            if self.state is not State.PUBLISHED:  # which made it durable
                raise

    def give_up(self, file: StagedFile, process: int) -> None:
        """A process was killed while it had the file open for writing: the file is not complete until written anew."""
        file.given_up = "whoever wrote it was killed"
        if process and process == self.maker.process:
            self.maker_was_killed = True

    def doubt(self, commit: Commit, reason: str) -> None:
        """While publishing: nobody knows whether it is published. Nothing changes until that is resolved."""
        with self._condition:
            self.state = State.UNCERTAIN
            self.unanswered = commit
            self.reason = reason
            self._condition.notify_all()

    def create(self, name: str, caller: Caller = NOBODY) -> StagedFile:
        """A new empty file with one handle that may write; FileExistsError when there is one of that name."""
        _check_name(name)
        self.require_left(caller)
        with self.change(), self._naming:
            self._claim.require_new(self, name, caller)
            if name in self._files:
                fail(errno.EEXIST)
            inode = staged_inode(self.number, next(self._serials))
            file = StagedFile(name, self.place.create(name), inode, caller)
            self._claim.wrote(caller)
            with self._condition:
                self._files[name] = file
                self.opened(file, writable=True)
            return file

    def opened(self, file: StagedFile, *, writable: bool) -> None:
        with self._condition:
            if self.state in {State.PUBLISHED, State.GONE}:
                fail(errno.ESTALE, f"{self} is {self.state.value}")
            file.handles += 1
            self.writers += writable

    def released(self, file: StagedFile, *, writable: bool) -> None:
        with self._condition:
            file.handles -= 1
            self.writers -= writable
            if writable:
                self.touched_at = self._clock()
            self._close_unused(file)

    def remove(self, name: str, caller: Caller = NOBODY) -> None:
        self.require_left(caller, removing=True)
        with self.change(removing=True), self._naming:
            file = self._files.get(name)
            if file is None:
                fail(errno.ENOENT)
            with self._naming_anew(file):
                self.place.remove(name)
                self._claim.removed(name, file.maker, caller)
                with self._condition:
                    self._forget(file)

    def rename(self, old: str, new: str, flags: int, caller: Caller = NOBODY) -> None:
        _check_name(new)
        if flags & ~RENAME_NOREPLACE:
            fail(errno.EINVAL)
        self.require_left(caller)
        with self.change(), self._naming:
            file = self._files.get(old)
            if file is None:
                fail(errno.ENOENT)
            if flags & RENAME_NOREPLACE and new in self._files:
                fail(errno.EEXIST)
            if old == new:
                return
            replaced = self._files.get(new)
            for each in (file, replaced):
                if each is not None:
                    self._require_over(each, caller)
            self._claim.require_new(self, new, caller)
            with self._naming_anew(file, replaced):
                self.place.rename(old, new)
                with self._condition:
                    if replaced is not None:
                        self._forget(replaced)
                    del self._files[old]
                    self._files[new] = file
                    file.name = new

    @contextlib.contextmanager
    def _naming_anew(self, *files: StagedFile | None) -> Iterator[None]:
        """For the time in which these files get other names, here too: what the sidecar writes by their names waits."""
        with contextlib.ExitStack() as stack:
            for file in files:
                if file is not None:
                    stack.enter_context(file.lock)
            try:
                yield
            except NamesUnknownError as error:
                self.spoil(f"nobody knows what its files are called where they are staged: {error.strerror}")
                raise

    def end(self, state: State, reason: str = "") -> None:
        """It is published or gone: nothing changes any more. Handles that are open go on reading."""
        with self._condition:
            if self.state in {State.PUBLISHED, State.GONE}:
                return
            self.state = state
            self.reason = reason
            self._condition.wait_for(lambda: self._changes_running == 0, PUBLISH_WAIT_SECONDS)
            for file in self._files.values():
                self._close_unused(file)
            self.place.close()
            self._condition.notify_all()

    def __str__(self) -> str:
        return f"{self.ref.datastore}/{self.ref.image_id}"

    def _forget(self, file: StagedFile) -> None:
        del self._files[file.name]
        file.removed = True
        self._close_unused(file)

    def _close_unused(self, file: StagedFile) -> None:
        if file.handles == 0 and (file.removed or self.state in {State.PUBLISHED, State.GONE}):
            file.content.close()


def _check_name(name: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        fail(errno.EINVAL, f"{name!a} is not UTF-8")
    if name in _OWN_NAMES or name.endswith(_OWN_SUFFIX) or (name.startswith(_OWN_PREFIX) and "." not in name):
        fail(errno.EPERM, f"{name} is a name of the sidecar's own files")
