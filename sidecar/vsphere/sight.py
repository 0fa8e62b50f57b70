"""Whether a server sees a file that this host made: so it is known that both mean the same datastore."""

from pyVmomi import vim

from sidecar.vsphere.connection import Connection
from sidecar.vsphere.files import browser_of
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.tasks import Follow, run_task


def is_seen(connection: Connection, datastore: ServerDatastore, directory: str, name: str, follow: Follow) -> bool:
    """Whether the server has a file of that name in a directory of the datastore. `follow` as in `ServerTask.run`."""

    def start(content: vim.ServiceInstanceContent) -> vim.Task:
        wanted = vim.host.DatastoreBrowser.SearchSpec(matchPattern=[name])
        task: vim.Task = browser_of(content, datastore.datastore).SearchDatastore_Task(
            f"[{datastore.name}] {directory}", wanted
        )
        return task

    try:
        found = run_task(connection, f"look for a file in [{datastore.name}] {directory}", start, follow)
    except FileNotFoundError:
        return False
    return found is not None and any(file.path == name for file in found.file)
