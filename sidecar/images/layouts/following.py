"""The layout of a datastore without a configured one: it follows its type, which a server has to tell."""

from collections.abc import Callable
from typing import Any, cast

from sidecar.images.layouts.interface import Layout


class _FollowingLayout:
    def __init__(self, choose: Callable[[], Layout]) -> None:
        self._choose = choose
        self._chosen: Layout | None = None

    @property
    def id(self) -> str:
        """Empty until it is known."""
        return self._chosen.id if self._chosen else ""

    def __getattr__(self, name: str) -> Any:
        self._chosen = self._chosen or self._choose()
        return getattr(self._chosen, name)


def following_layout(choose: Callable[[], Layout]) -> Layout:
    """The layout that `choose` gives when it is first needed, and for good; until then what it raises is an answer."""
    return cast(Layout, _FollowingLayout(choose))
