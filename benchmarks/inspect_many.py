"""What `wan-preprocess inspect` and the columns it reads cost on a dataset of many light clips.

    python benchmarks/inspect_many.py --clips 200000 --output /tmp/many

Makes a dataset of small real clips (a moving block, 5 frames of 64x64, with every quality figure drawn at random and
with rejections), unless it is there; then runs the command in a process of its own, and prints the page's bytes, the
wall time and the peak resident memory of the process and of its workers.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from preprocessing.encoding import encode_mp4
from preprocessing.inspect import PAGE
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, clips_features, pack_mask

T, SIDE = 5, 64
PART_ROWS = 20_000


def main() -> None:
    """Make the dataset, run the command, print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="more arguments of inspect, after --")
    arguments = parser.parse_args()
    dataset, report = arguments.output / "clips", arguments.output / "report"
    if not (dataset / "state.json").is_file():
        make(dataset, arguments.clips)
    command = [sys.executable, "-m", "preprocessing.cli", "inspect", str(dataset), "--output", str(report)]
    start = time.monotonic()
    subprocess.run([*command, *arguments.arguments], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    stored = sum(path.stat().st_size for path in dataset.rglob("*.arrow"))
    files = [path.stat().st_size for path in report.rglob("*") if path.is_file()]
    figures = {
        "clips": arguments.clips, "dataset_mib": round(stored / 2**20), "seconds": round(seconds, 1),
        "largest_process_peak_mib": round(peak), "page_bytes": (report / PAGE).stat().st_size,
        "report_mib": round(sum(files) / 2**20, 1), "files": len(files),
    }  # fmt: skip
    print(json.dumps(figures))


def make(dataset: Path, num_clips: int) -> None:
    """Write the dataset."""
    rng, base = np.random.default_rng(0), _row()
    store.claim_output(dataset, schema=CLIPS_SCHEMA, settings={})
    with store.PartWriter(dataset, writer="many", features=clips_features()) as writer:
        for number in tqdm(range(num_clips), "making clips"):
            writer.write({**base, **_varied(number, rng)})
            if number % PART_ROWS == PART_ROWS - 1:
                rejected = [_rejected(number + i, rng) for i in range(PART_ROWS // 10)]
                outcome = {
                    "key": f"video-{number}",
                    "num_clips": PART_ROWS,
                    "rejected": rejected,
                    "seconds": 1,
                    "time": 0,
                }
                writer.flush(journal={"videos": [outcome]})


def _row() -> dict[str, Any]:
    """A clip without face video: that alone would be most of the dataset."""
    frames = np.full((T, SIDE, SIDE, 3), 128, np.uint8)
    mask = np.zeros((T, SIDE, SIDE), bool)
    for i in range(T):
        mask[i, 20:50, 4 * i : 4 * i + 20] = True
    frames[mask] = 220, 30, 30
    buffer = io.BytesIO()
    Image.fromarray(frames[0]).save(buffer, "PNG")
    pose = np.full((T, 62, 3), np.nan, np.float32)
    return {
        "schema": CLIPS_SCHEMA, "num_frames": T, "height": SIDE, "width": SIDE, "fps": 30.0, "purpose": "train",
        "timestamps": [i / 30 for i in range(T)], "video": {"bytes": encode_mp4(frames, 30.0)[0], "path": None},
        "reference": {"bytes": buffer.getvalue(), "path": None}, "reference_source": {"kind": "frame", "seconds": 0.0},
        "modes": ["animation", "replacement"], "boxes": np.tile(np.float32([0, 20, 20, 50, 1]), (T, 1)),
        "pose_keypoints": pose, "canvas_height": SIDE, "canvas_width": SIDE, "mask": pack_mask(mask),
        "settings_hash": "", "provenance": "{}",
    }  # fmt: skip


def _varied(number: int, rng: np.random.Generator) -> dict[str, Any]:
    name = f"video-{number // 8:06}"
    source = {
        "path": f"/data/videos/{name}.mp4", "sha256": f"{number // 8:064x}", "start_seconds": number % 8 * 2.0,
        "end_seconds": number % 8 * 2.0 + 0.2, "track": number % 2,
    }  # fmt: skip
    words = " ".join(["a person walks slowly", "through a park", "at dusk"][: 1 + number % 3])
    return {"clip_id": f"{name}-{number}", "source": source, "caption": words, "quality": _quality(rng)}


def _quality(rng: np.random.Generator) -> dict[str, float]:
    return {
        "mean_keypoint_score": rng.beta(8, 3), "visible_share": rng.beta(9, 2), "hand_score": rng.beta(3, 4),
        "face_size": rng.gamma(4, 20), "mask_area_mean": rng.beta(2, 8), "mask_area_jitter": rng.gamma(2, 0.02),
        "motion": rng.gamma(2, 0.02), "luma_change": rng.gamma(2, 1.5), "blur": rng.lognormal(5.5, 0.8),
        "track_switches": float(rng.poisson(0.05)),
    }  # fmt: skip


def _rejected(number: int, rng: np.random.Generator) -> dict[str, Any]:
    quality = {**_quality(rng), "hand_score": rng.beta(1, 9)}
    detail = f"hand_score is {quality['hand_score']:.4g}, at least 0.2 is asked for"
    return {
        "path": f"/data/{number}.mp4", "clip_id": f"video-{number}-lost", "reason": "quality.hand_score",
        "detail": detail, "quality": quality,
    }  # fmt: skip


if __name__ == "__main__":
    main()
