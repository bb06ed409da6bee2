"""Clips leave as the folders that Wan2.2's `generate.py --task animate-14B --src_root_path` reads."""

from dataclasses import asdict
from pathlib import Path

from preprocessing.export_folders import EXPORT_SCHEMA, ChosenClips, Exported
from preprocessing.mask_growth import WAN_GROWTH, MaskGrowth
from preprocessing.selection import ALL_CLIPS, Selection
from preprocessing.wan_files import wan_files
from wan_accel.data import store


def export_wan(
    dataset: Path, output: Path, *, growth: MaskGrowth = WAN_GROWTH, selection: Selection = ALL_CLIPS
) -> Exported:
    """Write `output/<clip_id>/src_*`, the files that the clip's modes need.

    Clips that are there already are kept, so that an interrupted export goes on.

    Raises:
        StoreError: the folder holds something else, another dataset's clips, or clips with another growth.
        ValueError: the dataset or some of its clips cannot be used; nothing is written then.
    """
    chosen = ChosenClips(dataset, selection)
    chosen.check_columns()
    settings = {"layout": "wan", "dataset": chosen.identity, **asdict(growth)}
    store.claim_output(output, schema=EXPORT_SCHEMA, settings=settings)
    return chosen.write_folders(output, lambda row: wan_files(row, growth))
