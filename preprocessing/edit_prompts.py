"""Prompts that ask an image editor for a person in a standard pose, in which bones can be measured."""

from preprocessing.types import WAN, Float, PoseMetas, PreprocessProfile

_ARMS, _LEGS = [3, 4, 6, 7], [9, 10, 12, 13]
_MIN_SCORE = 0.75
_POSES = {
    "landscape": "Change the person to a standard T-pose (facing forward with arms extended).",
    "portrait": (
        "Change the person to a standard pose with the face oriented forward and arms extending straight "
        "down by the sides."
    ),
}


def edit_prompt(metas: PoseMetas, canvas_hw: tuple[int, int], *, profile: PreprocessProfile = WAN) -> str:
    """Write the prompt for a picture of size `canvas_hw` of the person in `metas` (any number of frames).

    The prompt asks for what at least one frame shows: arms, or arms and legs. Wording and rule are those that
    Wan2.2-Animate gives to FLUX.1-Kontext; `upstream` takes points beyond the left and upper edge for shown, too.
    """
    has_legs = _shows(metas.body[:, _LEGS], profile)
    if not (has_legs or _shows(metas.body[:, _ARMS], profile)):
        return "Change the person to face forward."
    pose = _POSES["landscape" if canvas_hw[1] > canvas_hw[0] else "portrait"]
    if has_legs:
        return f"{pose} The person is standing. Feet and Hands are visible in the image."
    return f"{pose} Hands are visible in the image."


def _shows(points: Float, profile: PreprocessProfile) -> bool:
    """Say whether any point of (T, N, 3) is measured, in the picture, and sure."""
    sure = (points != 0).all(axis=2) & (points[..., :2] <= 1).all(axis=2) & (points[..., 2] >= _MIN_SCORE)
    if profile.retarget_ratios == "visible_points":
        sure &= (points[..., :2] >= 0).all(axis=2)
    return bool(sure.any())
