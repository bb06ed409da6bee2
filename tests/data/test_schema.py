"""The data contract: columns, masks, clip names, refusals."""

import zlib

import numpy as np
import pytest
from datasets import Features, Image, Video

from wan_accel.data.schema import (
    ANIMATE_COLUMNS,
    CLIPS_SCHEMA,
    LATENTS_SCHEMA,
    SchemaError,
    check_schema,
    clip_id,
    clips_features,
    latents_features,
    null_features,
    pack_mask,
    tensor_feature,
    text_features,
    unpack_mask,
)


@pytest.mark.parametrize("features", [clips_features(), latents_features(), text_features(), null_features()])
def test_features_survive_json_and_carry_the_schema(features):
    assert features["schema"].dtype == "string"
    assert Features.from_dict(features.to_dict()) == features


def test_clips_without_animate_lack_exactly_its_columns():
    assert set(clips_features()) - set(clips_features(animate=False)) == set(ANIMATE_COLUMNS)


def test_videos_stay_bytes_and_the_reference_is_an_image():
    features = clips_features()
    assert features["video"] == features["face_video"] == Video(decode=False)
    assert features["reference"] == Image()


def test_every_tensor_of_the_latents_has_dtype_shape_and_bytes():
    features = latents_features()
    for name in ("latents", "reference_latents", "pose_latents", "clip_features", "motion_vectors"):
        assert features[name] == tensor_feature()
    assert features["known"].feature["latents"] == tensor_feature()


@pytest.mark.parametrize("shape", [(5, 16, 32), (1, 1, 1), (3, 5, 7), (1, 3, 3)])
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_masks_are_lossless(shape, dtype):
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    unpacked = unpack_mask(pack_mask(mask), shape)
    assert unpacked.dtype == bool
    np.testing.assert_array_equal(unpacked, mask.astype(bool))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"holds 512 pixels, expected 1024 for shape \(4, 16, 16\)"):
        unpack_mask(pack_mask(np.ones((2, 16, 16), bool)), (4, 16, 16))


@pytest.mark.parametrize("damage", [lambda data: data[:-6], lambda data: b"\0" + data[1:], lambda data: b""])
def test_a_damaged_mask_is_refused(damage):
    data = pack_mask(np.random.default_rng(0).integers(0, 2, (4, 16, 16)))
    with pytest.raises(ValueError, match="the mask is damaged"):
        unpack_mask(damage(data), (4, 16, 16))


def test_the_mask_format_is_zlib_of_packbits():
    mask = np.zeros((1, 2, 8), bool)
    mask[0, 0, 0] = mask[0, 1, 7] = True
    assert zlib.decompress(pack_mask(mask)) == bytes([0b10000000, 0b00000001])


def test_clip_id_names_source_start_and_track():
    assert clip_id("a clip (1)", "0123456789abcdef", 1.2345, 2) == "a_clip_1_-01234567-1234-2"
    assert clip_id("dance", "f" * 64, 0.0, 0) == "dance-ffffffff-0-0"


@pytest.mark.parametrize("found", ["wan-accel/clips@2", LATENTS_SCHEMA, None])
def test_another_kind_or_version_is_refused(found):
    check_schema(CLIPS_SCHEMA, CLIPS_SCHEMA, "here")
    with pytest.raises(SchemaError, match=f"/some/folder has schema {found!r}, expected 'wan-accel/clips@1'"):
        check_schema(found, CLIPS_SCHEMA, "/some/folder")
