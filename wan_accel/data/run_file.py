"""The run that owns a dataset folder: its schema and settings. Torch-free."""

import hashlib
import json
from pathlib import Path
from typing import Any

from wan_accel.data.files import write_json
from wan_accel.data.schema import check_schema
from wan_accel.data.store_error import StoreError

RUN_FILE = "wan_accel_run.json"


def claim_output(root: Path, *, schema: str, settings: dict[str, Any]) -> None:
    """Make `root` the output of a run with these settings, or check that it already is.

    Raises:
        StoreError: the folder holds foreign files, or a run with another schema or other settings; the message
            names the differences. Nothing is changed.
    """
    path = root / RUN_FILE
    settings = json.loads(json.dumps(settings))  # as they read back: a tuple is a list
    wanted = {"schema": schema, "settings": settings, "settings_hash": settings_hash(settings)}
    # Looked at before the run file, which another rank may write meanwhile, and parts behind it. The run file itself or
    # its temporary is another rank claiming at this moment, or a claim that was killed.
    is_foreign = root.is_dir() and any(not path.name.startswith(RUN_FILE) for path in root.iterdir())
    if path.is_file():
        found = json.loads(path.read_text())
        check_schema(found.get("schema"), schema, str(root))
        differences = [
            f"{key}: {found['settings'].get(key)!r} there, {settings.get(key)!r} now"
            for key in sorted({*found["settings"], *settings})
            if found["settings"].get(key) != settings.get(key)
        ]
        if differences:
            raise StoreError(
                f"{root} was made with other settings ({'; '.join(differences)}): choose another output folder, or "
                "remove it"
            )
        return
    if is_foreign:
        raise StoreError(f"{root} is not empty and was not made by wan-accel: choose another output folder")
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash settings independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
