"""Frames of a video by their index, decoded in order with PyAV, a few at a time.

decord, which Wan2.2's preprocessing uses, gives the same pixels (the tests compare them): both use FFmpeg's decoders
and scale filter. It is not used here because decord2 3.4
* decodes ahead without limit while its caller is busy: a video of 3,600 frames at 480x832 grew by 450 MB a second;
* counts frames that an edit list hides (`ffmpeg -ss ... -c copy` writes such files): it shifts all others, and
  repeats the last one to make up for them;
* loses the end of MPEG-TS, lands on other frames when it seeks in AVI and MPEG-PS;
* takes the padding of rows for a fourth channel at some widths below 192 pixels;
* aborts the process where a header announces more frames than memory holds.
"""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, cast

from preprocessing.container import Contents, open_container
from preprocessing.types import Frames, Int
from preprocessing.video_error import UserVideoError

if TYPE_CHECKING:
    import av
    from av.video.frame import VideoFrame

_MIN_SEEK_FRAMES = 64  # a seek costs about as much as decoding some tens of frames


def read_frames(contents: Contents, indices: Int) -> Generator[Frames, None, None]:
    """Yield frames `indices` (rising, repeats allowed), each (H, W, 3) RGB uint8, upright and with square pixels.

    Reads straight through, and seeks where a gap skips a key frame far ahead. A frame is found by its time, so that
    a frame that does not decode cannot shift the others. Closing the generator closes the file.
    Raises UserVideoError where a frame does not decode.
    """
    import av

    index = 0
    try:
        with open_container(contents.path) as container:
            reader = _Reader(contents, container)
            for index in indices.tolist():
                yield reader.frame(index)
    except (av.FFmpegError, OSError, OverflowError, MemoryError) as error:
        raise _damaged(contents, index) from error


def _damaged(contents: Contents, index: int) -> UserVideoError:
    return UserVideoError(
        f"{contents.path}: frame {index} of {contents.num_frames} does not decode, the stream is damaged; "
        "copy or download the file again, or re-encode it with ffmpeg"
    )


class _Reader:
    """An open file, and the frame that it stands at."""

    def __init__(self, contents: Contents, container: "av.container.InputContainer") -> None:
        self.contents, self.container = contents, container
        self.stream = container.streams[contents.stream_index]
        self.stream.codec_context.thread_count = 1
        self.decoded = container.decode(self.stream)
        self.convert = _Converter(contents, self.stream.time_base)
        self.position = -1
        self.shown: Frames | None = None

    def frame(self, index: int) -> Frames:
        """Decode frame `index`, not before the one asked for last."""
        if self.shown is None or index > self.position:
            self.shown = self.convert(self._find(index))
            self.position = index
        return self.shown

    def _find(self, index: int) -> "VideoFrame":
        found = None
        key = int(self.contents.key_indices[self.contents.key_indices.searchsorted(index, side="right") - 1])
        if key - self.position > _MIN_SEEK_FRAMES:
            found = self._seek(key, index)
            if found is None:  # the key frame lies elsewhere in the file than its time says
                found = self._seek(0, index)
        else:
            found = self._decode_up_to(index)
        if found is None:
            raise _damaged(self.contents, index)
        return found

    def _seek(self, key: int, index: int) -> "VideoFrame | None":
        self.container.seek(int(self.contents.pts[key]), stream=self.stream)
        self.decoded = self.container.decode(self.stream)
        return self._decode_up_to(index)

    def _decode_up_to(self, index: int) -> "VideoFrame | None":
        """The frame of that time; None where the next one is later or there is none."""
        pts = int(self.contents.pts[index])
        for frame in cast("Iterator[VideoFrame]", self.decoded):
            if frame.pts is not None and frame.pts >= pts:
                return frame if frame.pts == pts else None
        return None


class _Converter:
    """A decoded frame turned upright, scaled to square pixels, and in RGB."""

    def __init__(self, contents: Contents, time_base: Any) -> None:
        self.contents, self.time_base = contents, time_base
        self.graph: Any = None
        self.graph_input: tuple[int, int, str] | None = None

    def __call__(self, frame: "VideoFrame") -> Frames:
        described = (frame.width, frame.height, frame.format.name)
        if described != self.graph_input:  # a stream may change its picture's size half way; all get that of the first
            self.graph, self.graph_input = self._graph(frame), described
        self.graph.push(frame)
        shown: Frames = self.graph.pull().to_ndarray()
        return shown

    def _graph(self, frame: "VideoFrame") -> Any:
        from av.filter import Graph

        graph = Graph()
        graph.threads = 1
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self.time_base
        )
        wanted = (*self.contents.upright, f"scale={self.contents.width}:{self.contents.height}", "format=rgb24")
        for described in wanted:
            name, _, arguments = described.partition("=")
            node = graph.add(name, arguments)
            last.link_to(node)
            last = node
        last.link_to(graph.add("buffersink"))
        graph.configure()
        return graph
