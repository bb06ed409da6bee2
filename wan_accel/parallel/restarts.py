"""A place for ranks to meet in after their launcher has restarted them."""

import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore

_TIMEOUT = timedelta(minutes=10)


def meet_anew() -> None:
    """Have the ranks of a restarted job meet in a store of their own. Collective; before any process group exists.

    The launcher's store outlives its ranks, and keeps the addresses of those that are gone: gloo tries to connect to
    them, NCCL waits for them (torch 2.14 with accelerate's static rendezvous, and with c10d's on a given port).
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher = TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
    key = f"wan_accel/attempt-{attempt}"
    if os.environ["RANK"] == "0":
        launcher.set(key, str(_free_port()))
    os.environ["MASTER_PORT"] = launcher.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 opens the store at that port


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
