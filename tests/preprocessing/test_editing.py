import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import DEMO, MODELS, SMALL, part_of, pipeline, process, rejections, run_job
from tiny_flux import write_tiny_flux

from preprocessing.characters import Characters
from preprocessing.description import describe
from preprocessing.editing import StandardPoses
from preprocessing.flux import FluxKontextEditor
from preprocessing.inputs import Source, read_manifest
from preprocessing.pictures import load_picture
from preprocessing.pipeline import Pipeline, Rejected
from preprocessing.settings import Runtime, Settings
from preprocessing.video import decode_frames

MAN, WOMAN = (str(DEMO / "reference" / name) for name in ("man.png", "woman.png"))
PROMPT = "Change the person to a pose"


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    return part_of("walker.mp4", tmp_path_factory.mktemp("videos") / "short.mp4", range(18))


@pytest.fixture(scope="module")
def frontal(tmp_path_factory) -> str:
    """A picture of somebody who faces the camera, arms and legs in view."""
    path = tmp_path_factory.mktemp("edited") / "frontal.png"
    Image.fromarray(decode_frames(DEMO / "videos/jumping.mp4", [10]).frames_rgb[0]).save(path)
    return str(path)


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory) -> Path:
    return write_tiny_flux(tmp_path_factory.mktemp("flux") / "tiny")


def two_step(**changes) -> Pipeline:
    return pipeline(purpose="drive", reference=MAN, retarget="two_step", quality={}, **changes)


class Photographer:
    """An editor that needs no network: whoever it is given, the frontal picture comes out."""

    identity = "photographer"

    def __init__(self, path: str) -> None:
        self.path, self.prompts = path, []

    def __call__(self, picture_rgb, prompt):
        self.prompts.append((picture_rgb.shape, prompt))
        return load_picture(self.path)


def test_given_pictures_decide_the_bone_lengths(short, frontal):
    """The same picture for both: every bone keeps the driving person's length, at the reference's size."""
    made = two_step(edited_template=frontal, edited_reference=frontal)
    (row,) = process(made, short)
    one_step = process(pipeline(purpose="drive", reference=MAN, retarget="one_step", quality={}), short)[0]
    ratios = json.loads(row["provenance"])["retargeting"]["length_ratios"]
    np.testing.assert_allclose(ratios, 1, atol=1e-6)
    assert np.nanmax(np.abs(row["pose_keypoints"] - one_step["pose_keypoints"])) > 2
    assert (row["canvas_height"], row["canvas_width"]) == (256, 160)


