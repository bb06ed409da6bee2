"""Clips leave as a training dataset of DiffSynth: videos and the metadata file that its UnifiedDataset reads."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from preprocessing.export_folders import EXPORT_SCHEMA, ChosenClips, Exported, some
from preprocessing.mask_growth import WAN_GROWTH, MaskGrowth
from preprocessing.selection import ALL_CLIPS, Selection
from preprocessing.wan_files import BACKGROUND, FACE, MASK, POSE, REFERENCE, needed_columns, wan_files
from wan_accel.data import store

Metadata = Literal["csv", "json"]
VIDEO = "video.mp4"
# Columns as the pipeline's arguments are called. Its training takes the reference from the video's first frame;
# ours is there for those who do otherwise.
COLUMNS = {
    POSE: "animate_pose_video", FACE: "animate_face_video", BACKGROUND: "animate_inpaint_video",
    MASK: "animate_mask_video", REFERENCE: "reference_image",
}  # fmt: skip


def export_diffsynth(
    dataset: Path,
    output: Path,
    *,
    growth: MaskGrowth = WAN_GROWTH,
    selection: Selection = ALL_CLIPS,
    metadata: Metadata = "csv",
) -> Exported:
    """Write `output/<clip_id>/` with the clip's video and what is drawn from it, and `output/metadata.csv`.

    Paths in the metadata are relative to `output`, DiffSynth's `--dataset_base_path`. Clips that are there already
    are kept; the metadata lists the chosen ones.

    Raises:
        StoreError: as `export_wan`.
        ValueError: as `export_wan`; also for clips of purpose drive, and for captions that csv would lose.
    """
    chosen = ChosenClips(dataset, selection)
    drawn = _drawn(chosen) if chosen.is_animate else {}
    captions = [caption or "" for caption in chosen.column("caption")]
    if metadata == "csv":
        _refuse_lost(chosen.names, captions)
    settings = {"layout": "diffsynth", "dataset": chosen.identity, **asdict(growth)}
    store.claim_output(output, schema=EXPORT_SCHEMA, settings=settings)

    def files(row: Mapping[str, Any]) -> dict[str, bytes]:
        return {VIDEO: row["video"]["bytes"], **(wan_files(row, growth) if chosen.is_animate else {})}

    exported = chosen.write_folders(output, files)
    entries = [
        {"video": f"{name}/{VIDEO}", "prompt": caption, **{column: f"{name}/{file}" for file, column in drawn.items()}}
        for name, caption in zip(chosen.names, captions)
    ]
    text = _csv(entries) if metadata == "csv" else json.dumps(entries, indent=1, ensure_ascii=False)
    store.write_lines(output / f"metadata.{metadata}", [text.removesuffix("\n")])
    return exported


def _drawn(chosen: ChosenClips) -> dict[str, str]:
    """File -> column of what is drawn of the clips; raises ValueError for clips that cannot be trained on together."""
    chosen.check_columns()
    _refuse_driving(chosen)
    kinds = {frozenset(needed_columns(modes)) for modes in chosen.column("modes")}
    if len(kinds) > 1:
        raise ValueError(
            "some of the clips serve replacement and some do not, and every row of the metadata has the same columns: "
            "choose clips of one kind with --where or --clip"
        )
    return {file: column for file, column in COLUMNS.items() if file in next(iter(kinds))}


def _refuse_driving(chosen: ChosenClips) -> None:
    purposes = zip(chosen.names, chosen.column("purpose"))
    if driving := [name for name, purpose in purposes if purpose != "train"]:
        raise ValueError(
            f"{some(driving)}: made with --purpose drive, the reference is not the person in the video, so there is "
            "nothing to train on; leave them out with --where 'purpose == train'"
        )


def _refuse_lost(names: Sequence[str], captions: Sequence[str]) -> None:
    """DiffSynth reads csv with pandas, which takes an empty cell, `NA` or `null` for a missing value, not a text."""
    import pandas

    read = pandas.read_csv(io.StringIO(_csv([{"prompt": caption} for caption in captions])))["prompt"]
    lost = [name for name, caption, back in zip(names, captions, read) if back != caption]
    if lost:
        raise ValueError(
            f"{some(lost)}: the caption would not come back from csv as DiffSynth reads it (pandas takes an empty one "
            "for a missing value): use --metadata json, or caption the clips"
        )


def _csv(entries: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(entries[0]), lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue()
