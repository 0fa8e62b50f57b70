"""imagectl export: an image as a directory of this machine."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable

import click

from sidecar import errors
from sidecar.client import Image, ImageFile, ImageRef, ImageState, SidecarClient
from sidecar.ctl.output import human_size
from sidecar.ctl.progress import Advance, progress_bar
from sidecar.ctl.session import Session, command, image_argument, ref_text


class DirectoryExists(errors.ImageAlreadyExists):
    """The place of an export is taken."""

    reason = "DIRECTORY_ALREADY_EXISTS"


@command("export")
@image_argument("image")
@click.argument("directory", type=click.Path())
@click.pass_obj
def export(session: Session, image: ImageRef, directory: str) -> None:
    """Write an image's files into a new directory.

    DIRECTORY appears complete or not at all. It may be there when it is empty.
    """
    target = _target(directory)
    with session.client() as sidecar:
        found = sidecar.image(image)
        _require_whole(found)
        written: int | None = None

        def outcome() -> str:
            if written is None:
                return f"cancelled: {directory} was not made"
            return f"interrupted, but {directory} is there: the cancellation came too late"

        with session.taking_back(sidecar, outcome), progress_bar(ref_text(image)) as advance:
            written = _write(sidecar, found, target, advance, session.signals.check)
    session.answer(
        f"{ref_text(image)} exported to {directory}: {len(found.files)} files, {human_size(written)}",
        {
            "image": ref_text(image),
            "directory": target,
            "files": [file.name for file in found.files],
            "written_bytes": written,
        },
    )


def _target(directory: str) -> str:
    """The directory's real path; it is not there, or is empty and can be replaced."""
    target = os.path.realpath(directory)
    try:
        with os.scandir(target) as entries:
            if next(entries, None) is not None:
                raise DirectoryExists(f"{directory} is there, and is not empty: name a directory that is to be made")
        if os.path.ismount(target) or os.path.samefile(target, "."):
            raise errors.InvalidRequest(
                f"{directory} is a mount point or the current directory, which cannot be replaced: name one in it"
            )
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(target)):
            raise errors.InvalidRequest(f"{directory} cannot be made: there is no {os.path.dirname(target)}") from None
    except NotADirectoryError:
        raise errors.InvalidRequest(f"{directory} is not a directory") from None
    return target


def _require_whole(image: Image) -> None:
    name = ref_text(image.ref)
    if image.state == ImageState.IMAGE_STATE_TOMBSTONED:
        raise errors.ImageTombstoned(f"{name} is deleted: bring it back first, with imagectl restore {name}")
    if image.state != ImageState.IMAGE_STATE_VALID or image.problems:
        raise errors.ImageIncomplete(f"{name} is not whole: {'; '.join(image.problems) or 'see imagectl validate'}")


def _require_unchanged(image: Image, sidecar: SidecarClient) -> None:
    """The files are read one after the other, by name: they must still be those that the image had at the start."""
    name = ref_text(image.ref)
    try:
        now = sidecar.image(image.ref)
    except errors.ImageNotFound:
        raise errors.DiskFileFault(f"{name} was deleted while it was exported: nothing was written") from None
    if sorted(map(_identity, now.files)) != sorted(map(_identity, image.files)):
        raise errors.DiskFileFault(f"{name} changed while it was exported: export it again")


def _identity(file: ImageFile) -> tuple[str, int, int, int]:
    return file.name, file.inode, file.size_bytes, file.modify_time.ToNanoseconds()


def _write(sidecar: SidecarClient, image: Image, target: str, advance: Advance, check: Callable[[], None]) -> int:
    """Writes the files beside `target` and gives the directory its name when all is durable; returns the data bytes.

    What `check` raises, which is called for every part, ends it.
    """
    parent, name = os.path.split(target)
    partial = os.path.join(parent, f".{name}.partial-{secrets.token_hex(4)}")
    done = 0

    def count(data: int) -> None:
        nonlocal done
        check()
        done += data
        advance(done, image.allocated_bytes)

    try:
        os.mkdir(partial)
    except OSError as error:  # of a name that nobody has asked for
        raise OSError(error.errno, f"cannot be made: {error.strerror}", target) from None
    try:
        directory = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for file in image.files:
                _write_file(sidecar, image, file, directory, count)
            os.fsync(directory)
        finally:
            os.close(directory)
        _require_unchanged(image, sidecar)
        check()
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise DirectoryExists(f"{target} was made by somebody else meanwhile: name another") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    above = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)
    return done


def _write_file(
    sidecar: SidecarClient, image: Image, file: ImageFile, directory: int, count: Callable[[int], None]
) -> None:
    """Writes one file, holes left out; `count` is told the data bytes."""
    if "/" in file.name or file.name in ("", ".", ".."):
        raise errors.DiskFileFault(f"{ref_text(image.ref)} has a file named {file.name!r}, which is no file name")
    fd = os.open(
        file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=directory
    )
    try:
        position, size = 0, -1
        for answer in sidecar.read_file(image.ref, file.name):
            size = answer.size_bytes if size < 0 else size
            if answer.offset != position:
                break
            view = memoryview(answer.data)
            while view:
                written = os.pwrite(fd, view, position)
                view, position = view[written:], position + written
            position += answer.hole_bytes
            count(len(answer.data))
        if position != max(size, 0):
            raise errors.DiskFileFault(
                f"{file.name} of {ref_text(image.ref)} ended at {position} of {size} bytes: export it again"
            )
        os.ftruncate(fd, position)
        os.fsync(fd)
    finally:
        os.close(fd)
