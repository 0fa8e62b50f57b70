"""The bytes of a datastore's files, read and written over HTTPS at the server's /folder address."""

import http.client
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import quote, urlencode

from pyVmomi import vim

from sidecar.errors import DatastoreDenied, DatastoreUnavailable, FileChanged, InvalidRequest, NoSpace
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import datastore_path
from sidecar.vsphere.faults import translated
from sidecar.vsphere.inventory import ServerDatastore

_BEYOND_THE_END = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
_SPOIL_BYTES = 1 << 16  # of an answer that nobody wants: read, to keep the connection for the next call


class _Answer:
    """What came for a request. Each read of it has a whole timeout: all of a file may take hours."""

    def __init__(self, answer: http.client.HTTPResponse, extend: Callable[[], None]) -> None:
        self._answer, self._extend = answer, extend
        self.status = answer.status
        self.size = int(answer.headers.get("Content-Length") or 0)

    def read(self, length: int) -> bytes:
        """Up to `length` bytes; http.client takes a connection that was lost for the end of what it was to bring."""
        self._extend()
        told = self._answer.length
        data = self._answer.read(length)
        if told is not None and len(data) < min(length, told):
            raise http.client.IncompleteRead(data, told - len(data))
        return data

    def skip(self, length: int) -> None:
        while length > 0 and (skipped := len(self.read(min(length, _SPOIL_BYTES)))):
            length -= skipped


class Download:
    """The bytes of a file from some offset on, as they come."""

    def __init__(self, server: str, path: str, answer: _Answer, done: Callable[[], None]) -> None:
        self._server, self._path, self._answer, self._done = server, path, answer, done

    def read(self, length: int) -> bytes:
        """Up to so many bytes, fewer only at the end of the file; ImagesError."""
        with translated(self._server, f"read {self._path}"):
            return self._answer.read(length)

    def close(self) -> None:
        self._done()


class Folder:
    """The files of one datastore. `find` gives the datastore as its server knows it now."""

    def __init__(self, connection: Connection, find: Callable[[], ServerDatastore]) -> None:
        self._connection, self._find = connection, find

    def size(self, path: str) -> int:
        """Of a file; FileNotFoundError, InvalidRequest when it is none."""

        def ask(content: vim.ServiceInstanceContent) -> int:
            with self._answer(content, "HEAD", path) as answer:
                answer.read(_SPOIL_BYTES)
                return answer.size

        return self._connection.call(f"look at {path}", ask, repeatable=True)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; FileNotFoundError, InvalidRequest when it is no file."""
        if not length:
            return b""

        def get(content: vim.ServiceInstanceContent) -> bytes:
            with self._answer(content, "GET", path, {"Range": f"bytes={offset}-{offset + length - 1}"}) as answer:
                if answer.status == _BEYOND_THE_END:
                    answer.read(_SPOIL_BYTES)
                    return b""
                if answer.status == http.HTTPStatus.OK:  # all of it, as some send a range that is all
                    answer.skip(offset)
                return answer.read(length)

        return self._connection.call(f"read {path}", get, repeatable=True)

    def open(self, path: str, offset: int) -> Download:
        """The file from `offset`, which is in it, to its end; to be closed. Raises as `read`."""

        def get(content: vim.ServiceInstanceContent) -> Download:
            with ExitStack() as stack:
                answer = stack.enter_context(self._answer(content, "GET", path, {"Range": f"bytes={offset}-"}))
                if answer.status == _BEYOND_THE_END:
                    raise FileChanged(
                        f"server {self._connection.server.name}: {path} ends before {offset} now: it was cut off or "
                        "replaced; look at it again"
                    )
                if answer.status == http.HTTPStatus.OK:
                    answer.skip(offset)
                return Download(self._connection.server.name, path, answer, stack.pop_all().close)

        return self._connection.call(f"read {path}", get, repeatable=True)

    def write(self, path: str, size: int, pieces: Callable[[], Iterable[bytes]], *, may_be_short: bool = False) -> None:
        """Puts a file of `size` bytes there, in place of one that is; its directory must be there.

        `pieces` gives them from the start, more than once when the server has ended the session. NoSpace or
        DatastoreUnavailable when not all of it has arrived, unless it `may_be_short`; parts of it may be there after
        an error.
        """

        def put(content: vim.ServiceInstanceContent) -> None:
            with self._answer(content, "PUT", path, {"Content-Length": str(size)}, pieces()) as answer:
                answer.read(_SPOIL_BYTES)

        self._connection.call(f"write {path}", put, repeatable=True)
        # Some servers answer that all is well when the datastore is full; of nothing, nothing can be missing.
        if not size or may_be_short:
            return
        arrived = self.size(path)
        if arrived != size:
            raise NoSpace(
                f"server {self._connection.server.name}: of {size} bytes of {path} it has {arrived}; look at the space "
                "on the datastore"
            )

    @contextmanager
    def _answer(
        self,
        content: vim.ServiceInstanceContent,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: Iterable[bytes] | None = None,
    ) -> Iterator[_Answer]:
        """The answer to one request. The connection goes back to the others when all of it was read.

        Each piece of the body that is sent has a whole timeout, and so has the answer.
        """
        address = self._address(path)
        stub = content.propertyCollector._GetStub()
        connection = stub.GetConnection()

        def extend() -> None:
            connection.bound(time.monotonic() + stub.timeout)

        keep = False
        try:
            pieces = None if body is None else _each_in_time(body, extend)
            connection.request(method, address, pieces, {"Cookie": stub.cookie, **(headers or {})})
            answer: http.client.HTTPResponse = connection.getresponse()
            self._require_good(answer, path)
            yield _Answer(answer, extend)
            keep = answer.isclosed()
        finally:
            if keep:
                stub.ReturnConnection(connection)
            else:
                connection.close()

    def _address(self, path: str) -> str:
        found = self._find()
        datastore_path(found, path)  # that it is one within the datastore
        place = urlencode({"dcPath": found.datacenter_path, "dsName": found.name}, quote_via=quote)
        return f"/folder/{quote(path)}?{place}"

    def _require_good(self, answer: http.client.HTTPResponse, path: str) -> None:
        status = answer.status
        if status < 300 or status == _BEYOND_THE_END:
            return
        answer.read(_SPOIL_BYTES)
        if status == http.HTTPStatus.UNAUTHORIZED:
            raise vim.fault.NotAuthenticated(msg=answer.reason)
        where = f"server {self._connection.server.name}: {path}: HTTP {status} {answer.reason}"
        if status == http.HTTPStatus.NOT_FOUND:
            raise FileNotFoundError(where)
        if status < 400:
            raise InvalidRequest(f"{where}: it is no file")
        if status == http.HTTPStatus.FORBIDDEN:
            raise DatastoreDenied(f"{where}; give the account of the sidecar the privilege Datastore.FileManagement")
        if status in (http.HTTPStatus.INSUFFICIENT_STORAGE, http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
            raise NoSpace(f"{where}; purge images that are not needed, or make the datastore larger")
        raise DatastoreUnavailable(f"{where}; look at the datastore, and at the server's log")


def _each_in_time(pieces: Iterable[bytes], extend: Callable[[], None]) -> Iterator[bytes]:
    for piece in pieces:
        extend()  # to send it, however long it took to make
        yield piece
    extend()
