"""`wan-accel checkpoint verify`: read every file of checkpoints and compare it with what was written."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from wan_accel.checkpoint import MANIFEST, read_sums
from wan_accel.file_sums import damaged_files

State = Literal["complete", "damaged", "torn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is known of a checkpoint after all of it was read. torn: its save did not end; it is never resumed from."""

    name: str
    state: State
    problems: tuple[str, ...] = ()
    files: int = 0
    size: int = 0

    def line(self) -> str:
        """One line for people."""
        if self.state == "complete":
            return f"{self.name}: complete, {self.files} files, {self.size / 2**30:.2f} GiB"
        return f"{self.name}: {self.state}: {'; '.join(self.problems)}"


def verify(path: Path) -> Iterator[Verdict]:
    """Verify a checkpoint, or all of a run's, oldest first.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST).is_file():
        yield _verify_one(path)
        return
    found = sorted(path.glob("checkpoint-*"), key=_step)
    if not found:
        raise ValueError(f"{path} holds no checkpoint: give a run's output_dir or a checkpoint-N folder")
    for folder in found:
        yield _verify_one(folder)


def _verify_one(folder: Path) -> Verdict:
    if folder.suffix == ".tmp" or not (folder / MANIFEST).is_file():
        problem = f"no {MANIFEST}: a save is going on, or was cut short and the next one removes it"
        return Verdict(name=folder.name, state="torn", problems=(problem,))
    try:
        sums = read_sums(folder)
    except ValueError as error:
        return Verdict(name=folder.name, state="damaged", problems=(str(error),))
    problems = [f"{name} {problem}" for name, problem in damaged_files(folder, sums) if problem is not None]
    size = sum(one.size for one in sums.values())
    state: State = "damaged" if problems else "complete"
    return Verdict(name=folder.name, state=state, problems=tuple(problems), files=len(sums), size=size)


def _step(folder: Path) -> tuple[int, str]:
    digits = folder.name.partition("-")[2].partition(".")[0]
    return (int(digits) if digits.isdigit() else 0, folder.name)


def run(path: Path, *, as_json: bool) -> int:
    """Print a verdict a checkpoint; returns the exit code: 1 if one is damaged, or none is complete."""
    verdicts = []
    for verdict in verify(path):
        verdicts.append(verdict)
        print(json.dumps(asdict(verdict)) if as_json else verdict.line(), flush=True)
    states = {verdict.state for verdict in verdicts}
    return 1 if "damaged" in states or "complete" not in states else 0
