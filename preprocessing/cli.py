"""The `wan-preprocess` command: animate, inspect, verify."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from preprocessing.types import PROFILES


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code, 2 for input that cannot be used."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on after the last finished video\n")
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="wan-preprocess", description="Turn videos into training data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    animate = commands.add_parser("animate", help="videos of people -> Wan-Animate clips")
    animate.add_argument("inputs", nargs="+", type=Path, metavar="VIDEO", help="video files or folders")
    animate.add_argument("--output", type=Path, required=True, help="the clips dataset to write or go on with")
    animate.add_argument("--purpose", choices=["train", "drive"], default="train")
    animate.add_argument("--reference", default="auto", help="auto, first, or a picture (purpose drive)")
    animate.add_argument("--retarget", action="store_true", help="fit the pose to the reference's proportions")
    animate.add_argument("--caption", default="", help="caption of every clip")
    animate.add_argument("--num-frames", type=int, default=77, help="frames of a clip, 4n + 1")
    animate.add_argument("--fps", type=float, default=30.0)
    animate.add_argument("--resolution-area", type=_area, default=480 * 832, help="pixels of a frame, e.g. 480*832")
    animate.add_argument("--max-clips", type=int, help="clips of a video, at most")
    animate.add_argument("--profile", choices=sorted(PROFILES), default="wan")
    animate.add_argument("--detector", type=Path, required=True, help="ONNX person detector")
    animate.add_argument("--pose", type=Path, required=True, help="ONNX whole-body pose network")
    animate.add_argument("--segmenter", type=Path, required=True, help="ONNX person segmenter")
    animate.add_argument("--provider", default="cpu", help="onnxruntime provider: cpu, cuda or tensorrt")
    animate.add_argument("--num-threads", type=int, default=0, help="threads of a network, 0 for all cores")
    animate.set_defaults(run=_animate)

    inspect = commands.add_parser("inspect", help="contact sheets of a clips dataset")
    inspect.add_argument("dataset", type=Path)
    inspect.add_argument("--output", type=Path, required=True, help="folder for the PNG files")
    inspect.add_argument("--sample", type=int, help="this many clips instead of all")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="check every part and every clip of a dataset")
    verify.add_argument("dataset", type=Path)
    verify.set_defaults(run=_verify)
    return parser


def _area(text: str) -> int:
    """480*832, 480x832 or a number of pixels."""
    try:
        sides = [int(side) for side in text.replace("x", "*").split("*")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an area: write 480*832 or a number of pixels") from None
    area = sides[0] if len(sides) == 1 else sides[0] * sides[1]
    if len(sides) > 2 or area <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an area: write 480*832 or a number of pixels")
    return area


def _animate(arguments: argparse.Namespace) -> int:
    from preprocessing.batch import run
    from preprocessing.pipeline import Pipeline
    from preprocessing.settings import ModelFiles, Settings, find_videos

    settings = Settings(
        purpose=arguments.purpose, reference=arguments.reference, retarget=arguments.retarget,
        caption=arguments.caption, num_frames=arguments.num_frames, fps=arguments.fps,
        area=arguments.resolution_area, max_clips=arguments.max_clips, profile=arguments.profile,
    )  # fmt: skip
    videos = find_videos(arguments.inputs)
    models = ModelFiles(detector=arguments.detector, pose=arguments.pose, segmenter=arguments.segmenter)
    pipeline = Pipeline(settings, models, provider=arguments.provider, num_threads=arguments.num_threads)
    counts = run(pipeline, videos, arguments.output)
    if not counts["todo"]:
        print(f"{arguments.output}: nothing to do, {counts['finished']} videos finished, {counts['rejected']} rejected")
        return 0
    print(
        f"{arguments.output}: {counts['clips']} new clips; {counts['finished']} videos finished, "
        f"{counts['rejected']} rejected" + (" (see rejected.jsonl)" if counts["rejected"] else "")
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from preprocessing.inspect import write_sheets

    for path in write_sheets(arguments.dataset, arguments.output, num_clips=arguments.sample):
        print(path)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from preprocessing.verify import verify_clips

    problems = verify_clips(arguments.dataset)
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if not problems:
        print(f"{arguments.dataset}: every part and every clip is sound")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
