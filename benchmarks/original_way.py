"""The way of Wan2.2's own preprocessing in replacement mode, as the peer that ours is measured against.

Frame by frame, batch 1, one stage after the other, the whole video in memory: decode all frames, resize each, detect,
measure, cut faces out, draw, segment, grow masks, black out the background, write four videos with x264. The demo's
segmenter stands in for SAM2. Written from a description of what the original does; the arithmetic is this package's,
with the profile `upstream`, which is faster than the original's own loops over key points.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from stage_times import Stopwatch

from preprocessing.canvas import resize_by_area
from preprocessing.detection import decode_people, detector_input, select_person
from preprocessing.face import crop_faces, face_boxes
from preprocessing.heatmaps import modulate
from preprocessing.masks import blacken, block_augment, dilate
from preprocessing.pose import crops_of_boxes, metas_from_keypoints, pose62_from_metas, pose_input
from preprocessing.sampling import sample_indices
from preprocessing.settings import ModelFiles
from preprocessing.types import PROFILES, Float, Frames
from wan_accel.data.skeleton import draw_pose

UPSTREAM = PROFILES["upstream"]
KERNEL_PIXELS, ITERATIONS = 7, 3
SEGMENTER_MARGIN = 1.15  # demo/README.md
FPS = 30


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """What the original measures of T frames, before it grows masks and writes videos."""

    boxes: Float  # (T, 5)
    keypoints: Float  # (T, 133, 3)
    face_boxes: np.ndarray  # (T, 4)
    masks: np.ndarray  # (T, H, W) bool


class OriginalWay:
    """Networks opened once; `__call__` works on one video."""

    def __init__(self, models: ModelFiles, watch: Stopwatch, *, area: int, provider: str, num_threads: int) -> None:
        self.watch, self.area, self.num_threads = watch, area, num_threads
        files = (models.detector, models.pose, models.segmenter)
        self.detector, self.pose, self.segmenter = (self._open(file, provider) for file in files)

    def _open(self, path: Path, provider: str) -> Callable[[Float], Float]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        chosen = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
        session = self.watch.network(lambda: onnxruntime.InferenceSession(str(path), options, providers=[chosen]))
        name = session.get_inputs()[0].name
        return lambda batch: np.asarray(session.run(None, {name: batch})[0])

    def __call__(self, video: Path, reference: Path, folder: Path) -> Measured:
        """Preprocess one video into a folder of src_*.mp4."""
        stage = self.watch.stage
        with stage("decode all frames (decord)"):
            frames = _decoded(video)
        with stage("resize"):
            frames = [resize_by_area(frame, self.area, 16, profile=UPSTREAM) for frame in frames]
        boxes = np.stack([self._detect(frame) for frame in frames])
        keypoints = np.stack([self._measure(frame, box) for frame, box in zip(frames, boxes)])
        stacked, hw = np.stack(frames), (frames[0].shape[0], frames[0].shape[1])
        with stage("key points to metas"):
            metas = metas_from_keypoints(keypoints, hw, profile=UPSTREAM)
        with stage("face boxes and crops"):
            faces_xyxy = face_boxes(metas, profile=UPSTREAM)
            assert faces_xyxy is not None
            faces = crop_faces(stacked, faces_xyxy)
        with stage("draw poses"):
            drawings = [draw_pose(pose, hw) for pose in pose62_from_metas(metas)]
        masks = [self._segment(frame, box) for frame, box in zip(frames, boxes)]
        with stage("grow masks, background"):
            grown = [_grow(mask) for mask in masks]
            background = [blacken(frame[None], mask[None])[0] for frame, mask in zip(frames, grown)]
            shown = [np.repeat(mask[..., None] * np.uint8(255), 3, axis=2) for mask in grown]
        with stage("write 4 mp4 (x264 medium)"):
            for name, pictures in (("face", faces), ("pose", drawings), ("bg", background), ("mask", shown)):
                self._write(folder / f"src_{name}.mp4", pictures)
            shutil.copyfile(reference, folder / "src_ref.png")
        return Measured(boxes=boxes, keypoints=keypoints, face_boxes=faces_xyxy, masks=np.stack(masks))

    def _detect(self, frame: Frames) -> Float:
        hw = (frame.shape[0], frame.shape[1])
        with self.watch.stage("detector: input"):
            batch = detector_input(frame[None])
        rows = self.detector(batch)
        with self.watch.stage("detector: boxes, NMS, choice"):
            return select_person(decode_people(rows[0], hw), hw)

    def _measure(self, frame: Frames, box: Float) -> Float:
        with self.watch.stage("pose: crop and input"):
            crops = crops_of_boxes(box[None], (frame.shape[0], frame.shape[1]))
            batch = pose_input(frame[None], crops, profile=UPSTREAM)
        heatmaps = self.pose(batch)
        with self.watch.stage("pose: heat maps"):
            return _decoded_heatmaps(heatmaps[0], crops.center_xy[0], crops.size_wh[0])

    def _segment(self, frame: Frames, box: Float) -> np.ndarray:
        with self.watch.stage("segmenter: input, mask"):
            side = max(float((box[2:4] - box[:2]).max()) * SEGMENTER_MARGIN, 1.0)
            gain = 256 / side
            offset = (0.5 - (box[:2] + box[2:4] - side) / 2) * gain - 0.5
            to_crop = np.array([[gain, 0, offset[0]], [0, gain, offset[1]]])
            batch = cv2.warpAffine(frame, to_crop, (256, 256), flags=cv2.INTER_LINEAR) / np.float32(255)
        probability = self.segmenter(batch[None])[0, ..., 0]
        with self.watch.stage("segmenter: input, mask"):
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            return np.asarray(cv2.warpAffine(probability, to_crop, frame.shape[1::-1], flags=flags)) > 0.5

    def _write(self, path: Path, pictures: Iterable[Frames]) -> None:
        """As moviepy does: raw pictures through a pipe to ffmpeg."""
        from imageio_ffmpeg import get_ffmpeg_exe

        first = next(iter(pictures))
        command: list[Any] = [get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{first.shape[1]}x{first.shape[0]}", "-r", f"{FPS:.2f}", "-i", "-", "-an"]
        command += ["-c:v", "libx264", "-preset", "medium", "-threads", str(self.num_threads), "-pix_fmt", "yuv420p"]
        with subprocess.Popen([*command, str(path)], stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            for picture in pictures:
                process.stdin.write(picture.tobytes())
        if process.returncode:
            raise RuntimeError(f"ffmpeg ended with {process.returncode} for {path}")


def _decoded(video: Path) -> list[Frames]:
    """All frames at once, by the original's indices."""
    import decord

    reader = decord.VideoReader(str(video), num_threads=1)  # more fail on some files: demo/README.md
    end, rate = reader.get_frame_timestamp(len(reader) - 1)[-1], reader.get_avg_fps()
    indices = sample_indices(len(reader), video_fps=rate, target_fps=FPS, duration_seconds=float(end))
    return list(reader.get_batch(indices.tolist()).asnumpy())


