"""What `fusefs.guard` starts: a program of its own, with the daemon's process id and a socket as its input."""

import ctypes
import errno
import os
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1
_MNT_DETACH = 2
_MOST_PATH_BYTES = 4096


def main() -> None:
    daemon, connection, died = int(sys.argv[1]), socket.socket(fileno=0), False

    def note_death(number: int, frame: object) -> None:
        nonlocal died
        died = True
        connection.shutdown(socket.SHUT_RD)  # ends what waits for the daemon

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the daemon, which has use for us until it ends
    signal.signal(signal.SIGUSR1, note_death)
    # When the thread ends that started us. Its process may stay, and what it has open, for as long as another one does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != daemon:
        return
    message, switches, _, _ = socket.recv_fds(connection, 1 + _MOST_PATH_BYTES, 1)
    connection.sendall(b"!")
    connection.recv(1)  # closed by a daemon that ends in good order, or has ended whole
    if died:
        for switch in switches:
            os.write(switch, b"1")
        if mountpoint := message[1:]:
            unmount(mountpoint)


def unmount(mountpoint: bytes) -> None:
    """Takes a mount away whose daemon has died; leaves alone whatever else is there by now."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        if error.errno not in {errno.ENOTCONN, errno.ECONNABORTED}:
            return
        if ctypes.CDLL(None).umount2(mountpoint, _MNT_DETACH):  # only root may
            os.execvp("fusermount3", ["fusermount3", "-u", "-z", os.fsdecode(mountpoint)])


if __name__ == "__main__":
    main()
