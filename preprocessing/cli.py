"""The `wan-preprocess` command."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preprocessing import exchange
from preprocessing.options import parser

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 2 for input that cannot be used, 1 for a run that stopped itself."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from preprocessing.job import RunStopped

    try:
        return COMMANDS[arguments.command](arguments)
    except RunStopped as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
        return _INTERRUPTED


def _animate(arguments: argparse.Namespace) -> int:
    from preprocessing.settings import Settings

    models, kind = _models(arguments)
    settings = Settings(
        purpose=arguments.purpose, people=arguments.people, reference=arguments.reference,
        retarget=arguments.retarget.replace("-", "_") if arguments.retarget else "none",
        edited_template=arguments.edited_template, edited_reference=arguments.edited_reference, flux=arguments.flux,
        flux_seed=arguments.flux_seed, profile=arguments.profile, segmenter=kind,
        pose_channel_order=arguments.pose_channel_order, fp16=arguments.fp16,
        **_cutting(arguments),
    )  # fmt: skip
    return _make(arguments, settings, models)


def _clips(arguments: argparse.Namespace) -> int:
    from preprocessing.settings import Settings

    return _make(arguments, Settings(kind="clips", **_cutting(arguments)), None)


def _cutting(arguments: argparse.Namespace) -> dict[str, Any]:
    from preprocessing.thresholds import load_bounds

    bounds = load_bounds(arguments.quality)
    if arguments.command == "clips" and arguments.quality is None:
        bounds = {}
    return {
        "caption": arguments.caption, "num_frames": arguments.num_frames, "stride": arguments.stride,
        "fps": arguments.fps, "area": arguments.resolution_area, "divisor": arguments.size_divisor,
        "max_clips": arguments.max_clips, "quality": bounds,
    }  # fmt: skip


def _models(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The networks' files: each as given, else from --models."""
    from preprocessing.released_models import RELEASED, find_models
    from preprocessing.segmentation import check_kind, kind_of_segmenter
    from preprocessing.settings import ModelFiles

    paths = {name: getattr(arguments, name) for name in RELEASED}
    found = find_models(arguments.models) if arguments.models is not None else {}
    if check_kind(paths["segmenter"], found.get("segmenter")):
        paths["segmenter"] = None
    given = found | {name: path for name, path in paths.items() if path is not None}
    if missing := [name for name in paths if name not in given]:
        where = f", or {arguments.models / RELEASED[missing[0]].path}" if arguments.models is not None else ""
        flags = ", ".join(f"--{name}" for name in missing)
        raise ValueError(f"{flags}: give the network's file{where or ', or --models FOLDER'} (wan-preprocess download)")
    models = ModelFiles(**given)
    models.check()
    return models, kind_of_segmenter(models.segmenter)


def _make(arguments: argparse.Namespace, settings: Any, models: Any) -> int:
    from preprocessing.description import describe
    from preprocessing.inputs import find_sources
    from preprocessing.job import JobOptions, run
    from preprocessing.settings import Runtime

    devices = arguments.devices * arguments.workers_per_device
    networks = {
        name: getattr(arguments, name)
        for name in ("provider", "num_threads", "batch_frames")
        if hasattr(arguments, name)
    }
    edits = arguments.output / "work" / "edits"
    runtimes = [Runtime(device_id=device, edits=edits, **networks) for device in devices]
    options = JobOptions(
        runtimes=runtimes, timeout_seconds=arguments.timeout_seconds, max_reject_rate=arguments.max_reject_rate,
        retry_rejected=arguments.retry_rejected, commit_seconds=arguments.commit_seconds,
        lease_seconds=arguments.lease_seconds, scratch=arguments.scratch,
    )  # fmt: skip
    sources = find_sources(arguments.inputs)
    described = describe(settings, models)
    if arguments.ray:
        from preprocessing.ray_job import run_on_ray

        summary = run_on_ray(
            settings, models, sources, arguments.output, described=described, options=options, address=arguments.ray
        )
    else:
        summary = run(settings, models, sources, arguments.output, described=described, options=options)
    return _report(arguments.output, summary)


def _report(output: Path, summary: Any) -> int:
    from preprocessing.ledger import Ledger
    from wan_accel.data import store

    if not any(sidecar.rows for sidecar in store.parts(output).values()):
        details = "; ".join(record["detail"] for record in Ledger(output).rejections()[:5])
        raise ValueError(f"no video gave a clip: {details}")
    if not summary.todo:
        print(f"{output}: nothing to do, {summary.finished} videos finished, {summary.rejected} rejected")
        return 0
    videos = f"{summary.finished} videos finished, {summary.rejected} rejected"
    bad = f", {summary.clips_rejected} clips not good enough" if summary.clips_rejected else ""
    see = " (see rejected.jsonl)" if summary.rejected or summary.clips_rejected else ""
    print(f"{output}: {summary.clips} new clips; {videos}{bad}{see}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from preprocessing.status import read_status, sentence

    print(sentence(read_status(arguments.dataset)))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from preprocessing.merge import merge

    num_clips = merge(arguments.datasets, arguments.output, copy=arguments.copy, incomplete=arguments.incomplete)
    print(f"{arguments.output}: {num_clips} clips of {len(arguments.datasets)} datasets")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from preprocessing.choice import Choice
    from preprocessing.inspect import inspect

    choice = Choice(num_clips=arguments.sample, where=arguments.where, worst=arguments.worst)
    report = inspect(
        arguments.dataset, arguments.output, choice=choice, bounds_file=arguments.quality,
        num_processes=arguments.num_workers,
    )  # fmt: skip
    for problem in report.problems:
        sys.stderr.write(f"error: {problem}\n")
    shown = f"{report.num_shown} of {report.num_clips} clips shown" + (" that --where chose" if choice.where else "")
    print(f"{report.page}: {shown}")
    return 2 if report.problems else 0


def _verify(arguments: argparse.Namespace) -> int:
    from preprocessing.verify import verify_clips

    verdict = verify_clips(arguments.dataset, num_processes=arguments.num_workers)
    if arguments.json is not None:
        verdict.write(arguments.json, arguments.dataset)
    for problem in verdict.problems:
        sys.stderr.write(f"error: {problem}\n")
    if not verdict.problems:
        print(f"{arguments.dataset}: every part and every clip is sound ({verdict.num_clips} clips)")
    return 2 if verdict.problems else 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "animate": _animate, "clips": _clips, "status": _status, "inspect": _inspect, "verify": _verify, "merge": _merge,
    "export": exchange.export, "import": exchange.import_, "download": exchange.download,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
