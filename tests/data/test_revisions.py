"""Parts written again: what readers see before, at and after the moment, and what a kill leaves."""

from pathlib import Path

import pytest
from datasets import Features, Value, load_from_disk

from wan_accel.data import revisions, store
from wan_accel.data.schema import LATENTS_SCHEMA

FEATURES = Features({"schema": Value("string"), "clip_id": Value("string"), "value": Value("int32")})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two writers with two parts of two rows each."""
    store.claim_output(tmp_path / "set", schema=LATENTS_SCHEMA, settings={})
    for name in ("rank0", "rank1"):
        with store.PartWriter(tmp_path / "set", writer=name, features=FEATURES) as writer:
            for part in range(2):
                for row in range(2):
                    writer.write(make_row(f"{name}-{part}-{row}", 0))
                writer.flush()
    return tmp_path / "set"


def make_row(clip_id: str, value: int) -> dict:
    return {"schema": LATENTS_SCHEMA, "clip_id": clip_id, "value": value}


def plain(root: Path) -> list[tuple[str, int]]:
    return [(row["clip_id"], row["value"]) for row in load_from_disk(str(root))]


def rewrite(root: Path, part: Path, value: int) -> None:
    with revisions.PartRewriter(root, part, features=FEATURES) as writer:
        for batch in store.batches(part):
            for index in range(batch.num_rows):
                writer.write(store.plain_row(batch, index) | {"value": value})


def test_revision_takes_the_place_of_its_part(root: Path) -> None:
    before, first = plain(root), store.finished(root)[1]
    rewrite(root, first, 1)
    assert plain(root) == before  # state.json names the old part, which is still there
    assert [part.name for part in store.finished(root)][1] == "data-00001.r1.arrow"
    revisions.take_over(root, FEATURES)
    expected = [(name, int(name.startswith("rank0-1"))) for name, _ in before]
    assert plain(root) == expected  # in the same order
    assert not first.exists() and store.superseded(root) == [] and store.verify(root) == []
    rewrite(root, store.finished(root)[1], 2)
    revisions.take_over(root, FEATURES)
    assert plain(root) == [(name, 2 * value) for name, value in expected]
    assert store.finished(root)[1].name == "data-00001.r2.arrow"


def test_killed_rewriter_changes_nothing(root: Path) -> None:
    before, part = plain(root), store.finished(root)[0]
    writer = revisions.PartRewriter(root, part, features=FEATURES)
    writer.write(make_row("x", 9))
    writer._write_batch()  # then killed
    assert plain(root) == before and store.finished(root)[0] == part
    store.next_revision(part).write_bytes(b"renamed, but killed before its sidecar")
    assert plain(root) == before and store.finished(root)[0] == part
    rewrite(root, part, 1)
    revisions.take_over(root, FEATURES)
    assert plain(root)[:2] == [("rank0-0-0", 1), ("rank0-0-1", 1)]


def test_what_killed_writers_left_is_removed(root: Path) -> None:
    before, part = plain(root), store.finished(root)[0]
    kept = {path for path in root.rglob("*") if path.is_file()}
    for path in (
        store.next_revision(part),  # renamed, but killed before its sidecar
        part.with_name("data-00007.arrow"),
        part.with_name("data-00001.r3.arrow.tmp"),
        part.with_name("data-00001.arrow.json.0a1b2c3d.tmp"),
        root / "state.json.0a1b2c3d.tmp",
    ):
        path.write_bytes(b"half")
    revisions.remove_unfinished(root)
    assert {path for path in root.rglob("*") if path.is_file()} == kept and plain(root) == before


def test_killed_take_over_is_repeated(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = store.finished(root)
    for part in old:
        rewrite(root, part, 1)

    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".arrow":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        revisions.take_over(root, FEATURES)
    assert [value for _, value in plain(root)] == [1] * 8
    old[0].unlink()  # killed one file later
    revisions.take_over(root, FEATURES)
    assert store.superseded(root) == [] and [value for _, value in plain(root)] == [1] * 8


def test_part_can_become_empty(root: Path) -> None:
    with revisions.PartRewriter(root, store.finished(root)[3], features=FEATURES):
        pass
    revisions.take_over(root, FEATURES)
    assert [name for name, _ in plain(root)] == [
        f"{writer}-{part}-{row}"
        for writer, part, row in (("rank0", 0, 0), ("rank0", 0, 1), ("rank0", 1, 0), ("rank0", 1, 1), ("rank1", 0, 0),
                                  ("rank1", 0, 1))
    ]  # fmt: skip
    assert len(store.load(root, LATENTS_SCHEMA)) == 6


def test_writer_goes_on_beside_revisions(root: Path) -> None:
    rewrite(root, store.finished(root)[0], 1)
    with store.PartWriter(root, writer="rank0", features=FEATURES) as writer:
        writer.write(make_row("new", 5))
    assert (root / "parts/rank0/data-00002.arrow").is_file()
    assert [value for _, value in plain(root)] == [1, 1, 0, 0, 5, 0, 0, 0, 0]


def test_readers_between_revisions_are_told(root: Path) -> None:
    rewrite(root, store.finished(root)[0], 1)
    with pytest.raises(store.StoreError, match="is being written again: wait for the command that does it, or run it"):
        store.load(root, LATENTS_SCHEMA)
