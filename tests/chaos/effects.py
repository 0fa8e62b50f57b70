"""What each kind of operation does to a name, by what was answered: the rules that the checker holds the product to.

A kind that is not here is judged by its answers alone (see `answers`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tests.chaos.history import ERROR, OK, Operation
from tests.chaos.reading import ABSENT, DELETED, DELETED_WRECK, VALID, WRECK
from tests.chaos.register import Effect, State, Step

IMPORTING = ("import", "mount-import")
PUBLISHING = ("copy", "import", "mount-copy", "mount-import")
SWEEPING = ("sweep",)
REMOVING = ("purge", "force", "mount-purge")
UPDATING = ("update",)
LOOKING = ("touch", "validate", "read")
# Refused before anything was changed, or without a word on what is there.
SILENT = {
    "LOCK_TIMEOUT",
    "TOO_MANY_CALLS",
    "NO_SPACE",
    "IMAGE_INCOMPLETE",
    "STAGING_NOT_FOUND",
}
# No sidecar should ever answer so here.
UNEXPECTED = {
    "INTERNAL",
    "DISK_FILE_FAULT",
    "DATASTORE_DENIED",
    "DATASTORE_NOT_FOUND",
    "DATASTORE_UNAVAILABLE",
    "INVALID_DISK",
    "INVALID_IMAGE_ID",
    "INVALID_METADATA",
    "INVALID_REQUEST",
}
_SEEN: dict[str, tuple[str, ...]] = {
    "IMAGE_NOT_FOUND": (ABSENT,),
    "IMAGE_ALREADY_EXISTS": (VALID, DELETED, DELETED_WRECK),
    "IMAGE_TOMBSTONED": (DELETED, DELETED_WRECK),
    "IMAGE_NOT_TOMBSTONED": (VALID, WRECK),
    "IMAGE_IN_USE": (VALID, WRECK, DELETED, DELETED_WRECK),
}
# What of them a copy is told of its source.
SOURCE_SEEN = {reason: _SEEN[reason] for reason in ("IMAGE_NOT_FOUND", "IMAGE_TOMBSTONED")}


def sees(*statuses: str, contents: Iterable[int] | None = None, updates: Iterable[int | None] | None = None) -> Effect:
    """It found one of these, and changed nothing; what it saw of the bytes is known from then on."""
    only_contents = None if contents is None else frozenset(contents)
    only_updates = None if updates is None else frozenset(updates)

    def effect(state: State) -> list[State]:
        if state.status not in statuses:
            return []
        if only_contents is not None and state.status != ABSENT:
            state = replace(state, contents=state.contents & only_contents)
        if only_updates is not None and state.status != ABSENT:
            state = replace(state, updates=state.updates & only_updates)
        if state.status != ABSENT and not (state.contents and state.updates):
            return []
        return [state]

    return effect


def turns(changes: dict[str, tuple[str, ...]]) -> Effect:
    """It found a state on the left and left one on the right, of the same bytes."""

    def effect(state: State) -> list[State]:
        return [State() if after == ABSENT else replace(state, status=after) for after in changes.get(state.status, ())]

    return effect


def publishes(what: "Candidates", *, over_wreck: bool, unknown: bool) -> Effect:
    """`over_wreck`: on a layout whose images are moved file by file, where a killed one leaves half of it."""

    def effect(state: State) -> list[State]:
        if state.status != ABSENT and not (over_wreck and state.status == WRECK):
            return []
        found = [State(VALID, what.contents, what.updates)]
        if unknown and over_wreck:
            found.append(State(WRECK, what.contents, what.updates))
            if state.status == WRECK:
                found.append(State())
        return found

    return effect


def updates_to(update: int) -> Effect:
    def effect(state: State) -> list[State]:
        return [replace(state, updates=frozenset([update]))] if state.status == VALID else []

    return effect


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a publish may have published."""

    contents: frozenset[int]
    updates: frozenset[int | None]
    may_lack_files: bool
    may_be_mixed: bool


