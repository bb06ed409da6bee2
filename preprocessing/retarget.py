"""Poses of one person carried over to another's proportions, size and place in the picture."""

from dataclasses import dataclass

import numpy as np

from preprocessing.retarget_hands import Hand, place_on_nearest_wrist
from preprocessing.skeleton import LIMBS
from preprocessing.types import WAN, Float, PoseMetas, PreprocessProfile

NECK, R_WRIST, L_WRIST = 1, 4, 7
R_HIP, R_ANKLE, L_HIP, L_ANKLE, L_TOE, R_TOE = 8, 10, 11, 13, 18, 19
_HEAD, _SHOULDERS = [0, 14, 15, 16, 17], [2, 5]
_MIN_SCORE = 0.4
_MIN_SCALE_SCORE = 0.5
_MAX_FOOT_PER_CALF = 0.5
# Rows of LIMBS: left and right that take the larger ratio, or the mean (eyes and ears); (foot, its calf).
_SAME_BY_MAX = ((0, 1), (2, 4), (3, 5), (6, 9), (7, 10), (8, 11), (17, 18))
_SAME_BY_MEAN = ((13, 15), (14, 16))
_FEET = ((18, 8), (17, 11))
_SHOULDER_LIMBS, _FOREARM_LIMBS = [0, 1], [3, 5]
_PARENTS, _CHILDREN = (np.array(ends) for ends in zip(*LIMBS))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Retargeting:
    """What turns a driving pose into the reference's: found once a clip by `fit_retargeting`.

    A driving point in pixels p, after its bones were multiplied by `length_ratios` (19,), in the order of
    skeleton.LIMBS, goes to (p - shift_xy) / scale, in pixels of the reference's canvas.
    """

    length_ratios: Float
    scale: float
    shift_xy: Float
    width: int
    height: int


def fit_retargeting(
    template: PoseMetas,
    reference: PoseMetas,
    *,
    edited_template: PoseMetas | None = None,
    edited_reference: PoseMetas | None = None,
    profile: PreprocessProfile = WAN,
) -> Retargeting:
    """Compare one frame of the driving person with the reference person, one frame each.

    The edited ones are the same two people redrawn in a standard pose, where bones are not foreshortened:
    given both, bone lengths come from them. `wan` measures a bone only where both ends score 0.4 in both
    pictures; the others take the ratio of their left or right twin, else the median ratio. A bone that points
    at the camera in the template comes out too long: fit on a frame that shows the person from the front, or
    on edited pictures. Formulae: Wan2.2 retarget_pose. Raises ValueError where one shows no person.
    """
    for name, metas in (("template", template), ("reference", reference)):
        if not (np.isfinite(metas.body[0]).all() and metas.body[0, NECK, 2] > 0):
            raise ValueError(f"the {name} shows no person: give a picture with one, head to hips at least")
    if (edited_template is None) != (edited_reference is None):
        raise ValueError("give both an edited template and an edited reference, or neither")
    scale, _ = _relative_height(template, reference)
    reference_wh = _scaled_wh(reference, scale, profile)
    if edited_template is None or edited_reference is None:
        ratios = _length_ratios(template, reference, reference_wh, profile)
    else:
        ratios = _edited_ratios(template, reference, edited_template, edited_reference, profile)
    rebuilt_xy = _rebuild(_pixels(template)[:1], ratios)[0]
    shift_xy = _shift(template, reference, rebuilt_xy, reference.body[0, :, :2] * reference_wh, profile)
    return Retargeting(
        length_ratios=ratios,
        scale=scale,
        shift_xy=shift_xy,
        width=reference.width,
        height=reference.height,
    )


