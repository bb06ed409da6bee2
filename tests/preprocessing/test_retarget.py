import numpy as np
import pytest

from preprocessing.retarget import fit_retargeting, retarget
from preprocessing.skeleton import LIMBS
from preprocessing.types import PROFILES, PoseMetas
from wan_accel.data.skeleton import LEFT_HAND, RIGHT_HAND

UPSTREAM = PROFILES["upstream"]
WIDTH = HEIGHT = 400
# A standing person: nose, neck, arms, legs, eyes, ears, toes; the right side is left in the picture.
BODY_XY = np.array(
    [[200, 60], [200, 90], [170, 90], [160, 140], [155, 190], [230, 90], [240, 140], [245, 190]]
    + [[185, 190], [183, 260], [182, 330], [215, 190], [217, 260], [218, 330]]
    + [[194, 54], [206, 54], [186, 58], [214, 58], [228, 340], [172, 340]],
    float,
)  # fmt: skip
HAND_XY = np.stack([np.zeros(21), np.arange(21)], axis=1)  # down from the wrist


def person(body_xy=BODY_XY, *, scores=0.9, num_frames=1, hand_score=0.9, hand_offset=(0, 0)):
    """Metas of `num_frames` equal frames, hands hanging from the wrists."""

    def points(xy, score):
        one = np.concatenate([xy / [WIDTH, HEIGHT], np.broadcast_to(score, len(xy))[:, None]], axis=1)
        return np.repeat(one[None], num_frames, axis=0)

    return PoseMetas(
        body=points(body_xy, scores),
        left_hand=points(body_xy[7] + HAND_XY + hand_offset, hand_score),
        right_hand=points(body_xy[4] + HAND_XY + hand_offset, hand_score),
        face=np.zeros((num_frames, 69, 3)),
        width=WIDTH,
        height=HEIGHT,
    )


def lengths(xy):
    return np.array([np.linalg.norm(xy[a] - xy[b]) for a, b in LIMBS])


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_person_retargeted_to_itself_stays(profile):
    metas = person(num_frames=2)
    fit = fit_retargeting(metas[:1], metas[:1], profile=profile)
    pose = retarget(metas, fit, profile=profile)
    np.testing.assert_allclose(fit.length_ratios, 1, atol=1e-9)
    # The original puts the ankles where the mean of ankle and toe was.
    sinks = 5 if profile is UPSTREAM else 0
    np.testing.assert_allclose(pose[:, :20, :2] - BODY_XY, [[[0, sinks]] * 20] * 2, atol=1e-6)


def test_bones_take_the_reference_lengths_and_keep_their_direction():
    taller = BODY_XY.copy()
    taller[[3, 4, 6, 7]] += (BODY_XY[[3, 4, 6, 7]] - BODY_XY[[2, 2, 5, 5]]) * 0.5  # arms half as long again
    fit = fit_retargeting(person(), person(taller))
    pose = retarget(person(), fit)[0, :20, :2]
    np.testing.assert_allclose(lengths(pose), lengths(taller), atol=1e-6)
    np.testing.assert_allclose(pose, taller, atol=1e-6)


def test_size_and_place_come_from_the_reference():
    smaller = (BODY_XY - [200, 340]) * 0.5 + [100, 300]
    pose = retarget(person(), fit_retargeting(person(), person(smaller)))
    np.testing.assert_allclose(pose[0, :20, :2], smaller, atol=1e-6)


def test_each_hand_hangs_on_its_own_wrist():
    crossed = BODY_XY.copy()
    crossed[[4, 7]] = crossed[[7, 4]]
    metas = person(crossed)
    swapped_hands = PoseMetas(
        body=metas.body,
        left_hand=metas.right_hand,
        right_hand=metas.left_hand,
        face=metas.face,
        width=WIDTH,
        height=HEIGHT,
    )
    reference = person((BODY_XY - [200, 340]) * 0.8 + [220, 330])
    pose = retarget(swapped_hands, fit_retargeting(person(), reference))[0]
    np.testing.assert_allclose(pose[LEFT_HAND.start, :2], pose[7, :2], atol=1e-6)
    np.testing.assert_allclose(pose[RIGHT_HAND.start, :2], pose[4, :2], atol=1e-6)
    original = retarget(swapped_hands, fit_retargeting(person(), reference, profile=UPSTREAM), profile=UPSTREAM)[0]
    assert np.abs(original[LEFT_HAND.start, :2] - original[7, :2]).max() > 10


def test_a_hand_scales_with_the_forearm():
    longer = BODY_XY.copy()
    longer[[4, 7]] += BODY_XY[[4, 7]] - BODY_XY[[3, 6]]  # forearms twice as long
    pose = retarget(person(), fit_retargeting(person(), person(longer)))[0]
    span = np.ptp(pose[LEFT_HAND, 1])
    assert span == pytest.approx(2 * 20)


