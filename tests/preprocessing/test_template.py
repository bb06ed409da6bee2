import numpy as np

from preprocessing.template import choose_template
from preprocessing.types import PROFILES, PoseMetas


def turning(widths: list[float], *, score: float = 0.9) -> PoseMetas:
    """A person whose shoulders and hips appear as wide as given, one frame each."""
    body = np.zeros((len(widths), 20, 3))
    body[..., 2] = score
    rows = [0.1, 0.2, 0.2, 0.35, 0.5, 0.2, 0.35, 0.5, 0.55, 0.75, 0.95, 0.55, 0.75, 0.95, 0.08, 0.08, 0.1, 0.1, 1, 1]
    sides = np.array([0, 0, -1, -1, -1, 1, 1, 1, -0.7, -0.7, -0.7, 0.7, 0.7, 0.7, -0.2, 0.2, -0.4, 0.4, 0.7, -0.7])
    body[..., 1] = rows
    body[..., 0] = 0.5 + np.array(widths)[:, None] * sides
    hand, face = np.zeros((len(widths), 21, 3)), np.zeros((len(widths), 69, 3))
    return PoseMetas(body=body, left_hand=hand, right_hand=hand, face=face, width=100, height=200)


def test_the_most_frontal_frame_is_chosen():
    assert choose_template(turning([0.01, 0.05, 0.2, 0.1])) == 2


def test_a_frontal_frame_that_hides_much_of_the_body_is_not_chosen():
    metas = turning([0.01, 0.19, 0.2])
    metas.body[2, 8:, 2] = 0
    assert choose_template(metas) == 1


def test_upstream_takes_the_first_frame():
    assert choose_template(turning([0.01, 0.2]), profile=PROFILES["upstream"]) == 0


def test_without_a_body_there_is_still_an_answer():
    assert choose_template(turning([0.1, 0.2], score=0.1)) == 0
