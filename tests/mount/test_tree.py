"""The index that the mount shows, fed as the watch stream feeds it."""

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

from fusefs import nodes
from fusefs.doubts import DOUBT_SECONDS, Key
from fusefs.tree import Tree, file_inode
from sidecar.client import Datastore, FileKind, Image, ImageRef, ImageState, WatchImagesResponse

VALID, TOMBSTONED = ImageState.IMAGE_STATE_VALID, ImageState.IMAGE_STATE_TOMBSTONED


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def image(
    image_id: str, *, state: ImageState.ValueType = VALID, inode: int = 1, details: bool = True, datastore: str = "one"
) -> Image:
    made = Image(
        ref=ImageRef(datastore=datastore, image_id=image_id),
        state=state,
        details_known=details,
        directory=f"image_{image_id}",
    )
    if details:
        for name, kind, size in (
            (f"{image_id}.ecv", FileKind.FILE_KIND_COMPANION, 10),
            (f"{image_id}-flat.vmdk", FileKind.FILE_KIND_EXTENT, 1 << 30),
            (f"{image_id}.vmdk", FileKind.FILE_KIND_DESCRIPTOR, 500),
        ):
            file = made.files.add(name=name, kind=kind, size_bytes=size, allocated_bytes=size // 2, inode=inode)
            file.modify_time.FromNanoseconds(1_700_000_000_123_456_789 + inode)
    return made


def snapshot(*images: Image, datastores: tuple[str, ...] = ("one", "two")) -> WatchImagesResponse:
    return WatchImagesResponse(
        snapshot_start=True,
        snapshot_complete=True,
        images=images,
        datastores=[Datastore(name=name) for name in datastores],
    )


def change(*images: Image, removed: tuple[str, ...] = ()) -> WatchImagesResponse:
    return WatchImagesResponse(images=images, removed=[ImageRef(datastore="one", image_id=each) for each in removed])


def names(tree: Tree, datastore: str = "one") -> list[str]:
    found = tree.datastore(datastore)
    assert found is not None
    return sorted(each.image_id for each in found.valid_images())


def next_doubted(tree: Tree) -> Key:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tree.next_doubted)
        try:
            asked = waiting.result(5)
        except TimeoutError:
            tree.end()
            raise AssertionError("nothing is to be asked for") from None
    assert asked is not None
    return asked


def answer_all(tree: Tree, answers: dict[str, Image | None]) -> None:
    """The sidecar's answers about the images that it is asked for, which are these."""
    for _ in range(len(answers)):
        asked = next_doubted(tree)
        tree.settle(asked, answers.pop(asked[1]))
    assert not answers


def test_shows_the_valid_images_of_a_snapshot_and_every_change() -> None:
    tree = Tree()
    assert not tree.wait_complete(0)
    tree.apply(snapshot(image("a"), image("b", state=TOMBSTONED), image("c", datastore="two")))
    assert tree.wait_complete(0)
    assert (names(tree), names(tree, "two")) == (["a"], ["c"])
    tree.apply(change(image("d"), image("b"), removed=("a",)))
    assert names(tree) == ["b", "d"]
    tree.apply(change(image("b", state=TOMBSTONED)))
    assert names(tree) == ["d"]


def test_files_are_as_the_sidecar_says_in_its_order() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a", inode=5)))
    found = tree.image("one", "a")
    assert found is not None
    assert found.directory == "image_a"
    assert [file.name for file in found.files] == ["a.ecv", "a-flat.vmdk", "a.vmdk"]
    extent = found.file("a-flat.vmdk")
    assert extent is not None
    assert (extent.size, extent.allocated, extent.inode) == (1 << 30, 1 << 29, 5)
    assert extent.modified_ns == 1_700_000_000_123_456_794
    assert extent.is_disk
    assert found.file("b.vmdk") is None


def test_goes_on_showing_the_old_images_until_a_new_snapshot_is_whole() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a"), image("b")))
    tree.apply(WatchImagesResponse(snapshot_start=True, images=[image("a")], datastores=[Datastore(name="one")]))
    assert names(tree) == ["a", "b"]
    tree.apply(WatchImagesResponse(snapshot_complete=True, images=[image("c")]))
    assert names(tree) == ["a", "c"]
    assert [each.name for each in tree.datastores] == ["one"]


def test_a_snapshot_that_broke_off_does_not_count() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a")))
    tree.apply(WatchImagesResponse(snapshot_start=True, images=[image("b")], datastores=[Datastore(name="one")]))
    tree.forget_half_snapshot()
    tree.apply(change(image("c")))
    assert names(tree) == ["a", "c"]


def test_inode_numbers_are_stable_and_in_the_order_of_a_copy() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a"), image("b")))
    before = tree.image("one", "a")
    tree.apply(change(image("a", inode=9)))
    tree.apply(snapshot(image("b"), image("a", inode=9)))
    after = tree.image("one", "a")
    assert before is not None and after is not None
    assert before.inode == after.inode
    numbers = [file_inode(after.number, file.name, file.kind) for file in after.files]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 3


def test_what_this_mount_did_is_not_undone_by_an_older_event() -> None:
    clock = Clock()
    tree = Tree(clock=clock)
    tree.apply(snapshot(image("old")))
    tree.changed(image("new"))
    tree.deleted(ImageRef(datastore="one", image_id="old"))
    # The stream tells of before: the new one is not there, the old one still is.
    tree.apply(change(image("old"), removed=("new",)))
    tree.apply(snapshot(image("old")))
    assert names(tree) == ["new"]
    # The sidecar is asked, and what it says counts.
    answer_all(tree, {"new": None, "old": image("old")})
    assert names(tree) == ["old"]
    clock.now += DOUBT_SECONDS
    tree.apply(change(removed=("old",)))
    assert names(tree) == []


