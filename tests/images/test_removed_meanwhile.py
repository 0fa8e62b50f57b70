"""An image, or a companion file of it, that goes while somebody looks at it."""

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.errors import ImagesError
from tests.support.disks import import_image, make_disk
from tests.support.places import MIB, Place
from tests.support.world import World

ROUNDS = 15
LAWFUL = {"ok", "IMAGE_NOT_FOUND", "IMAGE_INCOMPLETE"}


@pytest.mark.slow
def test_who_looks_at_an_image_that_is_being_purged_is_told_so(
    world: World, place: Place, stack: ExitStack, tmp_path: Path
) -> None:
    ref = f"{place.name}/a"
    descriptor = make_disk(tmp_path / "disk", size=MIB, data=())
    over = threading.Event()
    answers: set[str] = set()

    def look(client: SidecarClient) -> None:
        while not over.is_set():
            for call in (client.image, client.validate):
                try:
                    call(ref)
                    answers.add("ok")
                except ImagesError as error:
                    answers.add(error.reason)

    threads = [threading.Thread(target=look, args=(stack.enter_context(world.sidecar.client()),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(ROUNDS):
            import_image(world.client, ref, descriptor, companions={"disk.ecv": b"{}", "disk.manifest": b"{}"})
            world.client.update_metadata(ref, remove=["a.manifest"])
            world.client.delete(ref, force=True)
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert answers <= LAWFUL
