"""Who may write into a staged directory: its maker, while that is at it; then no other session over what it left.

Of several `cp -r` to the same new name one makes the directory. The others find it there and would write over what it
writes, or make a file that it is about to make, so that none of them succeeds; or write over what it has written before
that is published, so that its `sync` publishes theirs, and says that all is well.
"""

import errno

from fusefs.errors import fail
from fusefs.processes import Caller, descends_from, runs_a_program


class Claim:
    """Of the process that made a directory.

    What it wrote is its session's until somebody has looked whether that can be published: then it is published, or
    whoever likes may go on with it. So somebody who copies file by file, each by another program, claims nothing.

    Names are made, renamed and removed one at a time, as whoever calls sees to; the rest may come at any time.
    """

    def __init__(self, maker: Caller) -> None:
        self._maker = maker
        self._at_it = maker.process != 0
        self._wrote = False
        self._refused: set[int] = set()  # processes that came while the maker was at it
        self._late: set[int] = set()  # that came when it had left something
        self._removed: set[str] = set()  # by others than its session

    def require_left(self, directory: object, caller: Caller, *, is_busy: bool, removing: bool = False) -> None:
        """EBUSY while the maker is at it, and the caller is neither that nor a child of it.

        Who was refused once stays so, but for removing: it goes on with its next file when the maker has ended, and
        parts of two copies are no image. `is_busy`: something was written a moment ago, or a file is open for writing.
        """
        process, maker = caller.process, self._maker.process
        if process in self._refused and not removing:
            fail(errno.EBUSY, f"{directory} was another's when process {process} came to write into it")
        if not self._at_it or process in {0, maker} or descends_from(process, maker):
            return
        if is_busy and runs_a_program(maker):
            self._refused.add(process)
            fail(errno.EBUSY, f"{directory} is being made by process {maker}")
        self._at_it = False

    def wrote(self, caller: Caller) -> None:
        """After `require_left`: a file was made, or opened for writing."""
        if caller.process and (self._at_it or caller.process == self._maker.process):
            self._wrote = True

    def _holds_off(self, caller: Caller) -> bool:
        """Whether what the maker wrote is there to be published, and the caller is known to be another's."""
        is_other = caller.session not in {0, self._maker.session} and caller.process not in {0, self._maker.process}
        return (
            self._wrote
            and self._maker.session != 0
            and is_other
            and not descends_from(caller.process, self._maker.process)
        )

    def require_over(self, directory: object, name: str, writer: Caller, caller: Caller) -> None:
        """EBUSY for another one who wants to change a file that the maker's session wrote."""
        if self._is_held(writer, caller):
            self._late.add(caller.process)
            fail(
                errno.EBUSY,
                f"{name} of {directory} was written by another session, and is about to be published: "
                "remove the directory before you make another one in its place",
            )

    def require_new(self, directory: object, name: str, caller: Caller) -> None:
        """EBUSY for another one's new file that belongs to what it was refused, or takes a removed one's place."""
        if self._holds_off(caller) and (name in self._removed or caller.process in self._late):
            fail(errno.EBUSY, f"{name} is of another image than {directory}, which somebody else is making")

    def removed(self, name: str, writer: Caller, caller: Caller) -> None:
        if self._is_held(writer, caller):
            self._removed.add(name)

    def let_go(self) -> None:
        """It cannot be published as it is: whoever likes goes on with it, unless others took files away."""
        if not self._removed:
            self._wrote = False
            self._refused.clear()
            self._late.clear()

    def _is_held(self, writer: Caller, caller: Caller) -> bool:
        return self._holds_off(caller) and writer.session == self._maker.session
