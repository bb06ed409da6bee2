"""The on-disk protocol of both datasets: parts with sidecars, many writers, safe against kill -9. Torch-free.

<root>/wan_accel_run.json            schema and settings of the run that owns the folder
<root>/parts/<writer>/data-00000.arrow       an Arrow stream, written as .arrow.tmp and renamed when on disk
<root>/parts/<writer>/data-00000.arrow.json  its sidecar: rows, bytes, xxh64
<root>/parts/<writer>/data-00000.r1.arrow    the part written again (`revisions`): it takes the part's place when whole
<root>/state.json, dataset_info.json  made from the sidecars, so that `datasets.load_from_disk(root)` works
"""

from wan_accel.data.files import write_json, write_lines
from wan_accel.data.opened import listed, load, open_parts, refresh_state
from wan_accel.data.part_content import batches, each_id, ids, part_problem, plain_row, verify
from wan_accel.data.part_files import (
    Sidecar,
    finished,
    next_revision,
    parts,
    read_sidecar,
    remove_unfinished,
    superseded,
    unfinished,
    whole_parts,
)
from wan_accel.data.part_writer import BATCH_BYTES, PART_BYTES, PartWriter
from wan_accel.data.run_file import RUN_FILE, claim_output, settings_hash
from wan_accel.data.store_error import StoreError

__all__ = [
    "BATCH_BYTES", "PART_BYTES", "RUN_FILE", "PartWriter", "Sidecar", "StoreError", "batches", "claim_output",
    "each_id", "finished", "ids", "listed", "load", "next_revision", "open_parts", "part_problem", "parts", "plain_row",
    "read_sidecar", "refresh_state", "remove_unfinished", "settings_hash", "superseded", "unfinished", "verify",
    "whole_parts", "write_json", "write_lines",
]  # fmt: skip
