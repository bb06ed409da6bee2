"""The card of a clips dataset: what is in it, how it was made, and what its reader has to fill in."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from preprocessing.export_folders import ChosenClips
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, QUALITY
from wan_accel.listing import first_few

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_QUANTILES = (0.05, 0.5, 0.95)
_MOST_LISTED = 8


def write_card(chosen: ChosenClips, path: Path, *, num_bytes: int) -> None:
    """Write README.md: YAML front matter that `datasets.load_dataset` reads, then figures, settings and origin."""
    from datasets import DatasetInfo, SplitDict
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        license="unknown",
        pretty_name="Wan-Animate training clips" if chosen.is_animate else "Video training clips",
        task_categories=["image-to-video" if chosen.is_animate else "text-to-video"],
        size_categories=next((name for most, name in _SIZES if len(chosen.rows) < most), "1M<n<10M"),
        tags=["wan-accel", "wan2.2"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    splits = SplitDict()
    splits["train"] = _split(num_bytes, len(chosen.rows))
    info = DatasetInfo(features=chosen.clips.features, splits=splits, dataset_size=num_bytes)
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    store.write_lines(path, ["---", data.to_yaml().strip(), "---", "", *_body(chosen, num_bytes)])


def _split(num_bytes: int, num_clips: int) -> Any:
    from datasets import SplitInfo

    return SplitInfo(name="train", num_bytes=num_bytes, num_examples=num_clips)


def _body(chosen: ChosenClips, num_bytes: int) -> list[str]:
    title = "Clips for Wan-Animate" if chosen.is_animate else "Video clips"
    return [
        f"# {title}", "",
        f"{len(chosen.rows)} clips in the schema `{CLIPS_SCHEMA}` of wan-accel: a row is a clip, complete in itself "
        "(video, caption" + (", reference, pose, face, mask, key points" if chosen.is_animate else "") + ").", "",
        "    wan-preprocess import --from hub THIS_REPOSITORY --output clips    # or --from parquet FOLDER", "",
        "## Licence", "",
        "To fill in, here and in `license:` above: under what terms the videos may be used, and who is shown in them.",
        "", "## Figures", "", *_figures(chosen, num_bytes), "", *_quality(chosen), "## How it was made", "",
        *_origin(chosen),
    ]  # fmt: skip


def _figures(chosen: ChosenClips, num_bytes: int) -> list[str]:
    frames, fps = np.array(chosen.column("num_frames")), np.array(chosen.column("fps"))
    captions = [caption for caption in chosen.column("caption") if caption]
    sources = {source["sha256"] for source in chosen.column("source")}
    figures = {
        "clips": str(len(chosen.rows)),
        "source videos": str(len(sources)),
        "hours": f"{float((frames / fps).sum()) / 3600:.3g}",
        "size": f"{num_bytes / 1e9:.3g} GB",
        "frames a clip": _counted(chosen.column("num_frames")),
        "frames a second": _counted(f"{rate:g}" for rate in chosen.column("fps")),
        "width x height": _counted(
            f"{width}x{height}" for width, height in zip(chosen.column("width"), chosen.column("height"))
        ),
        "captions": f"{len(captions)} clips, {len(set(captions))} different",
    }
    if chosen.is_animate:
        figures["purpose"] = _counted(chosen.column("purpose"))
        figures["modes"] = _counted(mode for modes in chosen.column("modes") for mode in modes or [])
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]


def _counted(values: Any) -> str:
    """Each value with how often it is there, the most frequent first."""
    counts = Counter(map(str, values))
    return first_few([f"{value} ({count})" for value, count in counts.most_common()], _MOST_LISTED)


def _quality(chosen: ChosenClips) -> list[str]:
    """A table of the figures' quantiles; nothing where no clip was measured."""
    measured, lines = chosen.values("quality"), []
    for name in QUALITY:
        values = pc.struct_field(measured, name).drop_null().to_numpy()
        if len(values := values[~np.isnan(values)]):
            quantiles = " | ".join(f"{value:.3g}" for value in np.quantile(values, _QUANTILES))
            lines.append(f"| {name} | {len(values)} | {quantiles} |")
    head = ["| quality | clips | 5% | median | 95% |", "|---|---|---|---|---|"]
    return [*head, *lines, ""] if lines else []


def _origin(chosen: ChosenClips) -> list[str]:
    """What the rows' provenance says, once for each of the runs that made them."""
    hashes = chosen.column("settings_hash")
    lines: list[str] = []
    for settings_hash, count in Counter(hashes).most_common():
        row = chosen.rows[hashes.index(settings_hash)]
        text = chosen.clips.data.column("provenance")[row].as_py()
        provenance = json.loads(text) if text else {}
        if not provenance:
            lines += [f"{count} clips without provenance.", ""]
            continue
        tools = ", ".join(f"{name} {version}" for name, version in sorted(provenance.get("tools", {}).items()))
        settings = provenance.get("settings", {})
        lines += [f"{count} clips with settings `{settings_hash}`" + (f", by {tools}:" if tools else ":"), ""]
        lines += ["| setting | value |", "|---|---|", *_rows(settings), ""]
    return lines


def _rows(settings: dict[str, Any]) -> Sequence[str]:
    shown = {name: json.dumps(value, ensure_ascii=False).replace("|", r"\|") for name, value in settings.items()}
    return [f"| {name} | `{value}` |" for name, value in sorted(shown.items())]
