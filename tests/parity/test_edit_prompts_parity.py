import json

import pytest
from preprocess_goldens import GOLDENS, UPSTREAM, arrays, hw, reference_metas, source_metas

from preprocessing.edit_prompts import edit_prompt

PROMPTS = json.loads((GOLDENS / "13_flux_prompts.json").read_text())
# What the names of the cases mean, as the goldens' README says: COCO points whose score was lowered, and the
# template frames that were looked at.
HIDDEN = {"arms_only": range(13, 17), "face_only": range(5, 17)}
LOW_SCORE, NUM_TEMPLATE_FRAMES = 0.2, 4


def sizes(case):
    """Heights and widths of template and reference; some cases turn them."""
    template_hw, reference_hw = (hw(arrays("01_inputs")[key]) for key in ("src_wh", "ref_wh"))
    landscape, portrait = sorted((template_hw, reference_hw), key=lambda size: size[0] / size[1])
    if "landscape_tpl" in case and "portrait_ref" in case:
        return landscape, portrait
    if "portrait_tpl" in case and "landscape_ref" in case:
        return portrait, landscape
    return template_hw, reference_hw


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_match_the_original(case):
    inputs = arrays("01_inputs")
    template, reference = inputs["src_kps"][:NUM_TEMPLATE_FRAMES].copy(), inputs["ref_kps"].copy()
    for keypoints in (template, reference):
        keypoints[:, list(HIDDEN.get(case, [])), 2] = LOW_SCORE
    metas = source_metas(template), reference_metas(reference)
    prompts = [
        edit_prompt(person, canvas_hw, profile=UPSTREAM)
        for person, canvas_hw in zip(metas, sizes(case), strict=True)
    ]
    assert prompts == PROMPTS[case]
