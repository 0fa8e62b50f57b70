"""Files of images that somebody reads are in use, also where nothing but the sidecar can tell: held by a call."""

from typing import Self

from protos.images.v1 import staging_service_pb2 as wire
from protos.images.v1.types_pb2 import ImageFile, ImageRef
from sidecar import errors
from sidecar.client_calls import AnswerStream, Caller
from sidecar.client_staging import as_ref


class Holder(AnswerStream[wire.OpenHolderResponse]):
    """Holds files of images: none of those is purged, swept or replaced, until it is released or the holder ends.

        with client.open_holder() as holder:
            holder.hold(1, "one/a", "a-flat.vmdk")
            ...
            holder.release(1)

    It begins and ends with the `with`; `cancel` ends it from any thread. It also ends with this process, and when the
    sidecar ends or does not answer any more: `wait` tells. What it held is free then, and may be held by another one.
    Safe to share between threads: while one file is being opened, which a slow datastore may take long for, others are
    held and released.
    """

    def __init__(self, caller: Caller) -> None:
        super().__init__(caller, caller.start(caller.staging.OpenHolder, wire.OpenHolderRequest()))
        self._id = ""

    def __enter__(self) -> Self:
        """Waits for the sidecar. SidecarUnavailable, TooManyCalls; CallUnknown when it is too old to hold files."""
        try:
            answer = next(self, None)
        except BaseException:
            self.cancel()
            raise
        if answer is None:
            raise errors.SidecarUnavailable(f"the sidecar at {self._caller.address} ended the call; make it again")
        self._id = answer.holder_id
        return self

    def wait(self) -> None:
        """Returns after `cancel`; raises the error that ended the holder, when it was not that. For one thread."""
        try:
            for _ in self:
                pass
        except errors.ImagesError:
            if not self.cancelled:
                raise

    def hold(
        self,
        number: int,
        ref: ImageRef | str,
        name: str,
        *,
        expected: ImageFile | None = None,
        timeout: float | None = None,
    ) -> None:
        """Holds a file of an image under a number, which this holder was not given before.

        `timeout`: seconds; the client's when None. Raises ImageNotFound or FileNotInImage; FileChanged when it is
        another file than the `expected` one; ImageInUse when it is being purged; TooManyCalls when the holder has as
        many as it may; HolderNotFound when it has ended. After an error that leaves open what the sidecar did
        (DeadlineExceeded, SidecarUnavailable, OperationCancelled), `release` makes sure that it is not held.
        """
        request = wire.HoldFileRequest(holder_id=self._id, number=number, ref=as_ref(ref), name=name, expected=expected)
        self._caller.unary(self._caller.staging.HoldFile, request, timeout=timeout)

    def release(self, number: int) -> None:
        """Lets go of what was held under the number, also when it is still being opened; no error when nothing was.

        DatastoreUnavailable or TooManyCalls when the datastore hangs: it is held still, until it is released again.
        """
        request = wire.ReleaseFileRequest(holder_id=self._id, number=number)
        self._caller.unary(self._caller.staging.ReleaseFile, request)
