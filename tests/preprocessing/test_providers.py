import sys
from pathlib import Path

import onnxruntime
import pytest
from small_runs import MODELS

from preprocessing.network_files import first_input, read_graph
from preprocessing.onnx_model import OnnxModel, _setup
from preprocessing.providers import PROVIDERS, Setup, find_provider, providers_of_session

WITHOUT_GPU_BUILD = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has the GPU providers"
)


def setup(**changes) -> Setup:
    given = {"device_id": 2, "batch_frames": 16, "fp16": False, "input_name": "images", "engines": Path("/engines")}
    return Setup(**{**given, "input_shape": (None, 3, 640, 640), **changes})


def test_an_unknown_provider_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"provider 'rocm' is unknown: use cpu, cuda, tensorrt"):
        OnnxModel(MODELS.detector, provider="rocm")


@WITHOUT_GPU_BUILD
@pytest.mark.parametrize(("provider", "packages"), [("cuda", ""), ("tensorrt", " tensorrt")])
def test_a_provider_that_is_absent_is_an_error_that_says_what_to_install(provider, packages):
    expected = (
        rf"provider '{provider}' is not in this onnxruntime, which has .*CPUExecutionProvider: pip uninstall -y "
        rf"onnxruntime, then pip install 'onnxruntime-gpu\[cuda,cudnn\]'{packages}$"
    )
    with pytest.raises(ValueError, match=expected):
        OnnxModel(MODELS.detector, provider=provider)


@WITHOUT_GPU_BUILD
def test_two_builds_installed_over_one_another_are_noticed(tmp_path, monkeypatch):
    """As after `pip install onnxruntime-gpu` beside onnxruntime: both are listed, one's files are there."""
    listed = tmp_path / "onnxruntime_gpu-1.32.0.dist-info"
    listed.mkdir()
    (listed / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.32.0\n")
    (listed / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(
        ValueError,
        match=r"onnxruntime and onnxruntime-gpu are installed over one another, and the last one's files are there; "
        r"pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu\[cuda,cudnn\]'",
    ):
        find_provider("cuda")


def test_the_cpu_needs_no_options_and_works():
    assert find_provider("cpu") is PROVIDERS["cpu"]
    assert providers_of_session(PROVIDERS["cpu"], setup()) == [("CPUExecutionProvider", {})]
    assert OnnxModel(MODELS.detector, provider="cpu", device_id=3).input_shape[1:] == (3, 640, 640)


def test_cuda_runs_on_the_device_that_was_asked_for():
    ((name, options),) = providers_of_session(PROVIDERS["cuda"], setup())
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": "2", "arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC",
    }  # fmt: skip


def test_tensorrt_has_one_engine_for_all_batches_and_cuda_beside_it():
    (name, options), (beside, beside_options) = providers_of_session(PROVIDERS["tensorrt"], setup(fp16=True))
    assert (name, beside) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert (options["device_id"], beside_options["device_id"]) == ("2", "2")
    assert options["trt_fp16_enable"] == "True"
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("True", "/engines")
    assert (options["trt_timing_cache_enable"], options["trt_timing_cache_path"]) == ("True", "/engines")
    assert [options[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")] == [
        "images:1x3x640x640", "images:16x3x640x640", "images:16x3x640x640",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 3, 640, 640), (None, 3, None, None)])
def test_a_network_whose_batch_is_fixed_or_size_is_free_has_no_profile(shape):
    ((_, options), _) = providers_of_session(PROVIDERS["tensorrt"], setup(input_shape=shape))
    assert options["trt_fp16_enable"] == "False"
    assert not any("profile" in name for name in options)


def test_a_networks_input_is_read_from_its_file():
    assert first_input(read_graph(MODELS.detector)) == ("images", (None, 3, 640, 640))
    assert first_input(read_graph(MODELS.segmenter)) == ("input_1:0", (1, 256, 256, 3))


def test_engines_of_networks_that_differ_are_kept_apart(tmp_path, monkeypatch):
    """onnxruntime tells engines apart by names and shapes; the folder does it by content."""
    monkeypatch.setenv("WAN_ACCEL_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "renamed.onnx"
    copy.write_bytes(MODELS.detector.read_bytes())
    chosen = {"device_id": 1, "batch_frames": 4, "fp16": True}
    setups = [_setup(path, PROVIDERS["tensorrt"], **chosen) for path in (MODELS.detector, copy, MODELS.pose)]
    assert setups[0] == setups[1] == setup(**chosen, engines=setups[0].engines)
    assert setups[0].engines != setups[2].engines and setups[0].engines.is_dir()
    assert setups[0].engines.parent == tmp_path / "cache/tensorrt"
