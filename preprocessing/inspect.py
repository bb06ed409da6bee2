"""Look at a clips dataset: a report over all its clips, with contact sheets and overlay videos of some."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from preprocessing.cards import CardMaker
from preprocessing.choice import Choice
from preprocessing.clip_media import OVERLAYS, SHEETS, THUMBNAILS, Media, MediaTask, file_name, make_media
from preprocessing.clip_table import PART, ROW, read_clip_table
from preprocessing.process_map import Crash, map_in_processes
from preprocessing.rejections import read_rejections
from preprocessing.report import bounds_to_draw, render

PAGE = "index.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The report's page, clips shown and there, and what is wrong with clips that could not be shown."""

    page: Path
    num_shown: int
    num_clips: int
    problems: list[str]


def inspect(
    dataset: Path,
    output: Path,
    *,
    choice: Choice,
    bounds_file: Path | None = None,
    num_processes: int = 1,
) -> Inspection:
    """Write `index.html` and its pictures into `output`; only the clips that are shown are decoded.

    Args:
        dataset: a clips dataset.
        output: a folder; files of the same names in it are replaced.
        choice: the clips to show.
        bounds_file: YAML of bounds to draw instead of the run's.
        num_processes: decode in so many processes.

    Raises:
        ValueError: `dataset` is none or is damaged, or the choice or the bounds make no sense. Nothing is written.
    """
    table = read_clip_table(dataset)
    bounds = bounds_to_draw(dataset, bounds_file)
    matching = choice.matching(table)
    shown = choice.shown(matching)
    for folder in (SHEETS, OVERLAYS, THUMBNAILS):
        (output / folder).mkdir(parents=True, exist_ok=True)
    media = _make_all(dataset, shown, output, num_processes)
    maker = CardMaker(table)
    page = render(
        dataset,
        table=table,
        matching=matching,
        cards=[maker.card(row, files) for row, files in zip(shown.to_pylist(), media)],
        choice=choice,
        rejections=read_rejections(dataset),
        bounds=bounds,
    )
    (output / PAGE).write_text(page, encoding="utf-8")
    problems = [found.problem for found in media if found.problem is not None]
    return Inspection(page=output / PAGE, num_shown=len(shown), num_clips=len(table), problems=problems)


def _make_all(dataset: Path, shown: pa.Table, output: Path, num_processes: int) -> list[Media]:
    """The media of clips, in their order."""
    tasks: dict[str, MediaTask] = {}
    for clip in shown.select(["clip_id", PART, ROW]).to_pylist():
        name = file_name(clip["clip_id"] or "", tasks)
        tasks[name] = MediaTask(part=dataset / clip[PART], row=clip[ROW], output=output, name=name)
    made = map_in_processes(make_media, tasks.values(), num_processes=num_processes)
    crash = Media(problem="the process that decodes it ended: verify the dataset")
    found = {
        task.name: crash if isinstance(media, Crash) else media
        for task, media in tqdm(made, "clips", total=len(tasks), disable=None)
    }
    return [found[name] for name in tasks]