def retarget(metas: PoseMetas, fit: Retargeting, *, profile: PreprocessProfile = WAN) -> Float:
    """Carry driving poses over: (T, 62, 3) float64 x, y in pixels of the reference's canvas, score.

    Body points are all given, hand points that score below 0.4 are NaN; `pose.hide_low_scores` makes of it
    what the dataset stores. Hands are scaled (like the shoulders in the original, the forearms in `wan`)
    and hung on the wrists.
    """
    source_xy = _pixels(metas)
    body_xy = (_rebuild(source_xy, fit.length_ratios) - fit.shift_xy) / fit.scale
    like_hands = _SHOULDER_LIMBS if profile.retarget_hand_size == "shoulders" else _FOREARM_LIMBS
    gain = float(fit.length_ratios[like_hands].max()) / fit.scale
    wh = np.array([metas.width, metas.height])
    left, right = (
        Hand(
            points=points.astype(np.float64) * [*wh, 1],
            wrist_xy=source_xy[:, wrist],
            moved_wrist_xy=body_xy[:, wrist],
            gain=gain,
            whole_pixels=profile.retarget_rounding == "whole_pixels",
        )
        for points, wrist in ((metas.left_hand, L_WRIST), (metas.right_hand, R_WRIST))
    )
    if profile.retarget_hands == "own_wrist":
        left_points, right_points = left.placed(left), right.placed(right)
    else:
        left_points, right_points = place_on_nearest_wrist(left, right, missing_xy=-wh)
    body = np.concatenate([body_xy, metas.body[..., 2:]], axis=2)
    return np.concatenate([body, left_points, right_points], axis=1)


def template_frame(metas: PoseMetas, *, profile: PreprocessProfile = WAN) -> int:
    """Choose the driving frame to fit on: the first, or (`wan`) the first that shows the most body points."""
    if profile.retarget_ratios == "all_points":
        return 0
    return int((metas.body[..., 2] >= _MIN_SCORE).sum(axis=1).argmax())


def _pixels(metas: PoseMetas) -> Float:
    return metas.body[..., :2].astype(np.float64) * [metas.width, metas.height]


def _relative_height(template: PoseMetas, reference: PoseMetas) -> tuple[float, bool]:
    """Return the template person's height over the reference's, and whether it had to be guessed.

    Measured from the nose to the ankles, else to the hips; without either, from the size of the pictures.
    """
    for low in ([R_ANKLE, L_ANKLE], [R_HIP, L_HIP]):
        people = template, reference
        if all((m.body[0, [0, *low], 2] > _MIN_SCALE_SCORE).all() for m in people):
            spans = [float(m.height * abs(m.body[0, low, 1].mean() - m.body[0, 0, 1])) for m in people]
            if min(spans) > 0:
                return spans[0] / spans[1], False
    areas = [m.width * m.height for m in (template, reference)]
    return float(np.sqrt(areas[0]) / np.sqrt(areas[1])), True


def _scaled_wh(reference: PoseMetas, scale: float, profile: PreprocessProfile) -> Float:
    """Return the reference's canvas in pixels of the template."""
    wh = np.array([reference.width, reference.height]) * scale
    return np.trunc(wh) if profile.retarget_rounding == "whole_pixels" else wh


def _length_ratios(
    template: PoseMetas, reference: PoseMetas, reference_wh: Float, profile: PreprocessProfile
) -> Float:
    """Return (19,) bone lengths of the reference over those of the template, made equal on both sides."""
    template_lengths = _lengths(_pixels(template)[0])
    reference_lengths = _lengths(reference.body[0, :, :2].astype(np.float64) * reference_wh)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = reference_lengths / template_lengths
    if profile.retarget_ratios == "visible_points":
        seen = (template.body[0, :, 2] >= _MIN_SCORE) & (reference.body[0, :, 2] >= _MIN_SCORE)
        measured = seen[_PARENTS] & seen[_CHILDREN] & np.isfinite(ratios) & (ratios > 0)
        ratios = np.where(measured, ratios, np.nan)
    return _symmetric(ratios)


def _symmetric(ratios: Float) -> Float:
    """Give twin bones one ratio; NaN takes its twin's, else the median of all, else 1."""
    result = ratios.copy()
    for pairs, combine in ((_SAME_BY_MAX, np.fmax.reduce), (_SAME_BY_MEAN, _mean_of_known)):
        for pair in pairs:
            result[list(pair)] = combine(ratios[list(pair)])
    known = result[~np.isnan(result)]
    return np.where(np.isnan(result), np.median(known) if len(known) else 1.0, result)