def test_a_manifest_names_the_pictures_of_every_video(short, frontal, tmp_path):
    fields = {"path": str(short), "reference": WOMAN, "edited_template": "../frontal.png", "edited_reference": MAN}
    (tmp_path / "list").mkdir()
    Image.open(frontal).save(tmp_path / "frontal.png")
    with (tmp_path / "list/videos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerow(fields)
    (source,) = read_manifest(str(tmp_path / "list/videos.csv"))
    made = pipeline(purpose="drive", reference="column", retarget="two_step", quality={})
    (row,) = list(made.process(source, short))
    assert row["purpose"] == "drive"
    assert Path(source.edited_template).resolve() == (tmp_path / "frontal.png").resolve()


def test_pictures_that_nobody_gives_and_nothing_makes_are_asked_for(short, frontal, tmp_path):
    with pytest.raises(Rejected, match="needs an edited reference: give --edited-reference, a column") as error:
        process(two_step(), short)
    assert error.value.reason == "no_edited_picture"
    run_job([short], tmp_path / "clips", purpose="drive", reference=MAN, retarget="two_step", edited_reference=frontal)
    (record,) = rejections(tmp_path / "clips")
    assert record["reason"] == "no_edited_picture" and "an edited template" in record["detail"]


def test_an_edited_picture_without_a_person_is_refused_at_the_start(frontal, tmp_path):
    Image.new("RGB", (320, 320), (90, 120, 90)).save(tmp_path / "meadow.png")
    with pytest.raises(ValueError, match=r"edited picture .*meadow\.png: no person found"):
        two_step(edited_template=str(tmp_path / "meadow.png"), edited_reference=frontal)
    with pytest.raises(ValueError, match=r"gone\.png: not a picture"):
        two_step(edited_template=str(tmp_path / "gone.png"), edited_reference=frontal)


@pytest.mark.parametrize("name", ["edited_template", "edited_reference", "flux"])
def test_pictures_without_two_steps_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is for --retarget two-step"):
        Settings(purpose="drive", reference=MAN, retarget="one_step", **{name: "x"})


def test_edited_pictures_are_compared_by_their_content(frontal, tmp_path):
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(Path(frontal).read_bytes())
    settings = Settings(purpose="drive", reference=MAN, retarget="two_step", edited_template=frontal)
    assert describe(settings) == describe(replace(settings, edited_template=str(moved)))
    assert describe(settings) != describe(replace(settings, edited_template=MAN))


def test_made_pictures_are_measured_kept_and_made_once(short, frontal, tmp_path):
    made = two_step(edited_template=frontal, edited_reference=frontal)
    editor = Photographer(frontal)
    measure = made.networks.measure_picture
    settings = replace(made.settings, edited_template=None, edited_reference=None)
    for _ in range(2):  # two workers, or two runs
        poses = StandardPoses(measure, editor=editor, folder=tmp_path / "edits")
        made.characters = Characters(settings, measure=measure, poses=poses)
        (row,) = process(made, short)
    np.testing.assert_allclose(json.loads(row["provenance"])["retargeting"]["length_ratios"][:12], 1, atol=0.06)
    shapes, prompts = zip(*editor.prompts)
    assert shapes == ((256, 160, 3), (272, 160, 3))  # the reference, then the template
    assert all(prompt.startswith("Change the person to a standard pose") for prompt in prompts)
    kept = sorted(path.name.split(".", 1)[1] for path in (tmp_path / "edits").iterdir())
    assert kept == ["before.png", "before.png", "png", "png"]


def test_the_editor_is_asked_again_for_another_picture_or_another_seed(frontal, tmp_path):
    editor = Photographer(frontal)
    poses = StandardPoses(pipeline().networks.measure_picture, editor=editor, folder=tmp_path)
    picture = load_picture(MAN)
    metas = pipeline().networks.measure_picture(picture)
    poses.made(picture, metas)
    poses.made(picture[:-16], metas)
    editor.identity = "another seed"
    poses.made(picture, metas)
    assert len(editor.prompts) == 3


def test_flux_gives_one_picture_a_seed(tiny_flux):
    picture = decode_frames(DEMO / "videos/walker.mp4", [0]).frames_rgb[0, ::4, ::4]
    first, again, other = (FluxKontextEditor(tiny_flux, seed=seed, num_steps=1)(picture, PROMPT) for seed in (0, 0, 1))
    assert first.dtype == np.uint8 and first.ndim == 3
    assert first.shape[0] / first.shape[1] == pytest.approx(208 / 120, rel=0.05)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_what_flux_spoils_is_said(tiny_flux, tmp_path):
    """Random weights leave nobody in the picture."""
    networks = pipeline().networks
    poses = StandardPoses(networks.measure_picture, editor=FluxKontextEditor(tiny_flux, num_steps=1), folder=tmp_path)
    picture = load_picture(MAN)
    with pytest.raises(ValueError, match=r"nobody is found in the picture that was edited .*try another --flux-seed"):
        poses.made(picture, networks.measure_picture(picture))


def test_other_folders_are_no_flux(tmp_path):
    with pytest.raises(ValueError, match=r"no pipeline of diffusers .* hf download black-forest-labs/FLUX\.1-Kontext"):
        FluxKontextEditor(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="a FluxPipeline, expected a FluxKontextPipeline"):
        FluxKontextEditor(tmp_path)


def test_the_pipeline_opens_flux_where_pictures_are_not_given(tiny_flux, frontal):
    made = Pipeline(
        Settings(
            purpose="drive", reference=MAN, retarget="two_step", edited_reference=frontal, flux=str(tiny_flux), **SMALL
        ),
        MODELS,
        runtime=Runtime(num_threads=2),
    )
    assert made.characters.of(Source(path="walker.mp4")).edited is not None
    assert made.described["flux"] != str(tiny_flux)  # its content