def test_hand_points_that_are_unsure_are_absent():
    pose = retarget(person(hand_score=0.3), fit_retargeting(person(), person()))
    assert np.isnan(pose[0, 20:, :2]).all()
    assert np.isfinite(pose[0, :20]).all()


def test_points_that_are_not_seen_do_not_spoil_the_ratios():
    scores = np.full(20, 0.9)
    scores[[4, 10, 13, 18, 19]] = 0.1  # right wrist, both legs below the knee
    guessed = BODY_XY.copy()
    guessed[[4, 10, 13, 18, 19]] += 500
    fit = fit_retargeting(person(), person(guessed, scores=scores))
    np.testing.assert_allclose(fit.length_ratios, 1, atol=0.01)  # from the twin, or the median
    original = fit_retargeting(person(), person(guessed, scores=scores), profile=UPSTREAM)
    assert original.length_ratios.max() > 5


def test_half_bodies_are_placed_by_the_neck():
    scores = np.full(20, 0.9)
    scores[[10, 13]] = 0.1
    moved = BODY_XY + [30, 20]
    pose = retarget(person(), fit_retargeting(person(), person(moved, scores=scores)))
    np.testing.assert_allclose(pose[0, 1, :2], moved[1], atol=1e-6)


def test_the_lower_foot_stands_on_the_reference_ground():
    lifted = BODY_XY.copy()
    lifted[[10, 19]] -= [0, 40]  # the right foot is in the air
    reference = person(BODY_XY + [0, 15])
    pose = retarget(person(lifted), fit_retargeting(person(lifted), reference))[0]
    assert pose[[13, 18], 1].mean() == pytest.approx(335 + 15)


def with_shoulders_at(half_width):
    """A person whose shoulders look `half_width` pixels wide on each side, arms hanging from them."""
    body_xy = BODY_XY.copy()
    body_xy[[2, 5], 0] = 200 - half_width, 200 + half_width
    body_xy[[3, 4, 6, 7]] += body_xy[[2, 2, 5, 5]] - BODY_XY[[2, 2, 5, 5]]
    return body_xy


def test_bones_that_point_at_the_camera_are_not_measured():
    profile_view = person(with_shoulders_at(5))  # 6 times narrower than from the front
    np.testing.assert_allclose(fit_retargeting(profile_view, person()).length_ratios[:2], 1, atol=1e-6)
    np.testing.assert_allclose(fit_retargeting(person(), profile_view).length_ratios[:2], 1, atol=1e-6)
    original = fit_retargeting(profile_view, person(), profile=UPSTREAM)
    assert original.length_ratios[:2].max() == pytest.approx(6)


def test_edited_pictures_give_the_bone_lengths():
    turned = person(with_shoulders_at(24))  # narrower, still measurable
    plain = fit_retargeting(turned, person())
    edited = fit_retargeting(turned, person(), edited_template=person(), edited_reference=person())
    assert plain.length_ratios[:2].max() == pytest.approx(30 / 24)
    np.testing.assert_allclose(edited.length_ratios, 1, atol=1e-6)


def test_bones_that_the_edited_pictures_lack_come_from_the_unedited_ones():
    longer_shins = BODY_XY.copy()
    longer_shins[[10, 13, 18, 19]] += [0, 14]
    scores = np.full(20, 0.9)
    scores[[9, 10, 12, 13, 18, 19]] = 0.1  # the editor cut the legs off
    cut_off = person(scores=scores)
    fit = fit_retargeting(person(), person(longer_shins), edited_template=cut_off, edited_reference=cut_off)
    assert fit.length_ratios[8] == pytest.approx(84 / 70 * fit.length_ratios[7], rel=1e-3)  # shin against thigh
    np.testing.assert_allclose(fit.length_ratios[:6], fit.length_ratios[0], atol=1e-6)


def test_edited_pictures_without_a_person_are_an_error():
    nobody = person(np.full((20, 2), np.nan), scores=0)
    with pytest.raises(ValueError, match="the edited reference shows no person"):
        fit_retargeting(person(), person(), edited_template=person(), edited_reference=nobody)


def test_edited_pictures_come_in_pairs():
    with pytest.raises(ValueError, match="both an edited template and an edited reference, or neither"):
        fit_retargeting(person(), person(), edited_template=person())


def test_a_reference_without_a_person_is_an_error():
    nobody = person(np.full((20, 2), np.nan), scores=0)
    with pytest.raises(ValueError, match="the reference shows no person"):
        fit_retargeting(person(), nobody)
    with pytest.raises(ValueError, match="the template shows no person"):
        fit_retargeting(nobody, person())


def test_frames_without_a_person_stay_absent():
    metas = person(num_frames=2)
    metas.body[1] = np.nan
    metas.body[1, :, 2] = 0
    pose = retarget(metas, fit_retargeting(metas[:1], metas[:1]))
    assert np.isnan(pose[1, :20, :2]).all()
    assert np.isfinite(pose[0]).all()
