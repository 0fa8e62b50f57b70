"""One mount: its parts, put together, started, and ended in order."""

import contextlib
import gc
import logging
import os
import resource
import threading
from collections.abc import Callable

from fusefs import binding, mountpoints, nodes
from fusefs.binding import BindingError, Session
from fusefs.daemon import EndSignals
from fusefs.deleting import Deletions
from fusefs.documents import Documents
from fusefs.ending import Ending
from fusefs.filesystem import FileSystem
from fusefs.generations import Generations
from fusefs.guard import Guard
from fusefs.holding import Holding
from fusefs.kernel import KernelMemory
from fusefs.mountpoints import MountpointError
from fusefs.options import MountOptions
from fusefs.provenance import Generation, SourceFile
from fusefs.publisher import Publisher
from fusefs.pulse import Pulse
from fusefs.reading import Opener, Reader
from fusefs.rules import Rules
from fusefs.sources import Sources
from fusefs.staging import StagingArea
from fusefs.tree import IndexedImage, Tree
from fusefs.views import Views
from fusefs.watching import Watcher
from sidecar.client import SidecarClient
from sidecar.errors import ImagesError, SidecarUnavailable

_log = logging.getLogger(__name__)

# How long a change waits for a sidecar that does not answer, and the start for one that is not there.
CALL_SECONDS = 5.0
# How long the start waits for the first listing of everything.
_LISTING_SECONDS = 60.0
# How long the end waits for what was written last, if nobody goes on with it, and however long settling takes.
_MOST_SETTLE_SECONDS = 10.0
# How long the end waits for what is being published; then it is left to the sidecar, and to the log.
_MOST_FINISH_SECONDS = 60.0


class MountError(Exception):
    """The mount cannot be made: why, and what to do."""


def run(
    mountpoint: str,
    client: SidecarClient,
    options: MountOptions,
    binding_name: str,
    signals: EndSignals,
    on_ready: Callable[[], None],
) -> None:
    """Serves until the mount is gone, by a signal or by an unmount; `on_ready` is called when it answers.

    Raises MountError when it cannot be made.
    """
    with Guard() as guard:  # it starts while all else does
        try:
            path = mountpoints.prepare(mountpoint, may_cover_files=options.may_cover_files)
            client.wait_ready(CALL_SECONDS)
        except (MountpointError, ImagesError) as error:
            raise MountError(str(error)) from error
        _allow_many_files()
        _Mount(path, client, options, binding_name, guard).run(signals, on_ready)


