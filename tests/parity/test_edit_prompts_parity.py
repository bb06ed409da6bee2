import json

import numpy as np
import pytest
from preprocess_goldens import GOLDENS, arrays, hw, reference_metas, source_metas

from preprocessing.edit_prompts import edit_prompt

PROMPTS = json.loads((GOLDENS / "13_flux_prompts.json").read_text())
# COCO points whose score was lowered, as the goldens' README says.
HIDDEN = {"arms_only": range(13, 17), "face_only": range(5, 17)}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_match_the_original(case):
    inputs = arrays("01_inputs")
    template_hw, reference_hw = hw(inputs["src_wh"]), hw(inputs["ref_wh"])
    landscape, portrait = sorted((template_hw, reference_hw), key=lambda size: size[0] / size[1])
    if case == "full_landscape_tpl__portrait_ref":
        template_hw, reference_hw = landscape, portrait
    elif case == "portrait_tpl__landscape_ref":
        template_hw, reference_hw = portrait, landscape
    template, reference = inputs["src_kps"][:4].copy(), inputs["ref_kps"].copy()
    for keypoints in (template, reference):
        keypoints[:, list(HIDDEN.get(case, [])), 2] = 0.2
    prompts = [
        edit_prompt(source_metas(template), template_hw),
        edit_prompt(reference_metas(reference), reference_hw),
    ]
    assert prompts == PROMPTS[case]
    assert np.isfinite(template).all()
