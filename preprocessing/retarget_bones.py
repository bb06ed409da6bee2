"""How long one person's bones are against another's."""

import numpy as np

from preprocessing.skeleton import LIMBS
from preprocessing.types import Float, PoseMetas, PreprocessProfile

MIN_SCORE = 0.4
_MIN_SCALE_SCORE = 0.5
_MAX_FOOT_PER_CALF = 0.5
_R_HIP, _R_ANKLE, _L_HIP, _L_ANKLE = 8, 10, 11, 13
_HEAD, _SHOULDERS = [0, 14, 15, 16, 17], [2, 5]
# Rows of LIMBS: left and right that take the larger ratio, or the mean (eyes and ears); (foot, its calf).
_SAME_BY_MAX = ((0, 1), (2, 4), (3, 5), (6, 9), (7, 10), (8, 11), (17, 18))
_SAME_BY_MEAN = ((13, 15), (14, 16))
_FEET = ((18, 8), (17, 11))
_TRUNK, _NECK = [6, 9], 12
_PARENTS, _CHILDREN = (np.array(ends) for ends in zip(*LIMBS))
# Shares of the trunk (neck to hip) below which a bone points at the camera: 0.6 of what people show who face it,
# and less than any that a walk or a jump seen from the front shows. Head and feet look short from everywhere.
_LEAST_SHARES = np.zeros(len(LIMBS))
_LEAST_SHARES[[0, 1]] = 0.2  # shoulders
_LEAST_SHARES[[2, 3, 4, 5]] = 0.25  # arms
_LEAST_SHARES[[7, 8, 10, 11]] = 0.35  # legs
_TRUNK_PER_NECK = 2.5


def pixels(metas: PoseMetas) -> Float:
    """Body points (T, 20, 2) in pixels."""
    return metas.body[..., :2].astype(np.float64) * [metas.width, metas.height]


def relative_height(template: PoseMetas, reference: PoseMetas) -> tuple[float, bool]:
    """Return the template person's height over the reference's, and whether it had to be guessed.

    Measured from the nose to the ankles, else to the hips; without either, from the size of the pictures.
    """
    for low in ([_R_ANKLE, _L_ANKLE], [_R_HIP, _L_HIP]):
        people = template, reference
        if all((m.body[0, [0, *low], 2] > _MIN_SCALE_SCORE).all() for m in people):
            spans = [float(m.height * abs(m.body[0, low, 1].mean() - m.body[0, 0, 1])) for m in people]
            if min(spans) > 0:
                return spans[0] / spans[1], False
    areas = [m.width * m.height for m in (template, reference)]
    return float(np.sqrt(areas[0]) / np.sqrt(areas[1])), True


def scaled_wh(reference: PoseMetas, scale: float, profile: PreprocessProfile) -> Float:
    """Return the reference's canvas in pixels of the template."""
    wh = np.array([reference.width, reference.height]) * scale
    return np.trunc(wh) if profile.retarget_rounding == "whole_pixels" else wh


def length_ratios(template: PoseMetas, reference: PoseMetas, *, scale: float, profile: PreprocessProfile) -> Float:
    """Return (19,) bone lengths of the reference over those of the template, equal on both sides.

    `wan` leaves out bones with an end that is not seen, and those that point at the camera, in either picture: they
    take the ratio of their left or right twin, else the median of all.
    """
    return _without_gaps(_symmetric(_measured_ratios(template, reference, scale, profile)))


