"""The options of `wan-preprocess export`, `import` and `download`."""

import argparse
from pathlib import Path

from preprocessing.mask_growth import WAN_GROWTH
from preprocessing.released_models import RELEASED

LAYOUTS = ("wan", "diffsynth", "parquet", "hub")
ORIGINS = ("parquet", "hub", "diffsynth")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Options of `export`; those of other layouts than the one that is asked for stay None."""
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="who reads it")
    parser.add_argument("--output", type=Path, required=True, help="a new folder, or one that the same export began")
    chosen = parser.add_argument_group("which clips")
    chosen.add_argument("--where", metavar="CONDITION", help="e.g. 'quality.face_size >= 64 and purpose == train'")
    chosen.add_argument("--clip", nargs="+", default=[], metavar="ID", help="clips by their clip_id")
    chosen.add_argument("--sample", type=int, help="this many of them, the same ones each time")
    masks = parser.add_argument_group("masks (layouts wan and diffsynth), as Wan2.2's preprocess_data.py has them")
    masks.add_argument("--iterations", type=int, help=f"of dilation, 0 for the bare mask ({WAN_GROWTH.iterations})")
    masks.add_argument("--k", type=int, help=f"side of the dilation's square, pixels ({WAN_GROWTH.k})")
    masks.add_argument("--w_len", type=int, help=f"cells across the mask's box ({WAN_GROWTH.w_len})")
    masks.add_argument("--h_len", type=int, help=f"cells down the mask's box ({WAN_GROWTH.h_len})")
    diffsynth = parser.add_argument_group("layout diffsynth")
    diffsynth.add_argument("--metadata", choices=["csv", "json"], help="form of the metadata file (csv)")
    hub = parser.add_argument_group("layout hub")
    hub.add_argument("--repo-id", metavar="USER/NAME", help="the dataset repository, made if need be")
    hub.add_argument("--private", action="store_true", default=None, help="make it readable by its owner only")
    hub.add_argument("--revision", help="a branch of it, made if need be")
    parser.set_defaults(command="export")


def add_import(parser: argparse.ArgumentParser) -> None:
    """Options of `import`."""
    parser.add_argument("source", help="folder of parquet shards, USER/NAME on a hub, or DiffSynth's metadata file")
    parser.add_argument("--from", choices=ORIGINS, required=True, dest="origin", help="what it is")
    parser.add_argument(
        "--output", type=Path, required=True, help="the dataset to write; from diffsynth: the manifest, .csv or .jsonl"
    )
    parser.add_argument("--revision", help="branch, tag or commit (from hub)")
    parser.add_argument("--base-path", type=Path, help="where relative paths start (from diffsynth; its own folder)")
    parser.set_defaults(command="import")


def add_download(parser: argparse.ArgumentParser) -> None:
    """Options of `download`."""
    parser.add_argument("--output", type=Path, default=Path("models"), help="folder for the networks (models)")
    parser.add_argument("--what", type=_networks, help=f"some of {','.join(RELEASED)}; all of them by default")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--check", action="store_true", help="compare what is there with its hashes, without a hub")
    parser.set_defaults(command="download")


def _networks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in RELEASED]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r} is no network: use {', '.join(RELEASED)}")
    return names
