"""DatastoreService: what the contract says, in terms of the domain."""

import grpc

from protos.images.v1 import datastore_service_pb2 as pb
from protos.images.v1 import datastore_service_pb2_grpc as pb_grpc
from sidecar.images.library import Library
from sidecar.images.locked import held_locks
from sidecar.services.messages import datastore_message, lock_message


class DatastoreServicer(pb_grpc.DatastoreServiceServicer):
    """Translates; the domain decides."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def ListDatastores(
        self, request: pb.ListDatastoresRequest, context: grpc.ServicerContext
    ) -> pb.ListDatastoresResponse:
        """As last seen, at most a few seconds ago: one datastore that hangs must not hide the others."""
        discoveries = [self._library.discoveries[name] for name in sorted(self._library.discoveries)]
        return pb.ListDatastoresResponse(datastores=[datastore_message(discovery) for discovery in discoveries])

    def GetDatastore(self, request: pb.GetDatastoreRequest, context: grpc.ServicerContext) -> pb.GetDatastoreResponse:
        """As it is now; of one that does not answer, that."""
        discovery = self._library.discovery(request.name)
        if not discovery.silence():
            with self._library.using(request.name, context.is_active, looks=True):
                discovery.check()
        return pb.GetDatastoreResponse(datastore=datastore_message(discovery))

    def ListLocks(self, request: pb.ListLocksRequest, context: grpc.ServicerContext) -> pb.ListLocksResponse:
        with self._library.using(request.datastore, context.is_active) as store:
            return pb.ListLocksResponse(locks=[lock_message(request.datastore, held) for held in held_locks(store)])
