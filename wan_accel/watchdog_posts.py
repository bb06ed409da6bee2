"""What ranks say of themselves to the watchdog, and what follows from all of it. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from wan_accel.parallel.agreement import name_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """A rank's own word.

    seq: counts its posts. position: optimizer step, and how many stations of it were passed. doing: the last station.
    idle_seconds: since then. left: why it is not to be missed: "finished", or the error that ended it.
    """

    seq: int
    position: tuple[int, int]
    doing: str
    idle_seconds: float
    host: str
    pid: int
    left: str = ""

    def where(self) -> str:
        return f"{self.doing}, after step {self.position[0]}"

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(content: bytes) -> "Post":
        fields = json.loads(content)
        return Post(**{**fields, "position": tuple(fields["position"])})


def furthest_behind(posts: Mapping[int, Post]) -> list[int]:
    """Ranks that have come least far: the others wait for them in a collective."""
    last = min(post.position for post in posts.values())
    return [rank for rank, post in posts.items() if post.position == last]


def describe_silent(posts: Mapping[int, Post], ranks: list[int], seconds: float) -> str:
    """What to say of ranks that have stopped posting."""
    return (
        f"{_name(posts, ranks)} gave no sign of life for {seconds:.0f} s: killed (out of host memory?), stopped, stuck "
        f"outside of Python (then logs/rank-{ranks[0]}.stack says where), or the machine is lost. Last seen "
        f"{posts[ranks[0]].where()}"
    )


def describe_failed(posts: Mapping[int, Post], ranks: list[int]) -> str:
    """What to say of ranks that an error has ended while the others go on."""
    return f"{_name(posts, ranks)} failed ({posts[ranks[0]].where()}): {posts[ranks[0]].left}"


def describe_hang(posts: Mapping[int, Post], behind: list[int], stacks: Mapping[int, str]) -> str:
    """What to say of ranks that stay where they are."""
    first, ahead = posts[behind[0]], len(posts) - len(behind)
    others = f", while {ahead} others wait for it further on" if ahead else ""
    text = f"{_name(posts, behind)} did not go on for {first.idle_seconds:.0f} s: {first.where()}{others}."
    for rank, stack in stacks.items():
        text += f"\nStack of rank {rank}:\n{stack}"
    return text + "The stacks of all ranks are in output_dir/logs"


def _name(posts: Mapping[int, Post], ranks: list[int]) -> str:
    post = posts[ranks[0]]
    return f"rank {ranks[0]} ({post.host}, pid {post.pid})" if len(ranks) == 1 else name_ranks(ranks)
