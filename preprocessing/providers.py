"""What networks can be asked to run on: onnxruntime's providers, and how each is set up."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

GPU_PACKAGE = "onnxruntime-gpu[cuda,cudnn]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What the options of a provider depend on.

    For one that builds engines also the network: input_name and input_shape, None in place of sizes that are free;
    engines: folder for what is built from this very network.
    """

    device_id: int
    batch_frames: int
    fp16: bool
    input_name: str = ""
    input_shape: tuple[int | None, ...] = ()
    engines: Path = Path()


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """A row of the table.

    name: onnxruntime's. packages: what to install for it. builds_engines: it compiles networks for the GPU at hand, in
    half precision if asked. beside: providers for what this one cannot run; onnxruntime puts the CPU last.
    """

    name: str
    packages: str
    options: Callable[[Setup], dict[str, str]]
    builds_engines: bool = False
    beside: tuple[str, ...] = ()


def _cpu_options(setup: Setup) -> dict[str, str]:
    return {}


def _cuda_options(setup: Setup) -> dict[str, str]:
    return {
        "device_id": str(setup.device_id),
        # Several networks and workers share a GPU: memory grows by what is needed, not by doubling.
        "arena_extend_strategy": "kSameAsRequested",
        # The default measures every algorithm anew for each batch size, and the last batch of a clip has any.
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def _tensorrt_options(setup: Setup) -> dict[str, str]:
    cached = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(setup.engines),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(setup.engines),
    }
    return {
        "device_id": str(setup.device_id),
        "trt_fp16_enable": str(setup.fp16),
        **cached,
        **_batch_profile(setup),
    }


def _batch_profile(setup: Setup) -> dict[str, str]:
    """One engine for batches of 1 to batch_frames; without it TensorRT builds another for each size that comes by."""
    batch, *sizes = setup.input_shape
    if isinstance(batch, int) or not all(isinstance(size, int) for size in sizes):
        return {}
    shapes = {"min": 1, "opt": setup.batch_frames, "max": setup.batch_frames}
    return {
        f"trt_profile_{which}_shapes": f"{setup.input_name}:{'x'.join(map(str, (num, *sizes)))}"
        for which, num in shapes.items()
    }


PROVIDERS = {
    "cpu": Provider(name="CPUExecutionProvider", packages="onnxruntime", options=_cpu_options),
    "cuda": Provider(name="CUDAExecutionProvider", packages=f"'{GPU_PACKAGE}'", options=_cuda_options),
    "tensorrt": Provider(
        name="TensorrtExecutionProvider", packages=f"'{GPU_PACKAGE}' tensorrt", options=_tensorrt_options,
        builds_engines=True, beside=("cuda",),
    ),
}  # fmt: skip


def find_provider(name: str) -> Provider:
    """Return a row of the table.

    Raises ValueError for another name, and where this onnxruntime is built without the provider: nothing else is ever
    used instead.
    """
    import onnxruntime

    if name not in PROVIDERS:
        raise ValueError(f"provider {name!r} is unknown: use {', '.join(PROVIDERS)}")
    provider, available = PROVIDERS[name], onnxruntime.get_available_providers()
    if provider.name not in available:
        raise ValueError(
            f"provider {name!r} is not in this onnxruntime, which has {', '.join(available)}: {_remedy(provider)}"
        )
    return provider


def _remedy(provider: Provider) -> str:
    """Builds for CPU and GPU are packages of their own that install the same files: only one may be there."""
    builds = sorted(set(packages_distributions().get("onnxruntime", [])))
    steps = f"pip uninstall -y {' '.join(builds)}, then pip install {provider.packages}"
    if len(builds) > 1:
        return f"{' and '.join(builds)} are installed over one another, and the last one's files are there; {steps}"
    return steps


def providers_of_session(provider: Provider, setup: Setup) -> list[tuple[str, dict[str, str]]]:
    """What onnxruntime.InferenceSession is given: names and options, the one asked for first."""
    chosen = [provider, *(PROVIDERS[name] for name in provider.beside)]
    return [(each.name, each.options(setup)) for each in chosen]
