"""The ranks of a launch compared: the rank or link that is slow or different is named. Torch-free."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wan_accel.doctor_finding import Finding, Level
from wan_accel.listing import first_few

# Slower than this share of the median is a warning: caches and clocks alone stay above it.
SLOW_SHARE = 0.7
NUM_NAMED = 8
# Where ranks may not differ; in everything else it only costs speed.
HARDWARE = ("GPU", "NVIDIA driver")
PLACES = ("inside machines", "between machines")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """A rank: what it runs, its figures by name, and GB/s of its links by axis and neighbour's rank.

    findings: of its machine, from one rank of each.
    """

    rank: int
    host: str
    software: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)
    links: dict[str, dict[int, float]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def compare(reports: Sequence[RankReport]) -> list[Finding]:
    """Findings of a launch: differences first, then speeds."""
    hosts = {report.rank: report.host for report in reports}
    names = list(dict.fromkeys(name for report in reports for name in report.software))
    differing = [
        finding
        for name in names
        if (finding := difference(name, {r.rank: r.software.get(name, "none") for r in reports}, hosts)) is not None
    ]
    same = Finding(name="ranks", level="ok", value=f"{len(reports)} on {len(set(hosts.values()))} machines, all alike")
    figures = [spread(name, {r.rank: r.figures[name] for r in reports}, hosts) for name in reports[0].figures]
    links = [link_finding(axis, {r.rank: r.links[axis] for r in reports}, hosts) for axis in reports[0].links]
    return [*(differing or [same]), *figures, *links]


def difference(name: str, values: Mapping[int, str], hosts: Mapping[int, str]) -> Finding | None:
    """Ranks whose value is not the most frequent one; None if there are none."""
    usual = Counter(values.values()).most_common(1)[0][0]
    strange = [f"{_who(rank, hosts)} has {value}" for rank, value in values.items() if value != usual]
    if not strange:
        return None
    level: Level = "warning" if name in HARDWARE else "problem"
    advice = "all ranks wait for the slowest" if name in HARDWARE else "install the same everywhere"
    value = f"{first_few(strange, NUM_NAMED)}; the others have {usual}"
    return Finding(name=name, level=level, value=value, advice=advice)


def spread(name: str, figures: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    """Median, slowest and fastest rank of a figure; a warning if the slowest is far behind."""
    slowest, fastest = min(figures, key=figures.__getitem__), max(figures, key=figures.__getitem__)
    median = statistics.median(figures.values())
    value = (
        f"{_number(median)}; slowest {_number(figures[slowest])}, {_who(slowest, hosts)}; "
        f"fastest {_number(figures[fastest])}, {_who(fastest, hosts)}"
    )
    if figures[slowest] >= SLOW_SHARE * median:
        return Finding(name=name, level="ok", value=value)
    advice = f"look at {hosts[slowest]} (temperature, clocks, other users, cables), or leave it out"
    return Finding(name=name, level="warning", value=value, advice=advice)


def link_finding(axis: str, links: Mapping[int, Mapping[int, float]], hosts: Mapping[int, str]) -> Finding:
    """Links between neighbours of an axis; each is measured at both ends, and the slower figure counts.

    A link is compared with those of its kind: inside a machine, and between machines.
    """
    speeds: dict[tuple[int, int], float] = {}
    for rank, found in links.items():
        for other, speed in found.items():
            pair = (min(rank, other), max(rank, other))
            speeds[pair] = min(speed, speeds.get(pair, speed))
    kinds = [
        {pair: speed for pair, speed in speeds.items() if (hosts[pair[0]] == hosts[pair[1]]) == is_inside}
        for is_inside in (True, False)
    ]
    worst = min((pair for kind in kinds for pair in kind), key=lambda pair: _share(speeds[pair], pair, kinds))
    who = f"{_who(worst[0], hosts)} - {_who(worst[1], hosts)}"
    medians = [f"{place} {_number(statistics.median(kind.values()))}" for place, kind in zip(PLACES, kinds) if kind]
    value = f"{', '.join(medians)}; slowest {_number(speeds[worst])}, {who}"
    if _share(speeds[worst], worst, kinds) >= SLOW_SHARE:
        return Finding(name=f"{axis} links GB/s", level="ok", value=value)
    advice = "look at the link between these two (nvidia-smi topo -m and nvlink -s, the network card and its cable)"
    return Finding(name=f"{axis} links GB/s", level="warning", value=value, advice=advice)


def _share(speed: float, pair: tuple[int, int], kinds: Sequence[Mapping[tuple[int, int], float]]) -> float:
    """A link's speed beside the median of its kind."""
    return speed / statistics.median(next(kind for kind in kinds if pair in kind).values())


def _who(rank: int, hosts: Mapping[int, str]) -> str:
    return f"rank {rank} ({hosts[rank]})"


def _number(figure: float) -> str:
    return f"{figure:.3g}"
