"""The addresses that the sidecar listens at: a unix socket that nobody else may open, or a loopback port."""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
from typing import Protocol

import grpc

from sidecar.errors import ImagesError

SOCKET_MODE = 0o660


class ListenError(ImagesError):
    """The sidecar cannot listen there: somebody else does, or may not be replaced."""

    reason, code, errno, exit_code = "ADDRESS_UNUSABLE", "FAILED_PRECONDITION", errno.EADDRINUSE, 1


class Listener(Protocol):
    """One address, for the life of one server: bind, then open when calls can be answered, then close."""

    # Where clients reach it; known after bind.
    address: str

    def bind(self, server: grpc.Server) -> None:
        """Makes the server listen; nobody finds it yet. Raises ListenError, and holds nothing then."""

    def open(self) -> None:
        """Lets clients find the server, which answers by now."""

    def close(self) -> None:
        """Clients find nothing there any more. Never touches what somebody else put there."""


def listener(listen: str) -> Listener:
    """For an address as the configuration has it."""
    return UnixSocket(listen.removeprefix("unix:")) if listen.startswith("unix:") else LoopbackPort(listen)


class LoopbackPort:
    def __init__(self, listen: str) -> None:
        self.address = listen

    def bind(self, server: grpc.Server) -> None:
        try:
            port = server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise ListenError(f"{self.address}: the port is in use, or may not be used: {error}") from error
        self.address = f"{self.address.rpartition(':')[0]}:{port}"

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass


class UnixSocket:
    """A socket with mode 0660, of which there was never another.

    gRPC binds by path, with the process's umask, and replaces any socket that is there, live or not. So it binds in a
    directory that only we can enter; the socket gets its mode there and is renamed into place when it answers. The
    directory is named through its descriptor: its path could be too long for a socket's address when the final one
    just fits.

    A lock file beside the socket, held for the life of the server, decides between two sidecars. It is removed at the
    end, while it is held. Whoever gets the lock looks whether the path still leads to what was locked, and begins anew
    when it does not: else a third one could lock a new file while the second holds the old one.
    """

    def __init__(self, path: str) -> None:
        self.address = f"unix:{path}"
        self._path = path
        self._name = f"sidecar-{secrets.token_hex(8)}"
        self._lock_fd = -1
        # Of the private directory. Open as long as gRPC has the path: it unlinks what it bound when it ends, and
        # another directory must not answer to that number until then.
        self._directory_fd = -1
        self._inode: tuple[int, int] | None = None

    def bind(self, server: grpc.Server) -> None:
        try:
            if not os.path.lexists(self._lock_path):
                self._check()  # before there is a lock file, which would be left where we may not listen
            self._lock()
            self._check()
            self._bind(server)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                directory = os.path.dirname(os.path.abspath(self._path))
                if not os.path.isdir(directory):
                    raise ListenError(
                        f"{self._path}: there is no directory {directory}: make it first, or listen elsewhere"
                    ) from error
                raise ListenError(f"{self._path}: {error.strerror}") from error
            raise

    def open(self) -> None:
        try:
            # Again, as late as can be: what is not a socket is never replaced.
            self._check()
            os.rename(self._name, self._path, src_dir_fd=self._directory_fd)
        except OSError as error:
            raise ListenError(f"{self._path}: {error.strerror}") from error
        os.rmdir(self._private)

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == self._inode:
                os.unlink(self._path)
        self._release()

    @property
    def _private(self) -> str:
        return f"{self._path}.new"

    @property
    def _lock_path(self) -> str:
        return f"{self._path}.lock"

    def _lock(self) -> None:
        while self._lock_fd < 0:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_lock_file(fd):  # else whoever had it has just ended
                    self._lock_fd, fd = fd, -1
            except BlockingIOError as error:
                holder = os.read(fd, 32).decode("ascii", "replace").strip()
                who = f" (process {holder})" if holder else ""
                raise ListenError(f"{self._path}: another sidecar{who} serves there") from error
            finally:
                if fd >= 0:
                    os.close(fd)
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _is_lock_file(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.lstat(self._lock_path), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _check(self) -> None:
        """Nothing, or a socket that nobody listens at, is what may be there."""
        try:
            mode = os.lstat(self._path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ListenError(f"{self._path}: there is something that is not a socket; remove it, or listen elsewhere")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self._path)
            except (ConnectionRefusedError, FileNotFoundError):
                return  # of a process that is gone
            except BlockingIOError:
                pass  # somebody listens, and is busy
        raise ListenError(f"{self._path}: another process serves there")

    def _bind(self, server: grpc.Server) -> None:
        self._clear_private()
        os.mkdir(self._private, 0o700)
        self._directory_fd = os.open(self._private, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            server.add_insecure_port(f"unix:/proc/self/fd/{self._directory_fd}/{self._name}")
        except RuntimeError as error:
            raise ListenError(f"{self._path}: {error}") from error
        os.chmod(self._name, SOCKET_MODE, dir_fd=self._directory_fd)
        made = os.stat(self._name, dir_fd=self._directory_fd, follow_symlinks=False)
        self._inode = (made.st_dev, made.st_ino)

    def _clear_private(self) -> None:
        """Removes the directory of a sidecar that was killed between bind and open; the lock makes it ours."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._private):
                os.unlink(f"{self._private}/{name}")
            os.rmdir(self._private)

    def _release(self) -> None:
        if self._directory_fd >= 0:
            # Only the directory that we made: without the descriptor, the lock may be another's.
            with contextlib.suppress(OSError):
                self._clear_private()
            os.close(self._directory_fd)
            self._directory_fd = -1
        if self._lock_fd >= 0:
            # Last: from here on another one may have all that was ours.
            with contextlib.suppress(OSError):
                if self._is_lock_file(self._lock_fd):
                    os.unlink(self._lock_path)
            os.close(self._lock_fd)
            self._lock_fd = -1
