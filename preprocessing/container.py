"""What a video file holds, from its packets and first frame: times, key frames, orientation, shape of pixels."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.shown_picture import UPRIGHT, read_pixel_aspect, read_turn, shown_hw
from preprocessing.types import Float, Int
from preprocessing.video_error import UserVideoError

if TYPE_CHECKING:
    import av
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg also opens playlists that fetch other files, and reads text and pictures as video; these are real containers.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,gif,ivf,h264,hevc,nut"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contents:
    """The video stream of a file, as shown: upright and with square pixels.

    pts: (num_frames,) int64, strictly rising, in units of time_base. end_pts: when the last frame ends.
    key_indices: frames that decoding can start at, from 0 on. upright: FFmpeg filters that turn the picture.
    height, width: of the picture shown.
    """

    path: Path
    stream_index: int
    codec: str
    pixel_format: str
    fps: float
    time_base: Fraction
    pts: Int
    end_pts: int
    key_indices: Int
    upright: tuple[str, ...]
    pixel_aspect: Fraction
    height: int
    width: int

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    def seconds(self, pts: "Int | int") -> Float:
        """Seconds after the first frame: (T,) float64."""
        return np.asarray((np.asarray(pts) - self.pts[0]) * float(self.time_base), np.float64)


def read_contents(path: str | Path) -> Contents:
    """Read all packets of a video, decode its first frame.

    Raises UserVideoError for a file that is missing, no video, cut short, damaged in its first frame, turned by an
    angle other than a quarter, or without times.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise UserVideoError(f"{path}: no such file")
    try:
        with open_container(path) as container:
            stream = _video_stream(path, container)
            packets = _Packets()
            first = packets.read(container, stream)
            return _contents(path, stream, packets, first)
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        raise UserVideoError(
            f"{path}: damaged, it opens but does not read ({_reason(error)}); copy or download it again"
        ) from error


def open_container(path: Path) -> "av.container.InputContainer":
    """Open with PyAV. Raises UserVideoError where the file is no video container."""
    import av

    try:
        # The protocol list keeps files that refer to others from opening them; absolute, so that "a:b.mp4" is no URL.
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        return av.open(str(path.absolute()), options=options, metadata_errors="replace")
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        raise UserVideoError(
            f"{path}: not a video that can be opened ({_reason(error)}); give an mp4, mov, mkv or webm"
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _video_stream(path: Path, container: "av.container.InputContainer") -> "VideoStream":
    import av
    from av.video.stream import VideoStream

    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or av.stream.Disposition.attached_pic in stream.disposition:
        kinds = sorted({other.type for other in container.streams if other is not stream})
        picture = "only a cover picture, " if stream is not None else ""
        raise UserVideoError(f"{path}: no video stream ({picture}streams: {', '.join(kinds) or 'none'})")
    if stream.codec_context is None:
        raise UserVideoError(f"{path}: coded in a way that this FFmpeg cannot decode; re-encode it as H.264")
    stream.codec_context.thread_count = 1
    return stream


class _Packets:
    """Times of the packets that are shown, in the order they are stored."""

    def __init__(self) -> None:
        self.pts: list[int] = []
        self.durations: list[int] = []
        self.is_key: list[bool] = []
        self.num_hidden = self.num_untimed = 0

    def read(self, container: "av.container.InputContainer", stream: "VideoStream") -> "VideoFrame | None":
        """Read all packets; return the first frame that they give."""
        first: VideoFrame | None = None
        for packet in container.demux(stream):
            if first is None:  # decodes only until there is a frame
                first = next(iter(packet.decode()), None)
            if packet.size == 0:
                continue  # the end mark
            if packet.is_discard:
                self.num_hidden += 1
            elif packet.pts is None:
                self.num_untimed += 1
            else:
                self.pts.append(packet.pts)
                self.durations.append(packet.duration or 0)
                self.is_key.append(packet.is_keyframe)
        return first

    def __len__(self) -> int:
        return len(self.pts) + self.num_hidden + self.num_untimed


def _contents(path: Path, stream: "VideoStream", packets: _Packets, first: "VideoFrame | None") -> Contents:
    _check_packets(path, stream, packets)
    if first is None:
        raise UserVideoError(f"{path}: none of its {len(packets)} frames decodes, the stream is damaged")
    order = np.argsort(packets.pts, kind="stable")
    pts, is_key = np.asarray(packets.pts, np.int64)[order], np.asarray(packets.is_key)[order]
    last_duration = packets.durations[order[-1]]
    is_key[0] = True  # after an edit, the key frame that the first frame needs is not shown
    time_base = stream.time_base or Fraction(1, 1000)
    fps = _fps(path, stream, pts, time_base)
    turn = read_turn(path, stream, first)
    pixel_aspect = read_pixel_aspect(path, stream)
    height, width = shown_hw(path, first, turn, pixel_aspect)
    return Contents(
        path=path,
        stream_index=stream.index,
        codec=stream.codec_context.name,
        pixel_format=first.format.name,
        fps=fps,
        time_base=time_base,
        pts=pts,
        end_pts=int(pts[-1]) + (last_duration or round(1 / (fps * time_base))),
        key_indices=np.flatnonzero(is_key),
        upright=UPRIGHT[turn],
        pixel_aspect=pixel_aspect,
        height=height,
        width=width,
    )


def _check_packets(path: Path, stream: "VideoStream", packets: _Packets) -> None:
    if len(packets) == 0:
        raise UserVideoError(f"{path}: the video has no frames")
    if stream.frames > len(packets):
        raise UserVideoError(
            f"{path}: its header announces {stream.frames} frames, {len(packets)} can be read: "
            "the file is cut short; copy or download it again"
        )
    if packets.num_untimed or not packets.pts or len(set(packets.pts)) < len(packets.pts):
        raise UserVideoError(
            f"{path}: not every frame has a time of its own, as in some AVI and MPEG files; "
            "re-encode it: ffmpeg -i IN -c:v libx264 -crf 12 OUT.mp4"
        )


def _fps(path: Path, stream: "VideoStream", pts: Int, time_base: Fraction) -> float:
    rate = stream.average_rate
    if rate is None and len(pts) > 1:
        rate = (len(pts) - 1) / (int(pts[-1] - pts[0]) * time_base)
    rate = rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise UserVideoError(f"{path}: a single frame without a duration; a video is needed")
    return float(rate)
