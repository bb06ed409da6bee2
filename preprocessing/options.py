"""The options of `wan-preprocess`, command by command."""

import argparse
from pathlib import Path
from typing import NoReturn

from preprocessing.exchange_options import add_download, add_export, add_import
from preprocessing.process_map import usable_processes
from preprocessing.types import PROFILES


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command's parser; `command` of the parsed arguments names the subcommand."""
    result = _Parser(prog="wan-preprocess", description="Turn videos into training data.")
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    _add_animate(commands.add_parser("animate", help="videos of people -> Wan-Animate clips"))
    _add_clips(commands.add_parser("clips", help="videos -> clips for t2v, i2v and ti2v, without person models"))
    for name, add, text in (
        ("status", _add_status, "how far the runs on a dataset are"),
        ("inspect", _add_inspect, "report, contact sheets and overlay videos of a dataset"),
        ("verify", _add_verify, "check every part and every clip of a dataset"),
        ("merge", _add_merge, "several datasets -> one, by links"),
        ("export", add_export, "a dataset -> files for Wan2.2's and DiffSynth's tools, parquet, a hub"),
        ("import", add_import, "parquet or a hub -> a dataset; DiffSynth's metadata -> a manifest"),
        ("download", add_download, "the released networks of Wan2.2-Animate, checked"),
    ):
        add(commands.add_parser(name, help=text))
    return result


def _add_animate(parser: argparse.ArgumentParser) -> None:
    _add_cutting(parser)
    people = parser.add_argument_group("people")
    people.add_argument("--purpose", choices=["train", "drive"], default="train")
    people.add_argument(
        "--people",
        choices=["largest", "all"],
        default="largest",
        help="a clip a stretch of time, or one for each person",
    )
    people.add_argument(
        "--reference", default="auto", help="auto, first, column (manifest), or a picture (purpose drive)"
    )
    people.add_argument(
        "--profile", choices=sorted(PROFILES), default="wan", help="upstream: Wan2.2's way, mistakes too"
    )
    people.add_argument(
        "--retarget",
        choices=["one-step", "two-step"],
        nargs="?",
        const="one-step",
        help="fit the pose to the reference (purpose drive); two-step: with people redrawn in a standard pose",
    )
    people.add_argument("--edited-template", help="the video's person in a standard pose, for --retarget two-step")
    people.add_argument("--edited-reference", help="the reference's person in a standard pose")
    people.add_argument("--flux", help="folder of FLUX.1-Kontext, which makes the edited pictures that are not given")
    people.add_argument("--flux-seed", type=int, default=0, help="another one gives other pictures")
    people.add_argument(
        "--pose-channel-order", choices=["rgb", "bgr"], help="what the pose network sees (default: the profile's)"
    )
    networks = parser.add_argument_group("networks")
    networks.add_argument("--models", type=Path, help="folder with all three, as `wan-preprocess download` fills it")
    networks.add_argument("--detector", type=Path, help="ONNX person detector")
    networks.add_argument("--pose", type=Path, help="ONNX whole-body pose network")
    networks.add_argument(
        "--segmenter",
        type=Path,
        help="ONNX person segmenter, SAM2 checkpoint (.pt) or transformers folder; or `sam2`: the one of --models",
    )
    networks.add_argument("--provider", default="cpu", help="onnxruntime provider: cpu, cuda or tensorrt")
    networks.add_argument("--fp16", action="store_true", help="ONNX networks in half precision")
    networks.add_argument("--num-threads", type=int, default=0, help="threads of a network, 0 for all cores")
    networks.add_argument("--batch-frames", type=int, help="that a network takes at a time (default: 2, on GPUs 16)")
    parser.set_defaults(command="animate")


def _add_clips(parser: argparse.ArgumentParser) -> None:
    _add_cutting(parser)
    parser.set_defaults(command="clips")


def _add_cutting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="VIDEO", help="videos, folders, URLs, manifests (csv, jsonl, parquet)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the clips dataset to write or go on with")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--caption", default="", help="caption of clips whose video has none")
    clips.add_argument("--num-frames", type=int, default=77, help="frames of a clip, 4n + 1")
    clips.add_argument("--stride", type=int, help="frames from one clip's start to the next's (default: end to end)")
    clips.add_argument("--fps", type=float, default=30.0)
    clips.add_argument("--resolution-area", type=_area, default=480 * 832, help="pixels of a frame, e.g. 480*832")
    clips.add_argument("--size-divisor", type=int, choices=[16, 32], default=16, help="of the sides; 32 for ti2v-5b")
    clips.add_argument("--max-clips", type=int, help="clips of a video, at most")
    clips.add_argument("--quality", type=Path, help="YAML file of bounds on the quality figures")
    run = parser.add_argument_group("the run")
    run.add_argument("--devices", type=_devices, default=[0], help="GPUs, e.g. 0-7 or 0,2 (with --provider cuda)")
    run.add_argument("--workers-per-device", type=int, default=1, help="processes on each; without GPUs: processes")
    run.add_argument("--ray", metavar="ADDRESS", help="work on a Ray cluster: its address, or `local`")
    run.add_argument("--timeout-seconds", type=float, help="for one video")
    run.add_argument("--max-reject-rate", type=float, help="stop when a larger share of videos is rejected, e.g. 0.5")
    run.add_argument("--retry-rejected", nargs="?", const="", metavar="REASON", help="work again on rejected videos")
    run.add_argument("--commit-seconds", type=float, default=120.0, help="work that a kill may cost, at most")
    run.add_argument("--lease-seconds", type=float, default=120.0, help="silence of a job elsewhere until it is dead")
    run.add_argument("--scratch", type=Path, help="folder for copies of remote videos")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path)
    parser.set_defaults(command="status")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for index.html and its pictures")
    parser.add_argument("--sample", type=_count, default=200, help="clips to show, evenly spread (default: 200)")
    parser.add_argument("--where", metavar="EXPR", help="clips to choose from, e.g. 'quality.hand_score < 0.3'")
    parser.add_argument("--worst", metavar="FIGURE", help="show the worst clips by a figure, e.g. quality.blur")
    parser.add_argument("--quality", type=Path, help="YAML file of bounds to draw (default: those of the run)")
    _add_num_workers(parser)
    parser.set_defaults(command="inspect")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict for machines too")
    _add_num_workers(parser)
    parser.set_defaults(command="verify")


def _add_num_workers(parser: argparse.ArgumentParser) -> None:
    usable = usable_processes()
    parser.add_argument("--num-workers", type=_count, default=usable, help=f"processes (default here: {usable})")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--copy", action="store_true", help="copy the parts instead of linking them")
    parser.add_argument("--incomplete", action="store_true", help="merge datasets whose runs have not finished")
    parser.set_defaults(command="merge")


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


def _count(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")
    return int(text)


def _devices(text: str) -> list[int]:
    """0-7, 0,2,5 or a mixture."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        devices = [device for part in ends for device in range(part[0], part[-1] + 1)]
    except ValueError:
        devices = []
    if not devices or len(set(devices)) != len(devices):
        raise argparse.ArgumentTypeError(f"{text!r} are no devices: write 0-7 or 0,2,5")
    return devices
