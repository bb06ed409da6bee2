import re

import numpy as np
import pytest
from preprocess_goldens import UPSTREAM, arrays, names, picture, reference_metas, source_metas

from preprocessing.pose import hide_low_scores
from preprocessing.retarget import fit_retargeting, retarget
from preprocessing.skeleton import LIMBS, draw_pose
from wan_accel.data.skeleton import BODY, LEFT_HAND, RIGHT_HAND

PREFIX = "11_retarget_"
RECORDED = [name.removeprefix(PREFIX).removesuffix(".npz") for name in names(f"{PREFIX}*.npz")]
CASES = [name for name in RECORDED if not name.endswith("_intermediates")]
INTERMEDIATES = [name for name in RECORDED if name.endswith("_intermediates")]
DRAWINGS = names(f"{PREFIX}*.png")


def retargeted(case):
    golden = arrays(f"{PREFIX}{case}")
    source, reference = source_metas(golden["src_kps"]), reference_metas(golden["ref_kps"])
    edited = {}
    if golden["tpl_edit_kps"].size:
        edited = {
            "edited_template": source_metas(golden["tpl_edit_kps"]),
            "edited_reference": reference_metas(golden["ref_edit_kps"]),
        }
    fit = fit_retargeting(source[:1], reference, profile=UPSTREAM, **edited)
    return fit, retarget(source, fit, profile=UPSTREAM)


@pytest.mark.parametrize("case", CASES)
def test_retargeted_poses_match_the_original(case):
    golden = arrays(f"{PREFIX}{case}")
    fit, pose = retargeted(case)
    assert ((golden["width"] == fit.width) & (golden["height"] == fit.height)).all()
    np.testing.assert_allclose(pose[:, BODY, :2], golden["kps_body"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(pose[:, BODY, 2], golden["kps_body_p"], rtol=0, atol=1e-6)
    # The original's names are swapped: its "lhand" is the right hand.
    for name, rows in (("kps_lhand", RIGHT_HAND), ("kps_rhand", LEFT_HAND)):
        np.testing.assert_array_equal(pose[:, rows, :2], golden[name])
        given = ~np.isnan(golden[name][..., 0])
        np.testing.assert_allclose(pose[:, rows, 2][given], golden[f"{name}_p"][given], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", DRAWINGS)
def test_drawings_of_retargeted_poses_match_the_original(path):
    case, frame = re.fullmatch(rf"{PREFIX}(.+)_f(\d+)_.*\.png", path).groups()
    expected = picture(path)
    _, pose = retargeted(case)
    np.testing.assert_array_equal(draw_pose(hide_low_scores(pose)[int(frame)], expected.shape[:2]), expected)


@pytest.mark.parametrize("name", INTERMEDIATES)
def test_intermediate_numbers_match_the_original(name):
    golden, case = arrays(f"{PREFIX}{name}"), name.removesuffix("_intermediates")
    fit, _ = retargeted(case)
    np.testing.assert_array_equal(np.array(LIMBS) + 1, golden["limbSeq_1based"])
    assert fit.scale == pytest.approx(float(golden["scale_min"]), abs=1e-6)
    np.testing.assert_allclose(fit.length_ratios, golden["ratio_final"], rtol=1e-6)
    scaled_wh = [int(fit.width * fit.scale), int(fit.height * fit.scale)]
    np.testing.assert_array_equal(scaled_wh, golden["dst_scaled_wh"])
    people = source_metas(arrays(f"{PREFIX}{case}")["src_kps"]), reference_metas(arrays(f"{PREFIX}{case}")["ref_kps"])
    source, reference = (
        limb_lengths(metas.body[0, :, :2] * wh)
        for metas, wh in zip(people, (arrays("01_inputs")["src_wh"], golden["dst_scaled_wh"]))
    )
    np.testing.assert_allclose(source, golden["src_len"], atol=1e-3)
    np.testing.assert_allclose(reference, golden["dst_len"], atol=1e-3)
    np.testing.assert_allclose(reference / source, golden["ratio_raw"], rtol=1e-4)


def limb_lengths(body_xy):
    return np.linalg.norm(np.diff(body_xy[np.array(LIMBS)], axis=1)[:, 0], axis=1)
