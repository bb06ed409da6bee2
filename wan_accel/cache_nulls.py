"""The null part of a latents folder: what dropout, guidance and plain animation need."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from wan_accel.cache_source import Shape
from wan_accel.data import store
from wan_accel.data.captions import caption_id
from wan_accel.data.cells import cell_to_tensor, tensor_to_cell
from wan_accel.data.nulls import bucket_key
from wan_accel.data.revisions import PartRewriter, take_over
from wan_accel.data.rows import Rows
from wan_accel.data.schema import LATENTS_SCHEMA, NULL_KINDS, null_features
from wan_accel.models.conditioning.clips import ClipEncoder
from wan_accel.models.conditioning.text import NULL_PROMPTS


def encode_nulls(root: Path, encoder: ClipEncoder, *, keys: Mapping[str, str], shapes: set[Shape]) -> None:
    """Write the null rows that the folder lacks, remove those of other weights. One process calls it alone.

    Args:
        root: the latents folder, its text part complete.
        encoder: of the variant.
        keys: of every kind of condition.
        shapes: of all clips: each needs the latents of a video of which nothing is known.
    """
    folder, features = root / "null", null_features()
    _drop_stale(folder, keys)
    done = {
        (row["kind"], row["shape"])
        for part in store.whole_parts(folder)
        for batch in store.batches(part)
        for row in batch.select(["kind", "shape"]).to_pylist()
    }
    with store.PartWriter(folder, writer="rank0", features=features) as writer:
        for (kind, shape), tensor in _missing(root, encoder, done, shapes, keys["text"]):
            writer.write(
                {
                    "schema": LATENTS_SCHEMA, "kind": kind, "shape": shape, "key": keys[NULL_KINDS[kind]],
                    "tensor": tensor_to_cell(tensor),
                }
            )  # fmt: skip


def _missing(
    root: Path, encoder: ClipEncoder, done: set[tuple[str, str]], shapes: set[Shape], text_key: str
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    if prompts := {kind: prompt for kind, prompt in NULL_PROMPTS.items() if (kind, "") not in done}:
        texts = Rows(root / "text", LATENTS_SCHEMA, light=["caption_id", "key"])
        light = zip(texts.table["caption_id"].to_pylist(), texts.table["key"].to_pylist())
        rows = {name: row for row, (name, key) in enumerate(light) if key == text_key}
        for kind, prompt in prompts.items():
            yield (kind, ""), cell_to_tensor(texts[rows[caption_id(prompt)]]["embeddings"])
    if not encoder.variant.has_animate_adapter:
        return
    if ("face", "") not in done:
        yield ("face", ""), encoder.no_face()
    for shape in sorted(shapes):
        if ("animation_known", bucket_key(*shape)) not in done:
            yield ("animation_known", bucket_key(*shape)), encoder.nothing_known(*shape)


def _drop_stale(folder: Path, keys: Mapping[str, str]) -> None:
    features = null_features()
    for part in store.finished(folder):
        rows = [store.plain_row(batch, index) for batch in store.batches(part) for index in range(batch.num_rows)]
        kept = [row for row in rows if row["key"] == keys[NULL_KINDS[row["kind"]]]]
        if len(kept) < len(rows):
            with PartRewriter(folder, part, features=features) as writer:
                for row in kept:
                    writer.write(row)
    take_over(folder, features)
