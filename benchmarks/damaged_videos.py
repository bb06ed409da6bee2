"""Videos damaged in many ways: what the fuzz tests feed to decoding and to the whole pipeline."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

DEMO_VIDEOS = Path(__file__).parents[1] / "demo/videos"
NUM_FRAMES = 12
_HEADER_BYTES = 4096


def make_sources(folder: Path) -> list[Path]:
    """Short videos: the demo's own packets, and other codecs and containers."""
    sources = []
    for video in sorted(DEMO_VIDEOS.glob("*.mp4")):
        sources.append(folder / f"{video.stem}.mp4")
        _cut(video, sources[-1])
    sources += [folder / "hevc.mkv", folder / "vp9.webm", folder / "h264.ts"]
    for path, codec in zip(sources[-3:], ("libx265", "libvpx-vp9", "libx264"), strict=True):
        _recode(DEMO_VIDEOS / "two_people.mp4", path, codec)
    return sources


def _cut(source: Path, target: Path) -> None:
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.dts is None or number >= NUM_FRAMES:
                break
            packet.stream = stream
            writer.mux(packet)


def _recode(source: Path, target: Path, codec: str) -> None:
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {"g": "6"}
        stream = writer.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 320, 262, "yuv420p"
        for number, frame in enumerate(reader.decode(video=0)):
            if number >= NUM_FRAMES:
                break
            writer.mux(stream.encode(frame.reformat(320, 262)))
        writer.mux(stream.encode())


def damaged(sources: list[Path], num_cases: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (kind of damage, bytes), each source in turn."""
    contents = [path.read_bytes() for path in sources]
    for number in range(num_cases):
        randomly = random.Random(f"{seed}/{number}")
        name = randomly.choice(list(DAMAGES))
        yield name, DAMAGES[name](contents[number % len(contents)], randomly)


def _truncated(data: bytes, randomly: random.Random) -> bytes:
    return data[: randomly.randrange(len(data))]


def _flipped(data: bytes, randomly: random.Random, low: int, high: int) -> bytes:
    result = bytearray(data)
    for _ in range(randomly.choice([1, 4, 32, 256])):
        result[randomly.randrange(low, high)] ^= 1 << randomly.randrange(8)
    return bytes(result)


def _header_flipped(data: bytes, randomly: random.Random) -> bytes:
    """Flip bits where the index is: the first bytes, and the `moov` box of MP4, which comes last."""
    moov = data.find(b"moov")
    at_end = moov >= 0 and randomly.random() < 0.8
    low, high = (moov, len(data)) if at_end else (0, min(_HEADER_BYTES, len(data)))
    return _flipped(data, randomly, low, high)


def _range(data: bytes, randomly: random.Random) -> tuple[int, int]:
    low = randomly.randrange(len(data))
    return low, min(len(data), low + randomly.choice([16, 512, 16384]))


def _zeroed(data: bytes, randomly: random.Random) -> bytes:
    low, high = _range(data, randomly)
    return data[:low] + bytes(high - low) + data[high:]


def _randomised(data: bytes, randomly: random.Random) -> bytes:
    low, high = _range(data, randomly)
    return data[:low] + randomly.randbytes(high - low) + data[high:]


def _missing(data: bytes, randomly: random.Random) -> bytes:
    low, high = _range(data, randomly)
    return data[:low] + data[high:]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncated,
    "header-bits": _header_flipped,
    "payload-bits": lambda data, randomly: _flipped(data, randomly, 0, len(data)),
    "zeroed": _zeroed,
    "random-range": _randomised,
    "missing-range": _missing,
    "random-bytes": lambda data, randomly: randomly.randbytes(randomly.randrange(1, 65536)),
    "random-after-magic": lambda data, randomly: data[:64] + randomly.randbytes(randomly.randrange(1, 65536)),
}
