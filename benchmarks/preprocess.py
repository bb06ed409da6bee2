"""Measure `wan-preprocess animate` beside the original's way, in the same run, and its memory.

    python benchmarks/preprocess.py                       # time, on the demo's videos and networks
    python benchmarks/preprocess.py --provider cuda       # on a GPU, with --detector, --pose, --segmenter and --videos
    python benchmarks/preprocess.py --memory              # peak memory of videos, and of 10 times longer ones
    python benchmarks/preprocess.py --streams             # one network with all threads, or two with half of them

The peer (original_way.py) goes frame by frame with the same ONNX files and threads. Both are compared first: boxes, key
points, masks and face boxes of `--profile upstream` with the peer's; figures are printed only if they agree. Then both
work on the same videos in turns: the peer from file to its four mp4, ours with the profile `wan` from file to rows that
are committed to a dataset. Opening networks comes before, with one untimed run. "outside networks" is the wall time in
which no network runs; CPU seconds are of all threads, child processes included.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from original_way import OriginalWay
from our_way import OurWay
from same_outputs import agree
from stage_times import Stopwatch, Times
from time_report import report

from preprocessing.settings import ModelFiles, Settings
from preprocessing.thresholds import load_bounds

DEMO = Path(__file__).parents[1] / "demo"
REFERENCE = DEMO / "reference/man.png"


def main() -> int:
    arguments = _arguments()
    models = ModelFiles(detector=arguments.detector, pose=arguments.pose, segmenter=arguments.segmenter)
    if arguments.memory:
        from preprocess_memory import report as report_memory

        return report_memory(models, DEMO / "videos/walker.mp4")
    if arguments.streams:
        from network_streams import report as report_streams

        return report_streams(models, num_threads=arguments.num_threads)
    with tempfile.TemporaryDirectory() as scratch:
        times = _times(models, arguments, Path(scratch))
    if times is None:
        sys.stderr.write("error: the outputs differ, so that times would say nothing\n")
        return 1
    how = f"{len(arguments.videos)} videos, {arguments.num_threads} threads, {arguments.provider}"
    print(f"\nmedians of {arguments.repeats} runs; {how}")
    return report(*times, provider=arguments.provider)


def _times(models: ModelFiles, arguments: argparse.Namespace, folder: Path) -> tuple[list[Times], list[Times]] | None:
    """Times of the peer and of ours, run by run; None where they do not give the same."""
    watch, options = Stopwatch(), {"provider": arguments.provider, "num_threads": arguments.num_threads}
    upstream = Settings(profile="upstream", num_frames=arguments.num_frames)
    peer = OriginalWay(models, watch, area=upstream.area, **options)
    same_way = OurWay(models, Stopwatch(), upstream, **options)
    agreed = [agree(video.stem, same_way.rows(video), peer(video, REFERENCE, folder)) for video in arguments.videos]
    if not all(agreed):
        return None
    ours = OurWay(models, watch, Settings(num_frames=arguments.num_frames, quality=load_bounds(None)), **options)
    ours(arguments.videos, folder)
    of_peer: list[Times] = []
    of_ours: list[Times] = []
    for _ in range(arguments.repeats):
        with watch.measure() as measured:
            for video in arguments.videos:
                peer(video, REFERENCE, folder)
        of_peer += measured
        with watch.measure() as measured:
            ours(arguments.videos, folder)
        of_ours += measured
    return of_peer, of_ours


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    videos = [DEMO / f"videos/{name}.mp4" for name in ("walker", "jumping", "two_people")]
    parser.add_argument("--videos", type=Path, nargs="+", default=videos)
    parser.add_argument("--num-frames", type=int, default=77, help="frames of our clips")
    parser.add_argument("--detector", type=Path, default=DEMO / "models/person_detector.onnx")
    parser.add_argument("--pose", type=Path, default=DEMO / "models/wholebody133.onnx")
    parser.add_argument("--segmenter", type=Path, default=DEMO / "models/person_segmenter.onnx")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--num-threads", type=int, default=2, help="of the CPU, for both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--streams", action="store_true", help="ways of sharing threads among networks instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
