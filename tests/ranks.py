"""Run a function on several gloo ranks, each in a fresh process forked from a server that has imported torch.

Forking from pytest itself would inherit autograd's threads, which a child cannot use.
"""

import gc
import importlib
import multiprocessing
import os
import pickle
import platform
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# What a training run imports, its picture of the losses and the test module included: each rank would do it again.
PRELOAD = ["torch", "torch.distributed.fsdp", "wan_accel.train", "matplotlib.pyplot", "pytest"]

LAUNCH_ENV = {
    "single": {"ACCELERATE_USE_CPU": "true"},
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    "fsdp2-bf16": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    "hsdp": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "DS_ACCELERATOR": "cpu",
    },
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "DS_ACCELERATOR": "cpu",
    },
}
ON_HOST = {
    "optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
LAUNCH_ENV |= {
    "fsdp2-offload": {**LAUNCH_ENV["fsdp2"], "FSDP_OFFLOAD_PARAMS": "true"},
    "hsdp-offload": {**LAUNCH_ENV["hsdp"], "FSDP_OFFLOAD_PARAMS": "true"},
    "zero2-bf16": {**LAUNCH_ENV["zero2"], "ACCELERATE_MIXED_PRECISION": "bf16"},
    "zero2-offload": {**LAUNCH_ENV["zero2"], ON_HOST["optimizer"]: "cpu"},
    "zero3-offload": {**LAUNCH_ENV["zero3"], ON_HOST["optimizer"]: "cpu", ON_HOST["param"]: "cpu"},
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    engine: str = "ddp",
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 300,
) -> list[Any]:
    """Return `function(*args)` of every rank, run as `accelerate launch` with `engine` would run it.

    `env` takes the place of the engine's variables.
    `function` is a top-level function of a test module. A rank's exception is raised here with its traceback.
    """
    return results(start_ranks(function, world_size, *args, engine=engine, env=env), timeout_seconds)


def start_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, engine: str = "ddp",
    env: Mapping[str, str] | None = None,
) -> list[tuple[Any, Connection]]:  # fmt: skip
    """The processes of `run_ranks`, to be signalled or killed, and what `results` reads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    workers = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(LAUNCH_ENV[engine] if env is None else env),
        }
        if engine == "single":
            variables = dict(LAUNCH_ENV["single"])
        process = context.Process(
            target=_work, args=(sender, variables, function.__module__, function.__qualname__, args)
        )
        process.start()
        sender.close()  # so that a rank's death shows as the end of the pipe
        workers.append((process, receiver))
    return workers


def results(workers: list[tuple[Any, Connection]], timeout_seconds: float = 300) -> list[Any]:
    """Wait for the ranks of `start_ranks`; a rank that was killed raises EOFError."""
    return [_result(process, receiver, timeout_seconds) for process, receiver in workers]


def _work(sender: Connection, env: dict[str, str], module: str, name: str, args: tuple[Any, ...]) -> None:
    gc.freeze()  # accelerate collects garbage in every run: that would copy every inherited page to look for none
    os.environ.update(env, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # DeepSpeed asks py-cpuinfo at each load of its AdamW for the CPU, which waits for a process in a busy loop: a few
    # such ranks starve a small machine for minutes.
    sys.modules["cpuinfo"] = SimpleNamespace(get_cpu_info=cpu_info)  # type: ignore[assignment]
    import torch

    torch.set_num_threads(1)
    try:
        outcome: Any = (True, getattr(importlib.import_module(module), name)(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    os._exit(0)  # no destructor of a process group may wait for a rank that failed


def cpu_info() -> dict[str, Any]:
    """What DeepSpeed asks of py-cpuinfo, as the kernel says it."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()  # of the first core
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "arch": platform.machine().upper(),
        "flags": fields.get("flags", "").split(),
        "vendor_id_raw": fields.get("vendor_id", "unknown"),
    }


def _result(process: Any, receiver: Connection, timeout_seconds: float) -> Any:
    try:
        if not receiver.poll(timeout_seconds):
            raise TimeoutError(f"rank did not answer within {timeout_seconds} s")
        ok, value = pickle.loads(receiver.recv_bytes())
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
    if not ok:
        raise RuntimeError(f"a rank failed:\n{value}")
    return value