class _Mount:
    def __init__(
        self, path: str, client: SidecarClient, options: MountOptions, binding_name: str, guard: Guard
    ) -> None:
        self._path = path
        self._client = client
        self._options = options
        self._binding = binding_name
        self._session: Session | None = None
        self._finishing = False
        self._ending = Ending(client)
        self._guard = guard
        self._kernel = KernelMemory(path)
        self._generations = Generations(options.entry_timeout, tell=self._kernel.replaced)
        self._tree = Tree(before_change=self._generations.changing, on_change=self._tell_kernel)
        pulse = Pulse(client)
        self._holding = Holding(client, pulse)
        self._opener = Opener(client, self._holding)
        rules = Rules(self._tree, self._open_source)
        self._area = StagingArea(
            client,
            pulse,
            self._tree,
            rules,
            changed=self._kernel.changed,
            gone=self._kernel.gone,
            change=self._generations.change,
        )
        self._watcher = Watcher(client, self._tree, on_lost=self._area.doubt_leases)
        self._deletions = Deletions(client, pulse, self._tree, options.settle_seconds)
        self._publisher = Publisher(self._area, rules, self._deletions, options.settle_seconds)
        views = Views(self._tree, self._deletions, options.owner)
        documents = Documents(client, pulse, self._area, lambda: self._watcher.stale_since)
        sources = Sources(self._open_source)
        self._filesystem = FileSystem(
            client,
            pulse,
            self._opener,
            self._tree,
            self._area,
            self._deletions,
            views,
            documents,
            sources,
            self._generations,
        )

    def run(self, signals: EndSignals, on_ready: Callable[[], None]) -> None:
        with contextlib.ExitStack() as running:
            self._watcher.start()
            running.callback(self._watcher.stop)
            self._holding.start()
            running.callback(self._holding.stop)
            if not self._tree.wait_complete(_LISTING_SECONDS):
                raise MountError(f"the sidecar at {self._client.address} did not list its images: see its log")
            # The index stays: whoever looks for garbage need not go through a hundred thousand images each time.
            gc.freeze()
            self._kernel.start(self._filesystem.is_there)
            running.callback(self._kernel.stop)
            self._publisher.start()
            running.callback(self._finish)
            signals.call(self._end)
            try:
                binding.serve(
                    self._binding,
                    self._filesystem,
                    self._path,
                    self._options.for_libfuse(self._client.address),
                    lambda session: self._ready(session, on_ready),
                    attributes=self._options.attributes,
                )
            except BindingError as error:
                raise MountError(str(error)) from error
            _log.info("unmounted mountpoint=%s", self._path)

    def _ready(self, session: Session, on_ready: Callable[[], None]) -> None:
        """In a thread of libfuse, before the kernel has its answer: what asks the mount has to wait for that."""
        unmounting = self._path if "auto_unmount" in self._options.passed else ""
        self._guard.watch(mountpoints.device_of(self._path), unmounting)
        self._session = session
        self._kernel.serve(session)

        def probe() -> None:
            try:
                os.stat(self._path)
                mountpoints.raise_read_ahead(self._path)
            except OSError as error:
                _log.warning("mount does not answer mountpoint=%s cause=%s", self._path, error)
                return
            _log.info("mounted mountpoint=%s sidecar=%s", self._path, self._client.address)
            on_ready()

        threading.Thread(target=probe, name="probe", daemon=True).start()

    def _end(self) -> None:
        """Makes libfuse return: it looks for that after a request, so there has to be one.

        What was written a moment ago may still settle: afterwards nobody could tell whether it was left alone.
        """
        if self._finishing:
            _log.info("ending already, publishing what is complete mountpoint=%s", self._path)
            return
        _log.info("ending mountpoint=%s", self._path)
        session = self._session
        if session is None:
            os._exit(1)  # still starting: nothing is made yet
        self._ending.begin()
        self._publisher.wait_settled(min(self._options.settle_seconds, _MOST_SETTLE_SECONDS) + 1.0)
        # Before: what is making the kernel forget waits for requests, which nobody answers afterwards.
        self._kernel.stop()
        session.exit()
        with contextlib.suppress(OSError):
            os.statvfs(self._path)

    def _finish(self) -> None:
        self._finishing = True  # before the session is gone, which would mean that it is not there yet
        self._session = None
        self._ending.begin()
        # What is being published may wait for a datastore that hangs, whoever wants the mount to end.
        limit = threading.Timer(_MOST_FINISH_SECONDS, self._client.cancel_calls)
        limit.start()
        try:
            self._publisher.stop()
            self._deletions.run_due(everything=True)
            self._area.end()
        finally:
            limit.cancel()
            limit.join()
            self._ending.end()

    def _tell_kernel(self, datastore: str, before: IndexedImage, now: IndexedImage | None) -> None:
        """The image is not what it was: what the kernel knows of it is old."""
        key = (datastore, before.image_id)

        def told() -> None:
            self._generations.told(key)
            if not before.is_valid and self._tree.image(*key) is None:
                self._deletions.lay(key)  # purged

        # Those of both: the kernel may know the new image's names, too, from one that was there before the last one.
        self._kernel.replaced(nodes.image_path(datastore, before), nodes.file_paths(datastore, before, now), told)

    def _open_source(self, source: SourceFile) -> Reader:
        datastore = self._tree.datastore(source.datastore)
        image = self._tree.image(source.datastore, source.image_id)
        file = image.file(source.name) if image is not None else None
        if datastore is None or image is None or file is None or file.generation != source.generation:
            raise FileNotFoundError(source.name)

        def current() -> Generation | None:
            now = self._tree.image(source.datastore, source.image_id)
            found = now.file(source.name) if now is not None and now.is_valid else None
            return found.generation if found is not None else None

        return self._opener.open(datastore, image, file, current)


def _allow_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


__all__ = ["MountError", "SidecarUnavailable", "run"]
