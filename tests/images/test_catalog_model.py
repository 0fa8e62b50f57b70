"""The catalogue against a plain model: whatever is done to a datastore, by us and by others, it comes to know it.

Random histories on a real store of each layout. The model is a dictionary of what was done, and knows no file; the
clients resume at every revision that there ever was.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.datastores.posix import PosixDatastore
from sidecar.images import catalog as catalog_module
from sidecar.images.catalog import Catalog
from sidecar.images.checking import touch_image, validate_image
from sidecar.images.committing import StagedDisk, commit
from sidecar.images.copying import copy_image
from sidecar.images.deletion import delete_image, purge_image, restore_image
from sidecar.images.discovery import Discovery
from sidecar.images.image import Image, ImageKey, ImageState
from sidecar.images.layouts import LAYOUTS
from sidecar.images.metadata import update_companions
from sidecar.images.progress import Progress
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from tests.crash.support import answers, image_directory, write_image, write_image_files
from tests.support.places import MARKER, MIB, TIMESTAMP, TOMBSTONE

# Of one shard and of another; as a name of the layouts; long.
IMAGES = ("ab", "ab.c", "tmp_" + "x" * 124)
SECOND = 10**9
# In memory: fast, and with times that are alike for all that happens in one tick of the kernel.
MEMORY = "/dev/shm" if os.path.ismount("/dev/shm") else None
# Of removals, so that some are forgotten: a client that was away for longer needs everything again.
REMEMBERED = 3

ids = st.sampled_from(IMAGES)


@dataclass(frozen=True)
class Known:
    """What was done to an image."""

    size: int
    timestamp: bool = True
    descriptor: bool = True
    tombstone: bool = False
    marker: int | None = None
    companions: frozenset[str] = field(default_factory=frozenset)

    @property
    def state(self) -> ImageState:
        if self.tombstone:
            return ImageState.TOMBSTONED
        return ImageState.VALID if self.timestamp and self.descriptor else ImageState.INCOMPLETE

    @property
    def copied(self) -> "Known":
        return Known(self.size, companions=self.companions)


View = dict[ImageKey, Image]


class CatalogMachine(RuleBasedStateMachine):
    layout: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        # As on NFS: nobody tells of changes, so they have to be found.
        self.store = ImageStore(PosixDatastore("one", str(self.root), "nfs"), LAYOUTS[self.layout], lock_timeout=1.0)
        self.now = 1_700_000_000 * SECOND
        self.store.clock = self.clock
        self.catalog = Catalog()
        self.elsewhere(0, True)
        self.time = 0.0
        self.discovery = Discovery(self.store, self.catalog, monotonic=lambda: self.time)
        self.store.observe(self.discovery.refresh, self.discovery.note_use)
        self.model: dict[str, Known] = {}
        self.touched: dict[str, int] = {}
        self.sizes = 0
        self.views: list[tuple[int, View]] = [(0, {})]  # what a client knew, by revision
        self.foreign = False  # somebody changed the datastore, and we did not look since
        self.scan()

    def clock(self) -> int:
        self.now += SECOND
        return self.now

    def teardown(self) -> None:
        self.store.datastore.close()
        shutil.rmtree(self.root)

    def directory(self, image_id: str) -> Path:
        return image_directory(self.root, self.layout, image_id)

    def is_complete(self, image_id: str) -> bool:
        known = self.model.get(image_id)
        return known is not None and known.descriptor

    def next_size(self) -> int:
        self.sizes += 1
        return self.sizes * MIB

    def expect(self, work: Callable[[], object], expected: str) -> None:
        assert answers(work) == expected

    @initialize(present=st.sets(ids, min_size=1))
    def begin(self, present: set[str]) -> None:
        for image_id in sorted(present):
            self.somebody_publishes(image_id)
        self.scan()

    # What we do

    def new_image(self, image_id: str, make: Callable[[], object], made: Known) -> None:
        """Publishes: what is whole is in the way, what only lacks its timestamp is given one, a wreck goes."""
        known = self.model.get(image_id)
        if known is None or (known.state is ImageState.INCOMPLETE and not known.descriptor):
            self.expect(make, "ok")
            self.model[image_id] = made
            self.touched[image_id] = self.store.read(image_id).touched_ns or 0
            return
        self.expect(make, "IMAGE_ALREADY_EXISTS")
        if not known.tombstone and not known.timestamp:
            self.model[image_id] = replace(known, timestamp=True)
            self.touched[image_id] = self.store.read(image_id).touched_ns or 0

    @rule(image_id=ids)
    def publish(self, image_id: str) -> None:
        size = self.next_size()

        def make() -> None:
            with StagingDirectory(self.store, image_id, "import") as staging:
                write_image_files(self.root / staging.directory, "disk", size=size)
                commit(staging, StagedDisk(staging))

        self.new_image(image_id, make, Known(size))

    @rule(source_id=ids, image_id=ids)
    def copy(self, source_id: str, image_id: str) -> None:
        source = self.model.get(source_id)
        if source_id == image_id or source is None or source.state is not ImageState.VALID:
            return
        if image_id in self.model and self.model[image_id].state is not ImageState.INCOMPLETE:
            return self.expect(self.copying(source_id, image_id), "IMAGE_ALREADY_EXISTS")
        return self.new_image(image_id, self.copying(source_id, image_id), source.copied)

    def copying(self, source_id: str, image_id: str) -> Callable[[], object]:
        return lambda: copy_image(self.store, source_id, self.store, image_id, Progress())

    @rule(image_id=ids)
    def delete(self, image_id: str) -> None:
        known = self.model.get(image_id)
        expected = "IMAGE_NOT_FOUND" if known is None else "IMAGE_TOMBSTONED" if known.tombstone else "ok"
        self.expect(lambda: delete_image(self.store, image_id), expected)
        if known is not None:
            self.model[image_id] = replace(known, tombstone=True)

    @rule(image_id=ids)
    def restore(self, image_id: str) -> None:
        known = self.model.get(image_id)
        if known is None or not known.tombstone:
            expected = "IMAGE_NOT_FOUND" if known is None else "IMAGE_NOT_TOMBSTONED"
            return self.expect(lambda: restore_image(self.store, image_id), expected)
        whole = known.descriptor and known.timestamp
        self.expect(lambda: restore_image(self.store, image_id), "ok" if whole else "IMAGE_INCOMPLETE")
        if whole:
            self.model[image_id] = replace(known, tombstone=False)
        return None

    @rule(image_id=ids, force=st.booleans())
    def purge(self, image_id: str, force: bool) -> None:
        known = self.model.get(image_id)
        expected = (
            "ok" if known and (force or known.tombstone) else "IMAGE_NOT_TOMBSTONED" if known else "IMAGE_NOT_FOUND"
        )
        self.expect(lambda: purge_image(self.store, image_id, force=force), expected)
        if expected == "ok":
            del self.model[image_id]

    @rule(image_id=ids)
    def touch(self, image_id: str) -> None:
        known = self.model.get(image_id)
        self.expect(lambda: touch_image(self.store, image_id), self.of_valid(known))
        if known and known.state is ImageState.VALID:
            self.touched[image_id] = self.now

    @rule(image_id=ids, name=st.sampled_from(["notes", "more"]), remove=st.booleans())
    def update(self, image_id: str, name: str, remove: bool) -> None:
        known = self.model.get(image_id)
        expected = self.of_valid(known)
        if known and expected == "ok" and remove and name not in known.companions:
            expected = "FILE_NOT_FOUND"
        files, removed = ({}, [name]) if remove else ({name: b"x"}, [])
        self.expect(lambda: update_companions(self.store, image_id, files, removed), expected)
        if known and expected == "ok":
            companions = known.companions - {name} if remove else known.companions | {name}
            self.model[image_id] = replace(known, companions=companions)

    @rule(image_id=ids)
    def repair(self, image_id: str) -> None:
        known = self.model.get(image_id)
        can = known is not None and known.descriptor and not known.tombstone
        expected = "ok" if can else self.of_valid(known)
        self.expect(lambda: validate_image(self.store, image_id, repair=True), expected)
        if known and can and not known.timestamp:
            self.model[image_id] = replace(known, timestamp=True)
            self.touched[image_id] = self.now

    def of_valid(self, known: Known | None) -> str:
        if known is None:
            return "IMAGE_NOT_FOUND"
        state = known.state
        return {ImageState.VALID: "ok", ImageState.INCOMPLETE: "IMAGE_INCOMPLETE"}.get(state, "IMAGE_TOMBSTONED")

    @rule(image_id=ids)
    def look(self, image_id: str) -> None:
        """As GetImage does: the catalogue learns of it."""
        with contextlib.suppress(Exception):
            self.discovery.read(image_id)

    # What others do

    @rule(number=st.integers(0, 5), there=st.booleans())
    def elsewhere(self, number: int, there: bool) -> None:
        """On another datastore images come and go: what is told of this one is as before, however many those are."""
        key = ImageKey("two", f"elsewhere{number}")
        self.catalog.put(Image(key, "", ImageState.VALID)) if there else self.catalog.remove(key)

    @rule(image_id=ids, name=st.sampled_from([TIMESTAMP, TOMBSTONE, "descriptor", "notes"]))
    def somebody_removes_a_file(self, image_id: str, name: str) -> None:
        known = self.model.get(image_id)
        if known is None:
            return
        file = f"{image_id}.vmdk" if name == "descriptor" else name
        (self.directory(image_id) / file).unlink(missing_ok=True)
        self.foreign = True
        self.model[image_id] = {
            TIMESTAMP: replace(known, timestamp=False),
            TOMBSTONE: replace(known, tombstone=False),
            "descriptor": replace(known, descriptor=False),
            "notes": replace(known, companions=known.companions - {"notes"}),
        }[name]

    @rule(image_id=ids, name=st.sampled_from([TIMESTAMP, TOMBSTONE, "notes"]), at=st.integers(1, 2 * 10**9))
    def somebody_adds_a_file(self, image_id: str, name: str, at: int) -> None:
        known = self.model.get(image_id)
        if known is None:
            return
        path = self.directory(image_id) / name
        path.touch()
        os.utime(path, (at, at))
        self.foreign = True
        if name == TIMESTAMP:
            self.touched[image_id] = at * SECOND
        self.model[image_id] = {
            TIMESTAMP: replace(known, timestamp=True),
            TOMBSTONE: replace(known, tombstone=True),
            "notes": replace(known, companions=known.companions | {"notes"}),
        }[name]

    @rule(image_id=ids, at=st.integers(0, 2 * 10**9), remove=st.booleans())
    def somebody_marks(self, image_id: str, at: int, remove: bool) -> None:
        """As the origin's scan does: by a new file."""
        known = self.model.get(image_id)
        if known is None:
            return
        path = self.directory(image_id) / MARKER
        path.unlink(missing_ok=True)
        if not remove:
            path.write_text(f"{at}\n")
        self.foreign = True
        self.model[image_id] = replace(known, marker=None if remove else at)

    @rule(image_id=ids)
    def somebody_takes_the_directory_away(self, image_id: str) -> None:
        if self.directory(image_id).exists():
            shutil.rmtree(self.directory(image_id))
        self.model.pop(image_id, None)
        self.foreign = True

    @rule(image_id=ids)
    def somebody_publishes(self, image_id: str) -> None:
        if self.directory(image_id).exists():
            shutil.rmtree(self.directory(image_id))
        size = self.next_size()
        write_image(self.root, self.layout, image_id, size=size)
        os.utime(self.directory(image_id) / TIMESTAMP, (size, size))
        self.model[image_id] = Known(size)
        self.touched[image_id] = size * SECOND
        self.foreign = True

    @rule()
    def much_goes_elsewhere(self) -> None:
        """More than is remembered."""
        for number in range(1, 6):
            self.elsewhere(number, True)
            self.elsewhere(number, False)

    # What must hold

    @rule()
    def scan(self) -> None:
        # Later, as the next look always is: two times in a row, since what changed in the tick of a reading looks as
        # it did.
        for _ in range(2):
            self.time += 10
            self.discovery.check()
            assert self.discovery._scan()
        self.foreign = False
        self.catalogue_is_the_datastore()

    @invariant()
    @precondition(lambda self: not self.foreign)
    def catalogue_is_the_datastore(self) -> None:
        """Also at once after what we did, and without a look."""
        assert self.catalog.ids("one") == sorted(self.model)
        for image_id, known in self.model.items():
            image = self.catalog.get(self.store.key(image_id))
            assert image is not None
            assert image.state is known.state
            read = self.store.read(image_id)
            self.is_as_done(image_id, known, read)
            if image.details_known and self.layout != "vsan":
                assert image == read
        for state in ImageState:
            assert self.catalog.count("one", {state}) == sum(known.state is state for known in self.model.values())
        self.pages_are_all()

    def is_as_done(self, image_id: str, known: Known, image: Image) -> None:
        names = {f"{image_id}-flat.vmdk", *known.companions} | ({f"{image_id}.vmdk"} if known.descriptor else set())
        assert {file.name for file in image.files} == names
        assert image.capacity == (known.size if known.descriptor else 0)
        assert image.marked_unused_s == known.marker
        assert image.touched_ns == (self.touched[image_id] if known.timestamp else None)
        assert (image.tombstoned_ns is not None) == known.tombstone

    def pages_are_all(self) -> None:
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            page = self.catalog.page(["one"], set(ImageState), "", after, 2)
            assert page.total == len(self.model)
            found += [image.key.image_id for image in page.images]
            after = page.after
        assert found == sorted(self.model)

    @invariant()
    def whoever_resumes_knows_the_same(self) -> None:
        now = self.catalog.changes_since(0, "")
        assert now.everything
        view: View = {image.key: image for image in now.images}
        for revision, known in self.views:
            for datastore in ("", "one"):
                changes = self.catalog.changes_since(revision, datastore)
                resumed = {} if changes.everything else dict(known)
                resumed |= {image.key: image for image in changes.images}
                for key in changes.removed:
                    resumed.pop(key, None)
                wanted = {key: image for key, image in view.items() if datastore in ("", key.datastore)}
                if datastore and not changes.everything:
                    resumed = {key: image for key, image in resumed.items() if key.datastore == datastore}
                assert resumed == wanted
        if now.revision > self.views[-1][0]:
            self.views.append((now.revision, view))


def make(layout: str) -> type[CatalogMachine]:
    return type(f"{layout}_machine", (CatalogMachine,), {"layout": layout})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_is_done_the_catalogue_is_the_datastore_and_every_client_knows_it(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(catalog_module, "_REMEMBERED_REMOVALS", REMEMBERED)
    options: dict[str, Any] = {"max_examples": 60, "stateful_step_count": 40}
    run_state_machine_as_test(make(layout), settings=settings(**options))
