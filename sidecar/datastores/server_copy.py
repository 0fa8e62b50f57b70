"""Disks copied by the server that has both datastores, however this host reaches them."""

from sidecar.datastores.interface import Datastore, DiskCopier, Transfer
from sidecar.datastores.on_server import OnServer, is_on_server
from sidecar.errors import DatastoreUnavailable, DiskFileFault
from sidecar.vsphere.disks import copy_task, find_all, may_preallocate
from sidecar.vsphere.tasks import ServerTask


def server_copier(source: Datastore, destination: OnServer) -> DiskCopier | None:
    """What copies a disk from there to here; None when they are not of one server."""
    if is_on_server(source) and source.address.connection is destination.address.connection:
        return _ServerCopier(source, destination)
    return None


class _ServerCopier:
    """Of one disk."""

    def __init__(self, source: OnServer, destination: OnServer) -> None:
        self._source, self._destination = source, destination
        self._connection = destination.address.connection
        self._task: ServerTask | None = None

    @property
    def begun(self) -> bool:
        return self._task is not None and self._task.begun

    def may_preallocate(self) -> bool:
        return may_preallocate(self._connection)

    def copy(self, source_path: str, path: str, size: int, adapter_type: str | None, transfer: Transfer) -> None:
        done = 0

        def follow(percent: int) -> None:
            nonlocal done
            so_far = size * percent // 100
            done, more = so_far, so_far - done
            transfer.advance(more)

        source, destination = find_all(self._source.address, self._destination.address)
        # Not the destination: its directory has a name that there is nowhere else, and the server writes into no other.
        self._source.require_same(source, source_path.rpartition("/")[0], lambda percent: transfer.advance(0))
        self._task = copy_task(
            self._connection, source, source_path, destination, path, size=size, adapter_type=adapter_type
        )
        self._remove_what_is_there(path)
        try:
            self._task.run(follow)
        except FileNotFoundError as error:
            # The source is open here, and the destination's directory is held.
            raise DatastoreUnavailable(
                f"{error}, but it is there for this host: {self._what_may_be_wrong()}"
            ) from error
        except FileExistsError as error:
            raise DiskFileFault(
                f"{error}, and it was not there for this host before: look whether another program writes to "
                f"{path.rpartition('/')[0]} on {self._destination.name}, and try again"
            ) from error
        transfer.advance(size - done)

    def _remove_what_is_there(self, path: str) -> None:
        """The server replaces nothing. What is there is of a copy that was begun by other means.

        It is listed, not asked for by name: an NFS client remembers what it did not find, and would not see what the
        server makes.
        """
        directory, _, name = path.rpartition("/")
        for each in {name, f"{name.removesuffix('.vmdk')}-flat.vmdk"}.intersection(self._destination.names(directory)):
            self._destination.remove_tree(f"{directory}/{each}")

    def _what_may_be_wrong(self) -> str:
        paths = dict.fromkeys(each.root_path for each in (self._source, self._destination) if each.root_path)
        if not paths:
            return "look at the datastores in the server's inventory"
        return f"the path {' or '.join(paths)} is not where the server has its datastore"
