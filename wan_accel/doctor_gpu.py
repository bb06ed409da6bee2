"""GPUs: what they can do, what this recipe asks of them, driver, NCCL, and onnxruntime's CUDA provider."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from wan_accel.doctor_finding import Finding, Job
from wan_accel.flops import peak_tflops
from wan_accel.models.attention import ATTENTION_BACKENDS, check_attention
from wan_accel.models.fp8 import MIN_CAPABILITY, check_fp8

GIB = 2**30
DRIVER = Path("/proc/driver/nvidia/version")
# bf16 in tensor cores: Ampere and later.
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as torch shows it; `free_bytes` is what other processes leave."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


def read_gpus() -> list[Gpu]:
    return [_read(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def _read(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(
        index=index, name=torch.cuda.get_device_name(index), capability=torch.cuda.get_device_capability(index),
        total_bytes=total, free_bytes=free,
    )  # fmt: skip


def check_gpus(job: Job) -> list[Finding]:
    gpus = read_gpus()
    if not gpus:
        return [no_gpu_finding(torch.version.cuda, DRIVER.exists(), os.environ.get("CUDA_VISIBLE_DEVICES"))]
    return [*(gpu_finding(gpu) for gpu in gpus), *_different(gpus)]


def no_gpu_finding(cuda: str | None, has_driver: bool, visible: str | None) -> Finding:
    """Without a driver there is no GPU to miss; with one it is a problem that torch sees none."""
    if not has_driver or visible in ("", "-1"):  # none, or hidden on purpose
        advice = "launch with recipes/accelerate/cpu_*.yaml, to try things"
        return Finding(name="GPUs", level="note", value="none", advice=advice)
    if cuda is None:
        value, advice = "the torch installed is built without CUDA", "install torch from PyTorch's index for your CUDA"
    elif visible is not None:
        value, advice = f"none of those in CUDA_VISIBLE_DEVICES={visible!r}", "unset it, or name GPUs that are there"
    else:
        value, advice = f"torch (CUDA {cuda}) sees none", "compare with nvidia-smi: the driver may be too old for it"
    return Finding(name="GPUs", level="problem", value=value, advice=advice)


def gpu_finding(gpu: Gpu) -> Finding:
    """What a GPU is; a warning if it is taken already or has no bf16."""
    lowest, highest = ATTENTION_BACKENDS["flash_3"].capabilities
    able = {
        "bf16": gpu.capability >= BF16_CAPABILITY,
        "fp8": gpu.capability >= MIN_CAPABILITY,
        "FlashAttention 3": lowest <= gpu.capability[0] <= highest,
    }
    value, used = _describe(gpu, able), gpu.total_bytes - gpu.free_bytes
    name = f"GPU {gpu.index}"
    if used > 0.1 * gpu.total_bytes:
        advice = f"{used / GIB:.0f} GiB are in use by other processes: see nvidia-smi"
        return Finding(name=name, level="warning", value=value, advice=advice)
    if not able["bf16"]:
        advice = "mixed_precision: bf16 is emulated here and slow; Ampere and later have it"
        return Finding(name=name, level="warning", value=value, advice=advice)
    return Finding(name=name, level="ok", value=value)


def _describe(gpu: Gpu, able: dict[str, bool]) -> str:
    major, minor = gpu.capability
    can = ", ".join(f"{what} {'yes' if is_able else 'no'}" for what, is_able in able.items())
    peak = peak_tflops(gpu.name)
    known = "peak unknown: no mfu in the log" if peak is None else f"peak {peak:g} TFLOP/s"
    return f"{gpu.name}, {gpu.total_bytes / GIB:.0f} GiB, compute capability {major}.{minor}; {can}; {known}"


def _different(gpus: Sequence[Gpu]) -> list[Finding]:
    kinds = sorted({gpu.name for gpu in gpus})
    if len(kinds) == 1:
        return []
    advice = "all ranks wait for the slowest GPU, and the smallest memory counts: choose by CUDA_VISIBLE_DEVICES"
    return [Finding(name="GPUs", level="warning", value=f"different: {', '.join(kinds)}", advice=advice)]


def check_driver(job: Job) -> list[Finding]:
    if not DRIVER.exists():
        return []
    first = DRIVER.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    return [Finding(name="NVIDIA driver", level="ok", value=first)]


def check_nccl(job: Job) -> list[Finding]:
    if torch.cuda.is_available() and not dist.is_nccl_available():
        advice = "several GPUs need it: install a torch for Linux and CUDA"
        return [Finding(name="NCCL", level="problem", value="not in this torch", advice=advice)]
    if not dist.is_nccl_available():
        return [Finding(name="NCCL", level="note", value="not in this torch; CPU processes use gloo")]
    return [Finding(name="NCCL", level="ok", value=".".join(map(str, torch.cuda.nccl.version())))]


def check_recipe(job: Job) -> list[Finding]:
    """The recipe's attention kernel and fp8 on the first GPU, by the checks that training makes."""
    if job.recipe is None:
        return []
    device, findings = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    attention, fp8 = job.recipe.model.attention, job.recipe.memory.fp8
    for name, check in (
        (f"model.attention={attention}", lambda: check_attention(attention, device)),
        (f"memory.fp8={str(fp8).lower()}", lambda: check_fp8(device) if fp8 else None),
    ):
        try:
            check()
            findings.append(Finding(name=name, level="ok", value=f"can run on {device.type}"))
        except ValueError as error:
            findings.append(Finding(name=name, level="problem", value=str(error)))
    return findings


def check_provider(job: Job) -> list[Finding]:
    """Preprocessing's networks run in onnxruntime; its build for the CPU has no CUDA provider."""
    import onnxruntime

    return [provider_finding(onnxruntime.get_available_providers(), has_gpu=torch.cuda.is_available())]


def provider_finding(providers: Sequence[str], *, has_gpu: bool) -> Finding:
    value = ", ".join(providers)
    if has_gpu and "CUDAExecutionProvider" not in providers:
        advice = (
            "wan-preprocess --provider cuda would fail: pip uninstall -y onnxruntime, then pip install "
            "'onnxruntime-gpu[cuda,cudnn]'"
        )
        return Finding(name="onnxruntime", level="warning", value=f"{value}, no CUDA", advice=advice)
    return Finding(name="onnxruntime", level="ok", value=value)
