import re

import numpy as np
import pytest
from preprocess_goldens import GOLDENS, UPSTREAM, arrays, picture, reference_metas, source_metas

from preprocessing.pose import hide_low_scores
from preprocessing.retarget import fit_retargeting, retarget
from preprocessing.skeleton import LIMBS, draw_pose
from wan_accel.data.skeleton import BODY, LEFT_HAND, RIGHT_HAND

PREFIX = "11_retarget_"
CASES = sorted(
    p.stem.removeprefix(PREFIX) for p in GOLDENS.glob(f"{PREFIX}*.npz") if "intermediates" not in p.stem
)
DRAWINGS = sorted(p.name for p in GOLDENS.glob(f"{PREFIX}*.png"))


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
    np.testing.assert_array_equal(pose[:, BODY, 2], golden["kps_body_p"])
    # The original's names are swapped: its "lhand" is the right hand.
    for name, rows in (("kps_lhand", RIGHT_HAND), ("kps_rhand", LEFT_HAND)):
        np.testing.assert_array_equal(pose[:, rows, :2], golden[name])
        given = ~np.isnan(golden[name][..., 0])
        np.testing.assert_array_equal(pose[:, rows, 2][given], golden[f"{name}_p"][given])


@pytest.mark.parametrize("path", DRAWINGS)
def test_drawings_of_retargeted_poses_match_the_original(path):
    case, frame = re.fullmatch(rf"{PREFIX}(.+)_f(\d+)_.*\.png", path).groups()
    expected = picture(path)
    _, pose = retargeted(case)
    np.testing.assert_array_equal(draw_pose(hide_low_scores(pose)[int(frame)], expected.shape[:2]), expected)


def test_intermediate_numbers_match_the_original():
    golden = arrays(f"{PREFIX}full_body_intermediates")
    fit, _ = retargeted("full_body")
    np.testing.assert_array_equal(np.array(LIMBS) + 1, golden["limbSeq_1based"])
    assert fit.scale == pytest.approx(float(golden["scale_min"]), abs=1e-6)
    np.testing.assert_allclose(fit.length_ratios, golden["ratio_final"], rtol=1e-6)
    scaled_wh = [int(fit.width * fit.scale), int(fit.height * fit.scale)]
    np.testing.assert_array_equal(scaled_wh, golden["dst_scaled_wh"])
    source, reference = arrays(f"{PREFIX}full_body")["src_kps"], arrays(f"{PREFIX}full_body")["ref_kps"]
    lengths = [
        np.linalg.norm(np.diff(metas.body[0, :, :2][np.array(LIMBS)] * wh, axis=1)[:, 0], axis=1)
        for metas, wh in (
            (source_metas(source), arrays("01_inputs")["src_wh"]),
            (reference_metas(reference), golden["dst_scaled_wh"]),
        )
    ]
    np.testing.assert_allclose(lengths[0], golden["src_len"], atol=1e-3)
    np.testing.assert_allclose(lengths[1], golden["dst_len"], atol=1e-3)
    np.testing.assert_allclose(lengths[1] / lengths[0], golden["ratio_raw"], rtol=1e-4)