def steps_of(
    operation: Operation,
    layout: str,
    candidates: Callable[[Operation], Candidates],
    *,
    died: bool,
    doubted: bool = False,
) -> list[Step]:
    """The steps of an operation on its target.

    `died`: a process that it went through died meanwhile. The client repeats a call that got no answer, so what is
    answered may be the second try's: there may have been another effect, of the first. `doubted`: that it succeeded
    does not say that it did anything.
    """
    steps = []
    unknown = operation.outcome not in (OK, ERROR) or doubted
    if not unknown and (effect := _answered(operation, layout, candidates)) is not None:
        may_repair = operation.reason == "IMAGE_ALREADY_EXISTS" and layout == "vsan"
        only_looks = (operation.outcome == ERROR and not may_repair) or operation.kind in LOOKING
        steps.append(Step(operation.id, operation.begin, operation.end, effect, only_looks))
    if (unknown or died) and (effect := _unanswered(operation, layout, candidates)) is not None:
        key = operation.kind if operation.kind not in (*PUBLISHING, *UPDATING) else f"{operation.id}"
        steps.append(Step(operation.id, operation.begin, math.inf, effect, key=key, optional=True))
    return steps


def _answered(operation: Operation, layout: str, candidates: Callable[[Operation], Candidates]) -> Effect | None:
    if operation.outcome == ERROR:
        statuses = _SEEN.get(operation.reason)
        is_of_source = operation.kind == "copy" and operation.reason != "IMAGE_ALREADY_EXISTS"
        if statuses is None or operation.is_mounts or is_of_source:
            return None
        if operation.reason == "IMAGE_ALREADY_EXISTS" and layout == "vsan":
            # A publish that finds a whole image without a timestamp file repairs it, and says that it is there.
            return lambda state: [replace(state, status=VALID)] if state.status == WRECK else sees(*statuses)(state)
        return sees(*statuses)
    match operation.kind:
        case "copy" | "import" | "mount-copy" | "mount-import":
            return publishes(candidates(operation), over_wreck=layout == "vsan", unknown=False)
        case "delete":
            return turns({VALID: (DELETED,), WRECK: (DELETED_WRECK,)})
        case "restore":
            return turns({DELETED: (VALID,)})
        case "purge":
            return turns({DELETED: (ABSENT,), DELETED_WRECK: (ABSENT,)})
        case "force":
            return turns(dict.fromkeys((VALID, WRECK, DELETED, DELETED_WRECK), (ABSENT,)))
        case "repair":
            return turns({VALID: (VALID,), WRECK: (VALID,)})
        case "update":
            return updates_to(operation.id)
        case "touch" | "validate":
            return sees(VALID)
        case "sweep" if operation.said["deleted"]:
            return turns({VALID: (ABSENT,), WRECK: (ABSENT,)})
        case "read":
            # A tombstone keeps nobody from reading, so that what is to be restored can be looked at.
            return sees(VALID, DELETED, contents=[operation.said["content"]])
        # The mount looks at what it knows, which may be old: done is what was asked for, by whomever.
        case "mount-delete":
            return turns({VALID: (DELETED,), WRECK: (DELETED_WRECK,), DELETED: (DELETED,), ABSENT: (ABSENT,)})
        case "mount-restore":
            return turns({DELETED: (VALID,), VALID: (VALID,)})
        case "mount-purge":
            return turns({DELETED: (ABSENT,), DELETED_WRECK: (ABSENT,), ABSENT: (ABSENT,)})
    return None


def _unanswered(operation: Operation, layout: str, candidates: Callable[[Operation], Candidates]) -> Effect | None:
    by_files = layout == "vsan"
    match operation.kind:
        case "copy" | "import" | "mount-copy" | "mount-import":
            return publishes(candidates(operation), over_wreck=by_files, unknown=True)
        case "delete" | "mount-delete":
            return turns({VALID: (DELETED,), WRECK: (DELETED_WRECK,)})
        case "restore" | "mount-restore":
            return turns({DELETED: (VALID,)})
        case "purge" | "mount-purge":
            half = (ABSENT, DELETED_WRECK) if by_files else (ABSENT,)
            return turns({DELETED: half, DELETED_WRECK: half})
        case "force":
            whole = (ABSENT, WRECK) if by_files else (ABSENT,)
            half = (ABSENT, DELETED_WRECK) if by_files else (ABSENT,)
            return turns({VALID: whole, WRECK: whole, DELETED: half, DELETED_WRECK: half})
        case "sweep":
            # Killed while it decides, it leaves the timestamp file under another name.
            return turns({VALID: (ABSENT, WRECK), WRECK: (ABSENT,)})
        case "repair":
            return turns({WRECK: (VALID,)})
        case "update":
            return updates_to(operation.id)
    return None


def mending(steps: list[Step]) -> list[Step]:
    """What scans and reaps make of what a killed operation left, whenever they find it."""
    effect = turns({WRECK: (VALID, ABSENT)})
    return [
        Step(step.operation, step.begin, math.inf, effect, key="mend", optional=True) for step in steps if step.optional
    ]