def _decoded_heatmaps(maps: Float, center_xy: Float, size_wh: Float) -> Float:
    """Blur every map, then one Newton step on the logarithm of each: (133, h, w) -> (133, 3)."""
    _, height, width = maps.shape
    log = np.log(np.maximum(modulate(maps), 1e-10)).astype(np.float64)
    result = np.empty((len(maps), 3), np.float32)
    for point, (raw, values) in enumerate(zip(maps, log)):
        y, x = np.unravel_index(raw.argmax(), raw.shape)
        score, peak = raw[y, x], np.array([x, y], np.float64)
        if score <= 0:
            peak[:] = -1
        elif 1 < x < width - 2 and 1 < y < height - 2:
            peak += _newton_step(values[y - 2 : y + 3, x - 2 : x + 3])
        result[point] = *(peak * (size_wh / (width, height)) + center_xy - size_wh / 2), score
    return result


def _newton_step(v: Float) -> Float:
    gradient = 0.5 * np.array([v[2, 3] - v[2, 1], v[3, 2] - v[1, 2]])
    hxx, hyy = 0.25 * (v[2, 4] - 2 * v[2, 2] + v[2, 0]), 0.25 * (v[4, 2] - 2 * v[2, 2] + v[0, 2])
    hxy = 0.25 * (v[3, 3] - v[1, 3] - v[3, 1] + v[1, 1])
    hessian = np.array([[hxx, hxy], [hxy, hyy]])
    return -np.linalg.solve(hessian, gradient) if hxx * hyy != hxy**2 else np.zeros(2)


def _grow(mask: np.ndarray) -> np.ndarray:
    grown = dilate(mask[None], kernel_pixels=KERNEL_PIXELS, iterations=ITERATIONS)[0]
    return block_augment(grown, num_columns=1, num_rows=1)
