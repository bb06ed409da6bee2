"""Parts that are written again, in place: for conditions of which only a kind is stale. Torch-free.

A part's new revision (data-00000.r1.arrow) counts from the moment its sidecar is there, which is one rename; the old
one stops counting at the same moment. state.json names the old one until `take_over`, which lists the new ones and
only then removes the old, so that `load_from_disk` finds whole files whenever it looks. Rows keep their order.

Any process may write revisions; one alone calls `take_over`, while no other writer of the dataset is at work: a slower
writer would list a part that is removed already.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from wan_accel.data import store

if TYPE_CHECKING:
    from datasets import Features


class PartRewriter(store.PartWriter):
    """Writes the next revision of a part; with no rows at all the part becomes empty.

    Until `close` nothing has changed, and a rewriter that is killed leaves nothing that counts.

    Args:
        root: the dataset folder.
        part: a part in its newest revision.
        features: columns, those of the dataset's other parts.
        batch_bytes: see `PartWriter`.
    """

    def __init__(
        self, root: Path, part: Path, *, features: "Features", batch_bytes: int = store.BATCH_BYTES
    ) -> None:
        self._revision = store.next_revision(part)
        super().__init__(
            root, writer=part.parent.name, features=features, part_bytes=1 << 62, batch_bytes=batch_bytes
        )

    @property
    def _part(self) -> Path:
        return self._revision

    def _tidy(self) -> None:
        """Nothing: the folder may be another writer's."""

    def _publish(self) -> None:
        """Nothing: `take_over` does, once for all parts."""

    def close(self) -> None:
        """Finish the revision: from here on it counts instead of the part."""
        self._open()
        self.flush()


def remove_unfinished(root: Path) -> None:
    """Remove what writers that were killed left half-written, whatever their names. No writer may be at work.

    Parts and revisions that have no sidecar never counted: their writer was killed between two renames.
    """
    leftovers = [path for folder in root.glob("parts/*") for path in store.unfinished(folder)]
    for path in [*root.glob("*.tmp"), *leftovers]:
        path.unlink()


def take_over(root: Path, features: "Features") -> None:
    """List the newest revisions in state.json, then remove those that they replace. Safe to repeat after a kill."""
    old = store.superseded(root)
    if not old:
        return
    store.refresh_state(root, features)
    for part in old:
        part.unlink(missing_ok=True)
        part.with_name(part.name + ".json").unlink()