def edited_length_ratios(
    template: PoseMetas,
    reference: PoseMetas,
    edited_template: PoseMetas,
    edited_reference: PoseMetas,
    *,
    scale: float,
    profile: PreprocessProfile,
) -> Float:
    """Return (19,) bone length ratios of the edited pair, at the scale of the unedited one.

    Where the edited heights cannot be compared, people are compared with their unedited selves by head or shoulders.
    `wan` takes bones that the edited pictures do not show from the unedited ones.
    """
    edited_scale, guessed = relative_height(edited_template, edited_reference)
    growth = 1.0
    if guessed:
        sizes = [_size_ratio(*pair, profile) for pair in ((reference, edited_reference), (template, edited_template))]
        growth = sizes[0] / sizes[1]
        if profile.retarget_ratios == "visible_points":
            edited_scale = scale  # the sizes of the pictures, which it was guessed from, say nothing of the people
    ratios = _symmetric(_measured_ratios(edited_template, edited_reference, edited_scale, profile)) * growth
    if profile.retarget_ratios == "visible_points":
        plain = _symmetric(_measured_ratios(template, reference, scale, profile))
        ratios = np.where(np.isnan(ratios), plain, ratios)
    return _without_gaps(ratios)


def rebuild(points_xy: Float, ratios: Float) -> Float:
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


def _measured_ratios(template: PoseMetas, reference: PoseMetas, scale: float, profile: PreprocessProfile) -> Float:
    """(19,) ratios; NaN (`wan`) where one of the pictures does not show the bone."""
    reference_xy = reference.body[0, :, :2].astype(np.float64) * scaled_wh(reference, scale, profile)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _lengths(reference_xy) / _lengths(pixels(template)[0])
    if profile.retarget_ratios == "all_points":
        return np.asarray(ratios)
    shown = _shown_bones(template) & _shown_bones(reference)
    return np.where(shown & np.isfinite(ratios) & (ratios > 0), ratios, np.nan)


def _shown_bones(metas: PoseMetas) -> np.ndarray:
    """Say for each of 19 bones of the first frame if both ends are seen and it does not point at the camera."""
    seen = metas.body[0, :, 2] >= MIN_SCORE
    shown = seen[_PARENTS] & seen[_CHILDREN]
    lengths = np.where(shown, _lengths(pixels(metas)[0]), 0.0)
    trunk = lengths[_TRUNK].max() or _TRUNK_PER_NECK * lengths[_NECK]
    return np.asarray(shown & (lengths >= _LEAST_SHARES * trunk))


def _symmetric(ratios: Float) -> Float:
    """Give twin bones one ratio; NaN takes its twin's."""
    result = ratios.copy()
    for pairs, combine in ((_SAME_BY_MAX, np.fmax.reduce), (_SAME_BY_MEAN, _mean_of_known)):
        for pair in pairs:
            result[list(pair)] = combine(ratios[list(pair)])
    return result


def _without_gaps(ratios: Float) -> Float:
    """NaN becomes the median of all, else 1."""
    known = ratios[~np.isnan(ratios)]
    return np.where(np.isnan(ratios), np.median(known) if len(known) else 1.0, ratios)


def _mean_of_known(values: Float) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _size_ratio(metas: PoseMetas, edited: PoseMetas, profile: PreprocessProfile) -> float:
    """Return the larger of two ratios original / edited: width of the head, distance of the shoulders.

    `wan` measures in pixels, so that the pictures may differ in size, and on points that both show; without any, the
    ratio is that of the pictures.
    """
    if profile.retarget_ratios == "all_points":
        heads = [float(np.ptp(m.body[0, _HEAD, 0])) for m in (metas, edited)]
        shoulders = [float(np.hypot(*np.diff(pixels(m)[0, _SHOULDERS], axis=0)[0])) for m in (metas, edited)]
        return max(heads[0] / heads[1], shoulders[0] / shoulders[1])
    seen = (metas.body[0, :, 2] >= MIN_SCORE) & (edited.body[0, :, 2] >= MIN_SCORE)
    ratios = []
    for points in (_HEAD, _SHOULDERS):
        both = [point for point in points if seen[point]]
        widths = [float(np.ptp(pixels(m)[0, both, 0])) if both else 0.0 for m in (metas, edited)]
        ratios += [widths[0] / widths[1]] if min(widths) > 0 else []
    return max(ratios) if ratios else float(np.sqrt(metas.width * metas.height / (edited.width * edited.height)))


def _lengths(points_xy: Float) -> Float:
    return np.hypot(*np.moveaxis(points_xy[..., _PARENTS, :] - points_xy[..., _CHILDREN, :], -1, 0))
