"""The times of two ways of preprocessing, side by side, and whether ours is fast enough."""

import statistics

from stage_times import NETWORK, Times

MOST_OUTSIDE, MOST_OF_PEER, LEAST_SPEED_ON_GPU = 0.15, 0.5, 5.0
FIGURES = ("wall", "network", "outside", "cpu", "network_cpu", "outside_cpu")


def report(peer: list[Times], ours: list[Times], *, provider: str) -> int:
    """Print medians of runs that were made in turns; 1 where a target is missed."""
    _print_stages("the original's way", peer)
    _print_stages("ours (stages overlap)", ours)
    share = statistics.median(run.outside / run.wall for run in ours)
    of_peer = statistics.median(b.outside / a.outside for a, b in zip(peer, ours, strict=True))
    speed = statistics.median(a.wall / b.wall for a, b in zip(peer, ours, strict=True))
    cpu = statistics.median(b.outside_cpu / a.outside_cpu for a, b in zip(peer, ours, strict=True))
    print(f"\nCPU seconds outside networks, ours / peer: {cpu:.3f}")
    verdicts = [
        ("outside networks / wall, ours", share, share <= MOST_OUTSIDE, f"at most {MOST_OUTSIDE}"),
        ("outside networks, ours / peer", of_peer, of_peer <= MOST_OF_PEER, f"at most {MOST_OF_PEER}"),
    ]
    if provider == "cpu":
        print(f"throughput, ours / peer: {speed:.2f}")
    else:
        is_fast = speed >= LEAST_SPEED_ON_GPU
        verdicts.append(("throughput, ours / peer", speed, is_fast, f"at least {LEAST_SPEED_ON_GPU}"))
    for name, value, is_met, target in verdicts:
        print(f"{name}: {value:.3f} (target {target}: {'met' if is_met else 'MISSED'})")
    return int(not all(is_met for _, _, is_met, _ in verdicts))


def _print_stages(way: str, runs: list[Times]) -> None:
    medians = {name: statistics.median(getattr(run, name) for run in runs) for name in FIGURES}
    stages = {
        name: [statistics.median(run.stages.get(name, (0.0, 0.0))[i] for run in runs) for i in (0, 1)]
        for name in {name for run in runs for name in run.stages}
    }
    print(f"\n{way}\n  {'stage':34s} seconds  of CPU, in Python's threads")
    for name in sorted(stages, key=lambda name: (name == NETWORK, -stages[name][0])):
        print(f"  {name:34s} {stages[name][0]:7.2f} {stages[name][1]:7.2f}")
    walls = [run.wall for run in runs]
    print(f"  wall {medians['wall']:.2f} s ({min(walls):.2f} to {max(walls):.2f}): "
          f"networks {medians['network']:.2f}, outside {medians['outside']:.2f}")  # fmt: skip
    print(f"  CPU {medians['cpu']:.2f} s: networks {medians['network_cpu']:.2f}, outside {medians['outside_cpu']:.2f}")
