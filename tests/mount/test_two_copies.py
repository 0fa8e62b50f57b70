"""Two copies to one new name: the files of both together are no image."""

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.processes import Mount, background

_MAKER = """
import os, sys
os.mkdir(sys.argv[1])
with open(sys.argv[1] + "/notes.txt", "w") as file:
    file.write("the first one's")
print("made", flush=True)
sys.stdin.read()
"""


def test_who_found_a_directory_anothers_does_not_go_on_with_its_next_file(mount: Mount, stack: ExitStack) -> None:
    target = mount.path / "one" / "new"
    maker = stack.enter_context(
        subprocess.Popen([sys.executable, "-c", _MAKER, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    assert maker.stdin is not None and maker.stdout is not None
    assert maker.stdout.readline() == b"made\n"

    def refusal(name: str) -> int | None:
        with pytest.raises(OSError) as refused:
            os.close(os.open(target / name, os.O_WRONLY | os.O_CREAT))
        return refused.value.errno

    assert refusal("notes.txt") == errno.EBUSY
    maker.stdin.close()
    assert maker.wait(20) == 0
    assert refusal("new-flat.vmdk") == errno.EBUSY
    # Whoever comes now began after it.
    with background("sh", "-c", 'echo text >"$0"', Path(target / "late.txt")) as other:
        assert other.wait(20) == 0
