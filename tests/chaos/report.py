"""What a run says at its end."""

import re
from collections import Counter

from tests.chaos.checker import Verdict
from tests.chaos.history import OK, History

_DISTURBANCES = {"kill": "kills", "term": "terminations", "stop": "stops"}


def _short(reason: str) -> str:
    """A tool's complaint without the names in it."""
    return re.sub(r"'[^']*'", "…", reason) or "no answer"


def render(seconds: float, seed: int, layouts: dict[str, str], history: History, verdict: Verdict) -> str:
    """The whole report, as text."""
    lines = [
        f"seed {seed}, {seconds:g} s, datastores "
        + ", ".join(f"{name} ({layout})" for name, layout in layouts.items()),
        "",
        f"{'operation':15}{'ok':>7}{'refused':>9}{'unknown':>9}   most frequent answers",
    ]
    kinds = sorted({operation.kind for operation in history.operations})
    for kind in kinds:
        of_kind = [operation for operation in history.operations if operation.kind == kind]
        outcomes = Counter(operation.outcome for operation in of_kind)
        reasons = Counter(_short(operation.reason) for operation in of_kind if operation.outcome != OK)
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(4))
        lines.append(f"{kind:15}{outcomes['ok']:7}{outcomes['error']:9}{outcomes['unknown']:9}   {told}".rstrip())
    events = Counter(event.what for event in history.events)
    starts = events["started"] - len({event.process for event in history.events if event.what == "started"})
    disturbed = ", ".join(f"{events[what]} {name}" for what, name in _DISTURBANCES.items())
    lines += [
        "",
        f"{len(history.operations)} operations, {verdict.published} images published, {disturbed}, {starts} restarts",
    ]
    if verdict.undecided:
        lines.append(f"not decided, for the search was too long: {', '.join(verdict.undecided)}")
    lines += [f"{len(verdict.violations)} violations", *(f"\n{violation}" for violation in verdict.violations)]
    return "\n".join(lines)
