"""The catalogue: many images, and what others do to the datastore while it looks, or does not."""

import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED
from sidecar.client import SidecarClient
from tests.crash.support import LAYOUTS, image_directory, write_image
from tests.support.processes import Sidecar, wait_until

MANY = 10_000


def ids(client: SidecarClient) -> list[str]:
    return [image.ref.image_id for image in client.images("one", page_size=5000)]


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_images_are_listed_whole_and_in_order(
    tmp_path: Path, stack: ExitStack, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "one"
    expected = [f"image-{number:05d}" for number in range(MANY)]
    for image_id in expected:
        write_image(root, layout, image_id)
    began = time.monotonic()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    # On a machine that is busy, the first answer may come before everything was read, and say so.
    wait_until(
        lambda: not next(client.image_pages("one", page_size=500)).incomplete_datastores, "every image was read", 60
    )
    first = time.monotonic() - began
    found: list[str] = []
    times = []
    pages = client.image_pages("one", page_size=500)
    for _ in range(MANY // 500):
        before = time.monotonic()
        page = next(pages)
        times.append(time.monotonic() - before)
        assert page.total_size == MANY
        assert not page.incomplete_datastores
        found += [image.ref.image_id for image in page.images]
    assert next(pages, None) is None
    assert found == expected
    median = statistics.median(times[1:])
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{layout}: {MANY} images: first page {first:.2f} s after the start, then {median * 1000:.1f} ms a page, "
            f"{memory(sidecar.pid) >> 20} MiB resident"
        )
    # Generous: `scripts/bench` measures. What this catches is reading the datastore for each page.
    assert first < 60
    assert median < 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ("local", "nfs"))
def test_what_others_do_to_the_datastore_is_seen(tmp_path: Path, stack: ExitStack, layout: str, kind: str) -> None:
    """With inotify, and (type nfs) by looking again."""
    root = tmp_path / "one"
    root.mkdir()
    config = f'[datastore.one]\npath = "{root}"\nlayout = "{layout}"\ntype = "{kind}"\nrescan_seconds = 0.2\n'
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", config=config))
    client = stack.enter_context(sidecar.client())
    assert ids(client) == []
    write_image(root, layout, "a")
    wait_until(lambda: ids(client) == ["a"], "a new image is seen")
    directory = image_directory(root, layout, "a")
    (directory / "image_tombstone.txt").touch()
    wait_until(lambda: ids(client) == [], "a tombstone is seen")
    assert [i.ref.image_id for i in client.images("one", states=[IMAGE_STATE_TOMBSTONED])] == ["a"]
    (directory / "image_tombstone.txt").unlink()
    wait_until(lambda: ids(client) == ["a"], "its removal is seen")
    shutil.rmtree(directory)
    wait_until(lambda: ids(client) == [], "a vanished image is seen")


_CHURN = """
import os, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from tests.crash.support import image_directory, write_image
root, layout = Path(sys.argv[1]), sys.argv[2]
tombstone = image_directory(root, layout, "first") / "image_tombstone.txt"
for _ in range(int(sys.argv[4])):
    tombstone.write_bytes(b"")
    tombstone.unlink()
# Of these, nobody was told.
for number in range(40):
    extent = write_image(root, layout, f"late-{number:02d}")
    if number % 2 == 0:
        (extent.parent / "image_tombstone.txt").write_bytes(b"")
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_changes_than_the_kernel_remembers_lose_nothing(tmp_path: Path, stack: ExitStack, layout: str) -> None:
    root = tmp_path / "one"
    root.mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    assert ids(client) == []
    write_image(root, layout, "first")
    wait_until(lambda: ids(client) == ["first"], "the catalogue follows")
    # Stopped, it cannot read its queue: what comes in the end is lost to it for certain.
    queue = Path("/proc/sys/fs/inotify/max_queued_events").read_text().strip()
    sidecar.stop_now()
    try:
        project = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", _CHURN, str(root), layout, project, queue], check=True, timeout=60)
    finally:
        sidecar.signal(signal.SIGCONT)
    expected = ["first", *(f"late-{number:02d}" for number in range(1, 40, 2))]
    expected.sort()
    wait_until(lambda: ids(client) == expected, "everything is as it is on the datastore", timeout=30)
    tombstoned = [i.ref.image_id for i in client.images("one", states=[IMAGE_STATE_TOMBSTONED])]
    assert tombstoned == [f"late-{number:02d}" for number in range(0, 40, 2)]
