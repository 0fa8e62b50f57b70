"""The parts of a sidecar, made from its configuration and joined."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.images.v1 import (
    datastore_service_pb2_grpc,
    image_service_pb2_grpc,
    maintenance_service_pb2_grpc,
    staging_service_pb2_grpc,
)
from sidecar.config import ConfigError, DatastoreConfig, MaintenanceConfig, SidecarConfig, VsphereServer
from sidecar.datastores.interface import Datastore
from sidecar.datastores.kinds import DATASTORE_TYPES
from sidecar.datastores.writers import Writers
from sidecar.images.admission import Admission, most_copies
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.ending import end_all
from sidecar.images.layouts import LAYOUTS
from sidecar.images.layouts.following import following_layout
from sidecar.images.layouts.interface import Layout
from sidecar.images.library import Library
from sidecar.images.maintenance import Maintenance, Plan
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_vm, vm_directories
from sidecar.images.vm_scan import VmSource
from sidecar.images.watching import Watches
from sidecar.locks.kinds import LOCK_KINDS
from sidecar.server import Service
from sidecar.services.datastore_service import DatastoreServicer
from sidecar.services.image_service import ImageServicer
from sidecar.services.maintenance_service import MaintenanceServicer
from sidecar.services.requests import Requests
from sidecar.services.staging_service import StagingServicer

if TYPE_CHECKING:
    from sidecar.vsphere.connection import Connection
    from sidecar.vsphere.disks import DatastoreAddress

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the server serves, and how it ends."""

    services: tuple[Service, ...]
    # Ends the streams that have no end of their own (watches, holders of files), so that a shutdown does not wait for
    # them. Returns at once.
    end_streams: Callable[[], None]
    # Ends the waits of calls that were cancelled: for locks, which others may hold for long. Returns at once.
    interrupt: Callable[[], None]
    # Gives up what is held: staging directories, locks, threads. Called when no handler runs any more, or, when the
    # storage hangs, while some still do.
    close: Callable[[], None]


def build(config: SidecarConfig) -> Parts:
    """Opens the datastores and makes the services. A datastore that cannot be reached now is no error."""
    _refuse_aliases(config)
    catalog, writers = Catalog(), Writers()
    servers = {name: _connection(name, server) for name, server in config.vsphere.items()}
    discoveries = []
    for place in config.datastores:
        store = ImageStore(
            _datastore(place, writers, servers),
            _layout(place, servers),
            reserve=place.reserve,
            lock_timeout=config.limits.lock_timeout_seconds,
            admission=Admission(
                place.name,
                calls=config.limits.max_calls,
                copies=config.limits.max_copies,
                transfers=config.limits.max_transfers,
            ),
        )
        discoveries.append(Discovery(store, catalog, rescan_seconds=place.rescan_seconds))
    vms, plan = VmSource(vm_directories, uses_of_vm), _plan(config.maintenance)
    library = Library(
        discoveries,
        catalog,
        max_copies=most_copies(len(discoveries), config.limits.max_copies),
        lease_seconds=config.limits.staging_lease_seconds,
        maintained=[Maintenance(discovery.store, vms, plan) for discovery in discoveries],
    )
    watches = Watches(catalog, discoveries)
    requests = Requests()

    images = ImageServicer(library, requests, watches)
    staging = StagingServicer(library, requests)
    datastores = DatastoreServicer(library)
    maintenance = MaintenanceServicer(library, requests)

    def end_streams() -> None:
        watches.end()
        library.holders.end()

    def close() -> None:
        try:
            library.close()
        finally:
            end_all(connection.close for connection in servers.values())

    library.start()
    return Parts(
        services=(
            Service(
                "images.v1.ImageService", lambda s: image_service_pb2_grpc.add_ImageServiceServicer_to_server(images, s)
            ),
            Service(
                "images.v1.StagingService",
                lambda s: staging_service_pb2_grpc.add_StagingServiceServicer_to_server(staging, s),
            ),
            Service(
                "images.v1.DatastoreService",
                lambda s: datastore_service_pb2_grpc.add_DatastoreServiceServicer_to_server(datastores, s),
            ),
            Service(
                "images.v1.MaintenanceService",
                lambda s: maintenance_service_pb2_grpc.add_MaintenanceServiceServicer_to_server(maintenance, s),
            ),
        ),
        end_streams=end_streams,
        interrupt=library.interrupt,
        close=close,
    )


def _datastore(place: DatastoreConfig, writers: Writers, servers: "dict[str, Connection]") -> Datastore:
    if place.path is not None and place.locks == "exclusive-open" and os.uname().sysname == "Linux":
        # Whether it is so is only seen when a lock is taken: file systems of others may know such opens here, too.
        _log.warning(
            'locks of ESX on Linux datastore=%s see=without them, nothing can be changed there: locks = "flock"',
            place.name,
        )
    locks = LOCK_KINDS[place.locks]()
    if place.server is None:
        assert place.path is not None
        return DATASTORE_TYPES[place.type](place.name, place.path, locks, writers)
    from sidecar.datastores.vsphere import VsphereDatastore
    from sidecar.datastores.vsphere_api import VsphereApiDatastore

    address = _address(place, servers)
    if place.path is None:
        return VsphereApiDatastore(place.name, address)
    return VsphereDatastore(place.name, place.path, locks, writers, address)


def _layout(place: DatastoreConfig, servers: "dict[str, Connection]") -> Layout:
    if place.layout is not None:
        return LAYOUTS[place.layout]
    address = _address(place, servers)
    return following_layout(lambda: LAYOUTS["vsan" if address.find().is_vsan else "compound"])


def _address(place: DatastoreConfig, servers: "dict[str, Connection]") -> "DatastoreAddress":
    from sidecar.vsphere.disks import DatastoreAddress

    assert place.server is not None
    return DatastoreAddress(servers[place.server], place.datastore or place.name, place.datacenter)


def _connection(name: str, server: VsphereServer) -> "Connection":
    # Here, since most sidecars have no such server, and its library is a large one.
    from sidecar.vsphere import credentials
    from sidecar.vsphere.connection import Connection, Server

    if server.credentials_file is not None:
        read = credentials.from_file(server.credentials_file)
    else:
        assert server.credentials_variable is not None
        read = credentials.from_variable(server.credentials_variable)
    host, port = server.host_and_port
    return Connection(
        Server(name, host, port, read, server.ca_file, server.thumbprint, server.insecure, server.timeout_seconds)
    )


def _plan(config: MaintenanceConfig) -> Plan:
    return Plan(
        reap_interval=config.reap_interval_seconds,
        staging_grace=config.staging_grace_seconds,
        purge_interval=config.purge_interval_seconds,
        tombstone_grace=config.tombstone_grace_seconds,
        purge_below_free=config.purge_below_free,
        sweep_interval=config.sweep_interval_seconds,
        sweep_grace=config.sweep_grace_seconds,
        rate=config.rate,
        timeout=config.timeout_seconds,
    )


def _refuse_aliases(config: SidecarConfig) -> None:
    """ConfigError when two names lead to one directory, as by a link or bind mount: each image would be there twice."""
    names: dict[tuple[int, int], str] = {}
    for place in config.datastores:
        if place.path is None:
            continue
        try:
            status = os.stat(place.path)
        except OSError:  # away now; its other name would be a datastore that is away, too
            continue
        first = names.setdefault((status.st_dev, status.st_ino), place.name)
        if first != place.name:
            raise ConfigError(f"datastores {first} and {place.name} are the same directory, {place.path}: keep one")
