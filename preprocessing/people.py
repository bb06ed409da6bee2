"""The networks that find, measure and cut out people, opened once for a run."""

from preprocessing.detection import select_person
from preprocessing.networks import open_detector, open_pose
from preprocessing.onnx_model import NetworkOptions
from preprocessing.pose import metas_from_keypoints
from preprocessing.segmentation import open_segmenter
from preprocessing.settings import ModelFiles, Runtime, Settings
from preprocessing.types import Frames, PoseMetas


class PeopleNetworks:
    """Detector, pose network and segmenter of a run.

    Raises ValueError for a file that is missing or of another kind, or a provider that is not there.
    """

    def __init__(self, settings: Settings, models: ModelFiles | None, runtime: Runtime) -> None:
        if models is None:
            raise ValueError("finding people needs --detector, --pose and --segmenter, or --models with all three")
        models.check()
        self.settings = settings
        self.profile = settings.behaviour
        options: NetworkOptions = {
            "provider": runtime.provider, "device_id": runtime.device_id, "num_threads": runtime.num_threads,
            "batch_frames": runtime.network_batch, "fp16": settings.fp16,
        }  # fmt: skip
        self.detector = open_detector(models.detector, **options)
        self.pose = open_pose(models.pose, profile=self.profile, **options)
        self.segmenter = open_segmenter(
            settings.segmenter,
            models.segmenter,
            device=runtime.torch_device,
            profile=self.profile,
            **options,
        )

    def measure_picture(self, picture_rgb: Frames) -> PoseMetas | None:
        """Measure the main person of one picture (H, W, 3); None where there is nobody."""
        hw = (picture_rgb.shape[0], picture_rgb.shape[1])
        box = select_person(self.detector.people(picture_rgb[None])[0], hw)
        if box[4] < 0:
            return None
        return metas_from_keypoints(self.pose(picture_rgb[None], box[None]).keypoints, hw, profile=self.profile)