def _mean_of_known(values: Float) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _edited_ratios(
    template: PoseMetas,
    reference: PoseMetas,
    edited_template: PoseMetas,
    edited_reference: PoseMetas,
    profile: PreprocessProfile,
) -> Float:
    """Return bone length ratios of the edited pair, brought to the scale of the unedited one."""
    scale, guessed = _relative_height(edited_template, edited_reference)
    edited_wh = _scaled_wh(edited_reference, scale, profile)
    ratios = _length_ratios(edited_template, edited_reference, edited_wh, profile)
    if not guessed:
        return ratios
    return ratios * _width_ratio(reference, edited_reference) / _width_ratio(template, edited_template)


def _width_ratio(metas: PoseMetas, edited: PoseMetas) -> float:
    """Return the larger of two ratios original / edited: width of the head, distance of the shoulders."""
    heads = [float(np.ptp(m.body[0, _HEAD, 0])) for m in (metas, edited)]
    shoulders = [float(np.hypot(*np.diff(_pixels(m)[0, _SHOULDERS], axis=0)[0])) for m in (metas, edited)]
    return max(heads[0] / heads[1], shoulders[0] / shoulders[1])


def _lengths(points_xy: Float) -> Float:
    return np.hypot(*np.moveaxis(points_xy[..., _PARENTS, :] - points_xy[..., _CHILDREN, :], -1, 0))


def _rebuild(points_xy: Float, ratios: Float) -> Float:
    """Multiply bone lengths of (T, 20, 2) bodies, keeping the neck and every bone's direction.

    A foot becomes at most half as long as its calf.
    """
    offsets = points_xy[:, _CHILDREN] - points_xy[:, _PARENTS]
    lengths = np.linalg.norm(offsets, axis=2)
    new_lengths = lengths * ratios
    for foot, calf in _FEET:
        new_lengths[:, foot] = np.minimum(new_lengths[:, foot], _MAX_FOOT_PER_CALF * new_lengths[:, calf])
    gains = np.divide(new_lengths, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    result = points_xy.copy()
    for limb, (parent, child) in enumerate(LIMBS):
        result[:, child] = result[:, parent] + offsets[:, limb] * gains[:, limb, None]
    return result


def _shift(
    template: PoseMetas,
    reference: PoseMetas,
    rebuilt_xy: Float,
    reference_xy: Float,
    profile: PreprocessProfile,
) -> Float:
    """Return what to subtract from rebuilt points so that the two stand in the same place.

    With feet in both pictures: hips above each other, lowest foot on the same line. Otherwise neck on neck.
    """
    if not (_shows_feet(template) and _shows_feet(reference)):
        return np.asarray(rebuilt_xy[NECK] - reference_xy[NECK], np.float64)
    if profile.ground_contact == "source_ankle":
        source_y = max(rebuilt_xy[R_ANKLE, 1], rebuilt_xy[L_ANKLE, 1])
        ground_y = _ground(reference_xy, np.ones(20, bool))
    else:
        seen = (template.body[0, :, 2] >= _MIN_SCORE) & (reference.body[0, :, 2] >= _MIN_SCORE)
        source_y, ground_y = _ground(rebuilt_xy, seen), _ground(reference_xy, seen)
    hips = [R_HIP, L_HIP]
    shift_x = rebuilt_xy[hips, 0].mean() - reference_xy[hips, 0].mean()
    return np.array([shift_x, source_y - ground_y])


def _ground(points_xy: Float, seen: np.ndarray) -> float:
    """Return the y of the lower foot: the mean of ankle and toe, or the ankles where a toe is unseen."""
    both_toes = bool(seen[[R_TOE, L_TOE]].all())
    feet = [[R_ANKLE, R_TOE], [L_ANKLE, L_TOE]] if both_toes else [[R_ANKLE], [L_ANKLE]]
    return max(float(points_xy[foot, 1].mean()) for foot in feet)


def _shows_feet(metas: PoseMetas) -> bool:
    points = metas.body[0, [R_HIP, R_ANKLE, L_HIP, L_ANKLE]]
    return bool((points[:, 1] <= 1).all() and (points[:, 2] >= _MIN_SCORE).all())
