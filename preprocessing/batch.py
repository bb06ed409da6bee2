"""A run over many videos: the output claimed, finished videos skipped, failures noted, clips written safely."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from preprocessing.pipeline import Pipeline, Rejected
from preprocessing.video import UserVideoError
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, clips_features

logger = logging.getLogger(__name__)
REJECTED_FILE = "rejected.jsonl"
FINISHED_FILE = "finished.jsonl"


def run(pipeline: Pipeline, videos: Sequence[Path], output: Path) -> dict[str, int]:
    """Process videos into a clips dataset; go on where an earlier run stopped.

    A video is skipped where an earlier run finished or rejected it. Its clips are safe before it counts as finished.

    Returns:
        `todo`, videos that were left to do; `clips` written now; `finished` and `rejected` videos in all.

    Raises:
        ValueError: the output belongs to another run, the disk is full, or no video gave a clip.
    """
    store.claim_output(output, schema=CLIPS_SCHEMA, settings=pipeline.described())
    finished, rejected = _journal(output / FINISHED_FILE), _journal(output / REJECTED_FILE)
    known = {entry["path"] for entry in (*finished, *rejected)}
    todo = [path for path in videos if str(path.resolve()) not in known]
    done = store.ids(output, "clip_id")
    counts = {"todo": len(todo), "clips": 0, "finished": len(finished), "rejected": len(rejected)}
    features = clips_features()
    with store.PartWriter(output, writer="writer0", features=features) as writer, logging_redirect_tqdm():
        for path in (bar := tqdm(todo, "videos", unit="video", disable=None)):
            try:
                for row in _rows(pipeline, path, done):
                    writer.write(row)
                    done.add(row["clip_id"])
                    counts["clips"] += 1
                    bar.set_postfix(clips=counts["clips"], rejected=counts["rejected"])
            except Rejected as error:
                logger.warning("%s: %s", error.reason, error)
                _note(output / REJECTED_FILE, path, reason=error.reason, detail=str(error))
                counts["rejected"] += 1
                continue
            writer.flush()
            store.refresh_state(output, features)
            _note(output / FINISHED_FILE, path)
            counts["finished"] += 1
    if not store.parts(output):
        reasons = "; ".join(entry["detail"] for entry in _journal(output / REJECTED_FILE)[:5])
        raise ValueError(f"no video gave a clip: {reasons}")
    return counts


def _rows(pipeline: Pipeline, path: Path, done: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a video; whatever is wrong with the video becomes Rejected."""
    try:
        yield from pipeline.process(path, skip=done)
    except Rejected:
        raise
    except (UserVideoError, OSError) as error:
        raise Rejected("unreadable", str(error)) from error
    except ValueError as error:
        raise Rejected("unusable", f"{path}: {error}") from error


def _journal(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal; a last line that a kill cut short does not count."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _note(journal: Path, video: Path, **facts: str) -> None:
    with journal.open("a") as file:
        file.write(json.dumps({"path": str(video.resolve()), **facts}, ensure_ascii=False) + "\n")
