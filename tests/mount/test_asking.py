"""What the stream told of an image that this mount changed is asked for, until there is an answer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fusefs.tree import Tree
from fusefs.watching import Watcher
from sidecar.client import SidecarClient
from tests.mount.harness import hanging
from tests.support.processes import Sidecar, wait_until


def test_a_question_that_got_no_answer_is_asked_again(
    sidecar: Sidecar,
    client: SidecarClient,
    make_image: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_image("one/a")
    tree = Tree()
    with sidecar.client(timeout=0.3) as impatient:
        watcher = Watcher(impatient, tree)
        watcher.start()

        def is_shown() -> bool:
            image = tree.image("one", "a")
            return image is not None and image.is_valid

        try:
            wait_until(is_shown, "the image is known")
            old = client.image("one/a")
            client.delete("one/a")
            wait_until(lambda: not is_shown(), "the stream has told of its end")
            tree.changed(old)  # an answer that came late, and is doubted
            with hanging(sidecar):
                tree.doubt(("one", "a"))
                wait_until(lambda: "image not asked for" in caplog.text, "the sidecar did not answer")
                assert is_shown()
            wait_until(lambda: not is_shown(), "it is not shown any more")
        finally:
            watcher.stop()
