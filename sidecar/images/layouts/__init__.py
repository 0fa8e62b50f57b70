"""The kinds of layout, by id."""

from sidecar.images.layouts.interface import Layout
from sidecar.images.layouts.renaming import CompoundLayout, ShardedLayout
from sidecar.images.layouts.vsan import VsanLayout

LAYOUTS: dict[str, Layout] = {layout.id: layout for layout in (CompoundLayout(), ShardedLayout(), VsanLayout())}