def test_an_answer_that_was_asked_for_before_another_change_does_not_count() -> None:
    tree = Tree()
    tree.apply(snapshot())
    tree.changed(image("a"))
    tree.apply(change(image("a")))
    asked = next_doubted(tree)
    tree.deleted(ImageRef(datastore="one", image_id="a"))
    assert asked == ("one", "a")
    tree.settle(asked, image("a"))
    assert names(tree) == []
    # It is asked for again: what others did after that is not lost either.
    answer_all(tree, {"a": image("a")})
    assert names(tree) == ["a"]


def test_an_answer_that_is_older_than_what_the_stream_told_does_not_count() -> None:
    clock = Clock()
    tree = Tree(clock=clock)
    tree.apply(snapshot())
    tree.changed(image("a"))
    tree.apply(change(image("a")))
    asked = next_doubted(tree)
    clock.now += DOUBT_SECONDS
    tree.apply(change(image("a", state=TOMBSTONED)))
    tree.settle(asked, image("a"))
    assert names(tree) == []
    answer_all(tree, {"a": image("a", state=TOMBSTONED)})
    assert names(tree) == []


def test_what_the_stream_tells_while_this_mount_changes_an_image_is_neither_lost_nor_overwritten() -> None:
    """Another client deletes what this mount publishes: the event overtakes the answer to the publish."""
    tree = Tree()
    tree.apply(snapshot())
    with tree.changing(("one", "a")):
        tree.apply(change(image("a", state=TOMBSTONED)))
        tree.changed(image("a"))
    assert names(tree) == ["a"]
    answer_all(tree, {"a": image("a", state=TOMBSTONED)})
    assert names(tree) == []


def test_an_image_that_could_not_be_asked_for_is_asked_for_again() -> None:
    tree = Tree()
    tree.apply(snapshot())
    tree.changed(image("a"))
    tree.apply(change(removed=("a",)))
    asked = next_doubted(tree)
    tree.doubt(asked)
    answer_all(tree, {"a": None})
    assert names(tree) == []


def test_details_that_were_asked_for_before_a_change_are_not_remembered() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a", details=False)))
    before = tree.image("one", "a")
    assert before is not None
    tree.apply(change(image("a", details=False, state=TOMBSTONED)))
    assert tree.learn(before, image("a")).is_valid  # for whoever asked before
    assert names(tree) == []
    tree.apply(change(removed=("a",)))
    tree.learn(before, image("a"))
    assert names(tree) == []


def test_what_this_mount_did_long_ago_takes_no_memory() -> None:
    clock = Clock()
    tree = Tree(clock=clock)
    tree.apply(snapshot())

    def make_and_delete(count: int) -> None:
        for number in range(count):
            clock.now += 1
            with tree.changing(("one", f"image-{number:040d}")):
                tree.deleted(ImageRef(datastore="one", image_id=f"image-{number:040d}"))

    make_and_delete(100)
    gc.collect()
    tracemalloc.start()
    try:
        make_and_delete(5000)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 50_000


def test_details_that_were_asked_for_stay_known() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a", details=False)))
    found = tree.image("one", "a")
    assert found is not None and not found.details_known and not found.files
    tree.learn(found, image("a"))
    tree.apply(change(image("a", details=False)))
    found = tree.image("one", "a")
    assert found is not None and found.details_known and len(found.files) == 3
    tree.apply(change(image("a", details=False, state=TOMBSTONED)))
    assert names(tree) == []


def test_says_which_images_changed() -> None:
    told: list[tuple[object, ...]] = []
    tree = Tree(
        before_change=lambda key: told.append((*key, tree.image(*key))),
        on_change=lambda datastore, old, new: told.append((datastore, old, new, tree.image(datastore, old.image_id))),
    )
    tree.apply(snapshot(image("a"), image("b")))
    before = tree.image("one", "b")
    assert told == []
    tree.apply(change(image("a"), image("b", inode=2)))
    now = tree.image("one", "b")
    tree.purged(ImageRef(datastore="one", image_id="b"))
    assert told == [("one", "b", before), ("one", before, now, now), ("one", "b", now), ("one", now, None, None)]


def test_an_image_that_changed_is_known_by_the_paths_of_both() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a", state=TOMBSTONED), image("b")))
    assert list(nodes.file_paths("one", tree.image("one", "a"), None, tree.image("one", "b"))) == [
        *("/one/.deleted/a/a.ecv", "/one/.deleted/a/a-flat.vmdk", "/one/.deleted/a/a.vmdk"),
        *("/one/b/b.ecv", "/one/b/b-flat.vmdk", "/one/b/b.vmdk"),
    ]


def test_an_image_takes_less_than_a_kilobyte() -> None:
    tree = Tree()
    tree.apply(snapshot())
    gc.collect()
    tracemalloc.start()
    try:
        for start in range(0, 10_000, 500):
            tree.apply(change(*(image(f"debian-12-build-{number:08d}") for number in range(start, start + 500))))
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(names(tree)) == 10_000
    assert used / 10_000 < 1000


def test_a_snapshot_says_nothing_of_what_it_lacks_of_an_incomplete_datastore() -> None:
    tree = Tree()
    tree.apply(snapshot(image("a"), image("b", datastore="two"), image("c", datastore="two")))
    answer = snapshot(image("c", state=TOMBSTONED, datastore="two"))
    answer.incomplete_datastores.append("two")
    tree.apply(answer)
    assert (names(tree), names(tree, "two")) == ([], ["b"])
    tree.apply(snapshot(image("c", datastore="two")))
    assert names(tree, "two") == ["c"]
