"""What `wan-preprocess export`, `import` and `download` do."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.mask_growth import MaskGrowth

if TYPE_CHECKING:
    from preprocessing.export_folders import Exported

_MASK_OPTIONS = ("iterations", "k", "w_len", "h_len")
# The options that a layout, or an origin, has; given with another one they are refused.
_OF_LAYOUT: dict[str, tuple[str, ...]] = {
    "wan": _MASK_OPTIONS, "diffsynth": (*_MASK_OPTIONS, "metadata"), "parquet": (),
    "hub": ("repo_id", "private", "revision"),
}  # fmt: skip
_OF_ORIGIN: dict[str, tuple[str, ...]] = {"parquet": (), "hub": ("revision",), "diffsynth": ("base_path",)}


def export(arguments: argparse.Namespace) -> int:
    """Write a dataset's clips for other tools.

    Raises ValueError for options that the layout does not have or lacks, and as the layouts' functions do.
    """
    _refuse_others(arguments, "layout", arguments.layout, _OF_LAYOUT)
    if arguments.layout == "hub" and arguments.repo_id is None:
        raise ValueError("--layout hub: give the repository, --repo-id USER/NAME")
    exported = _export(arguments)
    kept = f", {exported.kept} were there" if exported.kept else ""
    print(f"{arguments.output}: {exported.written} clips written{kept}")
    if arguments.layout == "hub":
        from preprocessing.hub import push

        print(push(arguments.output, arguments.repo_id, private=bool(arguments.private), revision=arguments.revision))
    return 0


def _export(arguments: argparse.Namespace) -> "Exported":
    from preprocessing.selection import Selection

    chosen = Selection(where=arguments.where, clips=arguments.clip, sample=arguments.sample)
    given: dict[str, Any] = {"selection": chosen}
    if arguments.layout in ("parquet", "hub"):
        from preprocessing.export_parquet import export_parquet

        return export_parquet(arguments.dataset, arguments.output, **given)
    growth = {name: getattr(arguments, name) for name in _MASK_OPTIONS if getattr(arguments, name) is not None}
    given["growth"] = MaskGrowth(**growth)
    if arguments.layout == "wan":
        from preprocessing.export_wan import export_wan

        return export_wan(arguments.dataset, arguments.output, **given)
    from preprocessing.export_diffsynth import export_diffsynth

    return export_diffsynth(arguments.dataset, arguments.output, metadata=arguments.metadata or "csv", **given)


def import_(arguments: argparse.Namespace) -> int:
    """Make a dataset, or a manifest, of what another tool wrote.

    Raises ValueError for options that the origin does not have, and as the origins' functions do.
    """
    _refuse_others(arguments, "from", arguments.origin, _OF_ORIGIN)
    if arguments.origin == "diffsynth":
        from preprocessing.import_diffsynth import import_diffsynth

        imported = import_diffsynth(Path(arguments.source), arguments.output, base_path=arguments.base_path)
        unused = f"; columns that it does not use: {', '.join(imported.unused)}" if imported.unused else ""
        print(f"{arguments.output}: {imported.videos} videos{unused}")
        return 0
    from preprocessing.import_parquet import import_parquet

    folder = Path(arguments.source)
    if arguments.origin == "hub":
        from preprocessing.hub import fetch

        folder = fetch(arguments.source, revision=arguments.revision)
    print(f"{arguments.output}: {import_parquet(folder, arguments.output)} clips")
    return 0


def download(arguments: argparse.Namespace) -> int:
    """Fetch the released networks, or check those that are there. Raises as `download.download` and `check` do."""
    from preprocessing.download import check, download
    from preprocessing.released_models import RELEASED

    if arguments.check:
        if arguments.what or arguments.revision:
            raise ValueError("--check compares all that was downloaded: leave --what and --revision out")
        problems = check(arguments.output)
        for problem in problems:
            sys.stderr.write(f"error: {problem}\n")
        if not problems:
            print(f"{arguments.output}: every file is as it was downloaded")
        return 2 if problems else 0
    for place in download(arguments.output, arguments.what or list(RELEASED), revision=arguments.revision):
        print(place)
    return 0


def _refuse_others(arguments: argparse.Namespace, what: str, chosen: str, options: dict[str, tuple[str, ...]]) -> None:
    known = {name for names in options.values() for name in names}
    given = sorted(name for name in known - {*options[chosen]} if getattr(arguments, name, None) is not None)
    if given:
        flags = ", ".join(f"--{name if name in _MASK_OPTIONS else name.replace('_', '-')}" for name in given)
        raise ValueError(f"--{what} {chosen} has no {flags}: leave it out")
