"""Check a clips dataset: every part against its hash, every clip by decoding it, in several processes."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from preprocessing.part_checks import Problem, Rows, check_part, check_rows, clip_ids
from preprocessing.process_map import Crash, map_in_processes
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, check_schema

_PIECES_OF_A_PART = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was looked at, and what is wrong with it; a sound dataset has no problems."""

    num_parts: int
    num_clips: int
    problems: list[Problem]

    @property
    def num_bad_clips(self) -> int:
        """Clips that a problem names."""
        return len({(problem.part, problem.row) for problem in self.problems if problem.row is not None})

    def write(self, path: Path, dataset: Path) -> None:
        """Write it as JSON: dataset, sound, num_parts, num_clips, num_bad_clips, problems with their places."""
        content = {"dataset": str(dataset), "sound": not self.problems, "num_bad_clips": self.num_bad_clips}
        store.write_json(path, {**content, **asdict(self)})


def verify_clips(dataset: Path, *, num_processes: int = 1) -> Verdict:
    """Check all that can be read; damage in one place hides none elsewhere.

    With more than one process, a clip that ends its process is named too, and the check goes on.
    Raises ValueError where it is no dataset of clips at all.
    """
    problems = _open_problems(dataset)
    pieces: list[Rows] = []
    parts = store.finished(dataset)
    checked = map_in_processes(check_part, parts, num_processes=num_processes)
    for part, findings in tqdm(checked, "parts", total=len(parts), disable=None):
        name = str(part.relative_to(dataset))
        if isinstance(findings, Crash):
            problems.append(Problem(part=name, message="ends the process that reads it: copy it again"))
            continue
        problems += [Problem(part=name, message=message) for message in findings.problems]
        size = -(-len(findings.batches) // _PIECES_OF_A_PART)
        starts = range(0, len(findings.batches), size or 1)
        pieces += [Rows(root=dataset, part=part, batches=tuple(findings.batches[i : i + size])) for i in starts]
    clip_problems, ids = _check_pieces(pieces, num_processes)
    problems += clip_problems + _duplicates(ids)
    order = sorted(problems, key=lambda problem: (problem.part, -1 if problem.row is None else problem.row))
    return Verdict(num_parts=len(parts), num_clips=len(ids), problems=order)


def _open_problems(dataset: Path) -> list[Problem]:
    """What readers that open the dataset would stumble over before they read a row."""
    if not (dataset / "state.json").is_file():
        raise store.StoreError(
            f"{dataset} is not a dataset of wan-accel (no state.json): give the folder that a run wrote"
        )
    try:
        if (run := dataset / store.RUN_FILE).is_file():
            check_schema(json.loads(run.read_text()).get("schema"), CLIPS_SCHEMA, str(dataset))
        listed = {entry["filename"] for entry in json.loads((dataset / "state.json").read_text())["_data_files"]}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        return [Problem(part="state.json", message=f"or {store.RUN_FILE} is damaged ({error})")]
    there = {str(part.relative_to(dataset)) for part in store.finished(dataset)}
    return [
        *(Problem(part=name, message="has no sidecar: copy it again") for name in listed - there),
        *(
            Problem(part=name, message="is not in state.json, so load_from_disk leaves it out")
            for name in there - listed
        ),
    ]


def _check_pieces(pieces: list[Rows], num_processes: int) -> tuple[list[Problem], dict[tuple[str, int], str]]:
    """Problems of clips; the id of every clip by part and row."""
    problems: list[Problem] = []
    ids: dict[tuple[str, int], str] = {}
    crashed: list[Rows] = []
    with tqdm(total=sum(len(piece.numbers) for piece in pieces), desc="clips", disable=None) as bar:
        for piece, findings in map_in_processes(check_rows, pieces, num_processes=num_processes):
            if isinstance(findings, Crash):
                crashed += [replace(piece, only=row) for row in piece.numbers]
                continue
            problems += findings.problems
            ids.update({(piece.part_name, row): clip_id for row, clip_id in findings.clip_ids.items()})
            bar.update(len(piece.numbers))
        # A clip of these ended its process: each by itself shows which one it was.
        for single, findings in map_in_processes(check_rows, crashed, num_processes=num_processes):
            ((row, clip_id),) = clip_ids(single).items()
            ids[single.part_name, row] = clip_id
            message = "ends the process that decodes it"
            crash = [Problem(part=single.part_name, row=row, clip_id=clip_id, message=message)]
            problems += crash if isinstance(findings, Crash) else findings.problems
            bar.update(1)
    return problems, ids


def _duplicates(ids: dict[tuple[str, int], str]) -> list[Problem]:
    first: dict[str, tuple[str, int]] = {}
    problems = []
    for (part, row), clip_id in sorted(ids.items()):
        if not clip_id:
            continue
        if clip_id in first:
            where = f"{first[clip_id][0]}, row {first[clip_id][1]}"
            problems.append(
                Problem(part=part, row=row, clip_id=clip_id, column="clip_id", message=f"is also in {where}")
            )
        first.setdefault(clip_id, (part, row))
    return problems
