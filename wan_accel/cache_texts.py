"""The text part of a latents folder: each distinct caption encoded once, by all ranks together."""

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from tqdm import tqdm

from wan_accel.data import store
from wan_accel.data.cells import tensor_to_cell
from wan_accel.data.revisions import PartRewriter, take_over
from wan_accel.data.schema import LATENTS_SCHEMA, text_features
from wan_accel.models.conditioning.clips import STORED
from wan_accel.models.conditioning.text import EncodedCaption, encode_captions
from wan_accel.models.encoders import TextEncoder, load_text_encoder
from wan_accel.parallel.sharded_text import load_sharded_text_encoder

_BATCH = 8


def encode_texts(
    captions: list[str], root: Path, *, checkpoint: Path, key: str, state: PartialState, shard: bool
) -> None:
    """Encode captions into the text part. Every rank calls it with the same list.

    With `shard` the encoder is split over all ranks, which then run the same number of forwards: a rank that has no
    caption left encodes an empty one.
    """
    if not captions:
        return
    mine = captions[state.process_index :: state.num_processes]
    if not mine and not shard:
        return
    load = load_sharded_text_encoder if shard else load_text_encoder
    encoder = load(checkpoint, torch_dtype=STORED, device=state.device)
    rounds = -(-len(captions) // (state.num_processes * _BATCH)) if shard else -(-len(mine) // _BATCH)
    encoded = tqdm(
        _encoded(encoder, mine, rounds), total=len(mine), desc="captions", disable=not state.is_main_process
    )
    with store.PartWriter(root, writer=f"rank{state.process_index}", features=text_features()) as writer:
        writer.write_each(
            {
                "schema": LATENTS_SCHEMA, "caption_id": item.caption_id, "caption": item.caption, "key": key,
                "embeddings": tensor_to_cell(item.embeddings.to(STORED)),
            }
            for item in encoded
        )  # fmt: skip


def _encoded(encoder: TextEncoder, captions: list[str], rounds: int) -> Iterator[EncodedCaption]:
    for number in range(rounds):
        batch = captions[number * _BATCH : (number + 1) * _BATCH]
        found = list(encode_captions(encoder, batch or [""], batch_size=_BATCH))
        yield from found if batch else ()


def drop_stale_texts(root: Path, key: str) -> None:
    """Remove texts that another encoder made, once those of this one are there. One process calls it alone."""
    features = text_features()
    for part in store.finished(root):
        if all(found == key for batch in store.batches(part) for found in batch["key"].to_pylist()):
            continue
        with PartRewriter(root, part, features=features) as writer:
            for batch in store.batches(part):
                for index, found in enumerate(batch["key"].to_pylist()):
                    if found == key:
                        writer.write(store.plain_row(batch, index))
    take_over(root, features)


def refuse_lone_sharding(state: PartialState) -> None:
    """Refuse `cache.shard_text_encoder` on one process, where it can do nothing.

    Raises:
        ValueError: how to launch it.
    """
    if not dist.is_initialized():
        raise ValueError(
            f"cache.shard_text_encoder=true on {state.num_processes} process: launch several (accelerate launch "
            "--num_processes 8 -m wan_accel.cache ...), or remove the key"
        )
