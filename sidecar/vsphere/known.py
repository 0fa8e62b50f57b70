"""A datastore of a server, found once and known from then on."""

import threading
from contextlib import suppress

from pyVmomi import vim, vmodl

from sidecar.errors import DatastoreUnavailable
from sidecar.vsphere import properties
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.faults import NoVsphereAnswer
from sidecar.vsphere.inventory import ServerDatastore


class KnownDatastore:
    """Where a datastore is on its server. Safe for several threads."""

    def __init__(self, address: DatastoreAddress) -> None:
        self.address = address
        self._finding = threading.Lock()  # guards what is known
        self._known: ServerDatastore | None = None

    def __call__(self) -> ServerDatastore:
        """As it was when it was looked for last; DatastoreUnavailable when it cannot be found."""
        known = self._known
        if known is not None:
            return known
        with self._finding:
            if self._known is None:
                self._known = self.address.find()
            return self._known

    def refresh(self) -> ServerDatastore:
        """Looks for it again: it may have another name. DatastoreUnavailable when it cannot be used now.

        Its sizes are those of now.
        """
        known = self()
        self.address.connection.call(
            f"ask for the space of {known.name}", lambda content: _measure(content, known.datastore), repeatable=True
        )
        found = self.address.find()
        with self._finding:
            self._known = found
        return found

    def capacity(self) -> tuple[int, int]:
        """Bytes in all, and free ones, as they are now."""
        server, datastore = self.address.connection.server.name, self().datastore

        def ask(content: vim.ServiceInstanceContent) -> vim.Datastore.Summary | None:
            _measure(content, datastore)
            try:
                summary: vim.Datastore.Summary | None = properties.read(content, datastore, ("summary",)).get("summary")
            except vmodl.fault.ManagedObjectNotFound:
                return None
            return summary

        summary = self.address.connection.call(f"ask for the space of {self().name}", ask, repeatable=True)
        if summary is None:
            raise DatastoreUnavailable(f"server {server} has no datastore {self().path} any more")
        return summary.capacity, summary.freeSpace


def _measure(content: vim.ServiceInstanceContent, datastore: vim.Datastore) -> None:
    """Has the server look at its sizes: what it knows of them may be minutes old. Where it cannot, that has to do."""
    with suppress(vmodl.MethodFault, NoVsphereAnswer):
        vim.Datastore(datastore._GetMoId(), content.propertyCollector._GetStub()).RefreshDatastore()
