"""Files and directories of a datastore, listed, moved and removed by its server."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pyVmomi import vim

from sidecar.errors import DatastoreUnavailable
from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import datastore_path
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.tasks import Follow, run_task

_Browser = vim.host.DatastoreBrowser
_EPOCH = datetime.fromtimestamp(0, UTC)
_PATTERN_CHARACTERS = frozenset("*?[]\\{}")


@dataclass(frozen=True, slots=True)
class ServerFile:
    """One name in a directory. Bytes, and nanoseconds since the epoch; both 0 where only names were asked for."""

    name: str
    is_directory: bool
    size: int
    modified_ns: int


class ServerFiles:
    """The files of one datastore. `find` gives the datastore as its server knows it now.

    Paths are relative to its root; InvalidRequest for one that could lead out of it. FileNotFoundError and
    FileExistsError are answers of the server.
    """

    def __init__(self, connection: Connection, find: Callable[[], ServerDatastore]) -> None:
        self._connection, self._find = connection, find
        self._known_browser: tuple[str, _Browser] | None = None  # with the reference of its datastore

    def entries(self, path: str) -> list[ServerFile]:
        """What is in a directory."""
        return self._search(path, "*")

    def entry(self, path: str) -> ServerFile:
        """What is at a path, by a look at its directory."""
        directory, _, name = path.rpartition("/")
        # What is a pattern to the server would find other names, or not this one.
        pattern = "*" if _PATTERN_CHARACTERS.intersection(name) else name
        for each in self._search(directory, pattern):
            if each.name == name:  # some servers compare without regard to case
                return each
        raise FileNotFoundError(path)

    def tree(self, path: str = "") -> dict[str, list[ServerFile]]:
        """What is in a directory and each one below, by the path: one search for all of them."""
        found = self._find()
        name = datastore_path(found, path) if path else f"[{found.name}] "

        def start(content: vim.ServiceInstanceContent) -> vim.Task:
            task: vim.Task = self._browser(content, found).SearchDatastoreSubFolders_Task(name, _specification("*"))
            return task

        what = f"list all of {name.strip()}"
        results = run_task(self._connection, what, start)
        return {_relative(each.folderPath): list(_files(each)) for each in self._told(results, what)}

    def make_directory(self, path: str) -> None:
        """Makes one directory, in one that is there."""
        found = self._find()
        name = datastore_path(found, path)

        def make(content: vim.ServiceInstanceContent) -> None:
            # On VSAN, one in the root is an object of its own, which only this can make.
            if found.is_vsan and "/" not in path and content.datastoreNamespaceManager is not None:
                content.datastoreNamespaceManager.CreateDirectory(found.datastore, path, None, None)
            else:
                _manager(content).MakeDirectory(name, found.datacenter, False)

        self._connection.call(f"make the directory {name}", make)

    def move(self, source: str, destination: str, *, replace: bool = False) -> None:
        """Moves a file or a directory; FileExistsError when something is there, but for a file that is replaced."""
        found = self._find()
        names = datastore_path(found, source), datastore_path(found, destination)

        def start(content: vim.ServiceInstanceContent) -> vim.Task:
            task: vim.Task = _manager(content).MoveDatastoreFile_Task(
                names[0], found.datacenter, names[1], found.datacenter, replace
            )
            return task

        run_task(self._connection, f"move {names[0]} to {names[1]}", start)

    def copy(self, source: ServerDatastore, source_path: str, path: str, follow: Follow) -> None:
        """Copies a file, also from another datastore of the server, in place of one that is there.

        After an error parts of it may be there. `follow` as in `ServerTask.run`.
        """
        found = self._find()
        names = datastore_path(source, source_path), datastore_path(found, path)

        def start(content: vim.ServiceInstanceContent) -> vim.Task:
            task: vim.Task = _manager(content).CopyDatastoreFile_Task(
                names[0], source.datacenter, names[1], found.datacenter, True
            )
            return task

        run_task(self._connection, f"copy {names[0]} to {names[1]}", start, follow)

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with all in it."""
        found = self._find()
        name = datastore_path(found, path)

        def start(content: vim.ServiceInstanceContent) -> vim.Task:
            task: vim.Task = _manager(content).DeleteDatastoreFile_Task(name, found.datacenter)
            return task

        run_task(self._connection, f"remove {name}", start)

    def _browser(self, content: vim.ServiceInstanceContent, found: ServerDatastore) -> _Browser:
        reference = found.datastore._GetMoId()
        if self._known_browser is None or self._known_browser[0] != reference:
            self._known_browser = reference, browser_of(content, found.datastore)
        return _Browser(self._known_browser[1]._GetMoId(), content.propertyCollector._GetStub())

    def _search(self, path: str, pattern: str) -> list[ServerFile]:
        found = self._find()
        name = datastore_path(found, path) if path else f"[{found.name}] "

        def start(content: vim.ServiceInstanceContent) -> vim.Task:
            task: vim.Task = self._browser(content, found).SearchDatastore_Task(name, _specification(pattern))
            return task

        what = f"list {name}"
        return list(_files(self._told(run_task(self._connection, what, start), what)))

    def _told(self, result: Any, what: str) -> Any:
        """DatastoreUnavailable without one: it is not the answer of a directory with nothing in it."""
        if result is None:
            raise DatastoreUnavailable(
                f"server {self._connection.server.name}: cannot {what}: it has ended, and tells nothing; try again"
            )
        return result


def browser_of(content: vim.ServiceInstanceContent, datastore: vim.Datastore) -> _Browser:
    """What lists the files of a datastore."""
    browser: _Browser = properties.read(content, datastore, ["browser"])["browser"]
    return browser


def _specification(pattern: str) -> _Browser.SearchSpec:
    flags = _Browser.FileInfo.Details(fileType=True, fileSize=True, modification=True, fileOwner=False)
    return _Browser.SearchSpec(matchPattern=[pattern], details=flags, searchCaseInsensitive=False)


def _files(result: _Browser.SearchResults) -> Iterator[ServerFile]:
    for each in result.file:
        modified = each.modification
        yield ServerFile(
            each.path,
            isinstance(each, _Browser.FolderInfo),
            each.fileSize or 0,
            0 if modified is None else (modified - _EPOCH) // timedelta(microseconds=1) * 1000,
        )


def _relative(folder: str) -> str:
    """Of a path such as `[one] image_a/`, which may have no space, and no slash at its end."""
    return folder.partition("]")[2].strip(" ").strip("/")


def _manager(content: vim.ServiceInstanceContent) -> vim.FileManager:
    if content.fileManager is None:
        raise DatastoreUnavailable("the server has no means to change files")
    return content.fileManager
