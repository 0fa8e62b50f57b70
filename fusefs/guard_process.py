"""What `fusefs.guard` starts: a program of its own, with the daemon's process id and a socket as its input."""

import contextlib
import ctypes
import errno
import os
import signal
import socket
import sys
import time

_PR_SET_PDEATHSIG = 1
_MNT_DETACH = 2
_MOST_BYTES = 8192
# For as long fusermount3 is let do it: of two who unmount at a time, one may take what was mounted there before.
_FUSERMOUNT_SECONDS = 1.0


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
    message, switches, _, _ = socket.recv_fds(connection, _MOST_BYTES, 1)
    connection.sendall(b"!")
    if connection.recv(1):
        return  # the daemon ends in good order
    # Comes for each of the daemon's threads, and what follows inherits it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if died:
        for switch in switches:
            with contextlib.suppress(OSError):
                os.write(switch, b"1")
    device, _, mountpoint = message.partition(b" ")
    if mountpoint and is_mounted(mountpoint, int(device)):
        time.sleep(_FUSERMOUNT_SECONDS)
        unmount(mountpoint, int(device))


def is_mounted(mountpoint: bytes, device: int) -> bool:
    """Whether the mount of that device number is the last one at the path."""
    place = os.open(mountpoint, os.O_PATH)
    try:
        return _is_of(place, device)
    finally:
        os.close(place)


def unmount(mountpoint: bytes, device: int) -> None:
    """Takes the dead mount of that device number away, and none that is below it, or came there since.

    Only root does that by the mount itself; for others fusermount3 takes what is at the path, a moment later.
    """
    place = os.open(mountpoint, os.O_PATH)
    if not _is_of(place, device) or not _is_dead(place):
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.umount2(f"/proc/self/fd/{place}".encode(), _MNT_DETACH) and ctypes.get_errno() == errno.EPERM:
        os.execvp("fusermount3", ["fusermount3", "-u", "-z", os.fsdecode(mountpoint)])


def _is_dead(place: int) -> bool:
    """Whether nobody serves it; a new daemon's mount may have the number of the old one's."""
    try:
        os.fstatvfs(place)
    except OSError as error:
        return error.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    return False


def _is_of(place: int, device: int) -> bool:
    """Whether the open directory is in the mount of that device number. Whoever serves it is not asked."""
    with open(f"/proc/self/fdinfo/{place}", encoding="ascii") as file:
        number = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", "rb") as mounts:
        devices = [line.split()[2] for line in mounts if line.split()[0] == number.encode()]
    return devices == [f"{os.major(device)}:{os.minor(device)}".encode()]


if __name__ == "__main__":
    main()
