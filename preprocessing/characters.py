"""The characters of `--purpose drive`: their pictures and poses, and what carries driving people over to them."""

from dataclasses import dataclass

import numpy as np

from preprocessing.canvas import cover_resize, resize_by_area
from preprocessing.editing import StandardPoses
from preprocessing.inputs import Source
from preprocessing.pictures import Measure, load_picture
from preprocessing.pose import hide_low_scores, metas_from_keypoints, pose62
from preprocessing.rejection import Rejected
from preprocessing.retarget import Retargeting, fit_retargeting, retarget
from preprocessing.settings import Settings
from preprocessing.template import choose_template
from preprocessing.types import Float, Frames, PoseMetas, PreprocessProfile


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Character:
    """The picture that is driven, (H, W, 3) on its canvas; its pose where retargeting was asked for.

    edited: its pose in the picture that shows it in a standard pose, for two-step retargeting.
    """

    picture_rgb: Frames
    metas: PoseMetas | None = None
    edited: PoseMetas | None = None

    @property
    def hw(self) -> tuple[int, int]:
        return self.picture_rgb.shape[0], self.picture_rgb.shape[1]


class Characters:
    """The characters that a run's videos drive, one in memory at a time: manifests may name a new one in every row.

    measure: of pictures, where poses are retargeted; poses: where that takes two steps.
    Raises ValueError for pictures of the settings that are none, or show nobody although a pose is needed.
    """

    def __init__(self, settings: Settings, *, measure: Measure | None, poses: StandardPoses | None) -> None:
        self._settings, self._measure, self._poses = settings, measure, poses
        self._profile = settings.behaviour
        self._latest: tuple[tuple[str, str | None], Character] | None = None
        self._template = None
        if poses is not None and settings.edited_template is not None:
            self._template = poses.given(settings.edited_template)
        if settings.purpose == "drive" and settings.reference != "column" and not self._is_edited_by_row:
            self._character(settings.reference, settings.edited_reference)

    def of(self, source: Source) -> Character | None:
        """The character that a source drives; None for training clips.

        Raises Rejected where the source's row of the manifest does not name what is needed.
        """
        by_column = self._settings.reference == "column"
        if by_column and not source.reference:
            raise Rejected("no_reference", f"{source.path}: its row of the manifest names no reference")
        if self._settings.purpose != "drive":
            return None
        picture = str(source.reference) if by_column else self._settings.reference
        edited = source.edited_reference or self._settings.edited_reference
        self._check_edited(source, edited, "reference")
        self._check_edited(source, source.edited_template or self._settings.edited_template, "template")
        try:
            return self._character(picture, edited)
        except ValueError as error:
            raise Rejected("no_reference", f"{source.path}: {error}") from error

    def fit(
        self, source: Source, character: Character, keypoints: Float, frame_hw: tuple[int, int], picture_rgb: Frames
    ) -> Retargeting | None:
        """Fit a whole track to its character, so that its clips belong together; None without retargeting.

        keypoints: (T, 133, 3), of all its clips. picture_rgb: a frame (H, W, 3) that shows its person well.
        """
        if character.metas is None:
            return None
        metas = metas_from_keypoints(keypoints, frame_hw, profile=self._profile)
        frame = choose_template(metas, profile=self._profile)
        try:
            return fit_retargeting(
                metas[frame : frame + 1],
                character.metas,
                edited_template=self._edited_template(source, metas, picture_rgb),
                edited_reference=character.edited,
                profile=self._profile,
            )
        except ValueError as error:
            raise Rejected("no_retargeting", f"{source.path}: {error}") from error

    def _edited_template(self, source: Source, metas: PoseMetas, picture_rgb: Frames) -> PoseMetas | None:
        if self._poses is None:
            return None
        if source.edited_template is not None:
            return self._poses.given(source.edited_template)
        return self._template or self._poses.made(picture_rgb, metas)

    def _check_edited(self, source: Source, path: str | None, of: str) -> None:
        if path is None and self._poses is not None and not self._poses.can_edit:
            raise Rejected(
                "no_edited_picture",
                f"{source.path}: two-step retargeting needs an edited {of}: give --edited-{of}, a column edited_{of} "
                "in the manifest, or --flux to have it made",
            )

    @property
    def _is_edited_by_row(self) -> bool:
        """Say whether the reference's edited picture can only come with the videos."""
        return self._poses is not None and not self._poses.can_edit and self._settings.edited_reference is None

    def _character(self, path: str, edited_path: str | None) -> Character:
        if self._latest is None or self._latest[0] != (path, edited_path):
            self._latest = (path, edited_path), self._load(path, edited_path)
        return self._latest[1]

    def _load(self, path: str, edited_path: str | None) -> Character:
        settings = self._settings
        picture = resize_by_area(load_picture(path), settings.area, settings.divisor, profile=self._profile)
        if self._measure is None:
            return Character(picture_rgb=picture)
        metas = self._measure(picture)
        if metas is None:
            raise ValueError(f"reference {path}: no person found, which --retarget needs")
        if self._poses is None:
            return Character(picture_rgb=picture, metas=metas)
        edited = self._poses.given(edited_path) if edited_path else self._poses.made(picture, metas)
        return Character(picture_rgb=picture, metas=metas, edited=edited)


def reference_on_canvas(path: str, hw: tuple[int, int]) -> Frames:
    """Read a picture of the clip's own person and fill the clip's canvas with it."""
    return cover_resize(load_picture(path), height=hw[0], width=hw[1])


def driven_pose(
    keypoints: Float,
    frame_hw: tuple[int, int],
    character: Character,
    fit: Retargeting | None,
    *,
    profile: PreprocessProfile,
) -> Float:
    """Return the (T, 62, 3) points that are drawn on the character's canvas, from (T, 133, 3) in driving frames."""
    if fit is not None:
        metas = metas_from_keypoints(keypoints, frame_hw, profile=profile)
        return hide_low_scores(retarget(metas, fit, profile=profile))
    # Without retargeting the driving picture is fitted onto the canvas, as the original pads its drawing.
    canvas, points = character.hw, pose62(keypoints, frame_hw, profile=profile).copy()
    scale = min(canvas[0] / frame_hw[0], canvas[1] / frame_hw[1])
    points[..., 0] = points[..., 0] * scale + (canvas[1] - frame_hw[1] * scale) / 2
    points[..., 1] = points[..., 1] * scale + (canvas[0] - frame_hw[0] * scale) / 2
    return np.asarray(points)
