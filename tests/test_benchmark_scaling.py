"""The benchmark of scaling: a launched point gives a row, and efficiency is what it is said to be."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scaling

CONFIG = Path(__file__).parents[1] / "recipes" / "accelerate" / "cpu_fsdp2.yaml"


@pytest.mark.launch
def test_a_point_is_launched_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--variant", "ti2v-5b", "--method", "lora", "--modes", "strong", "--gpus", "2", "--ulysses", "2"]
    options += ["--samples", "1", "--steps", "1", "--config_file", str(CONFIG), "--out", str(out)]
    assert scaling.main(options) == 0
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["engine"], row["gpus"], row["ulysses"], row["samples"]) == ("fsdp2", 2, 2, 1)
    assert row["seconds"] > 0 and row["communication"] > 0
    printed = capsys.readouterr().out
    assert "nothing is claimed" in printed and "| strong | fsdp2 | 2 | 2 | 1 |" in printed


def test_efficiency() -> None:
    def row(gpus: int, tokens: float, mode: str) -> dict[str, Any]:
        return {
            "engine": "fsdp2", "gpus": gpus, "ulysses": 1, "mode": mode, "samples": 8, "seconds": 1.0,
            "tokens_per_second": tokens, "communication": 0.1, "device": "NVIDIA H100",
        }  # fmt: skip

    rows = [row(4, 360.0, "weak"), row(1, 100.0, "weak"), row(1, 100.0, "strong"), row(2, 150.0, "strong")]
    lines = scaling.report(rows)[2:]
    assert [line.split(" | ")[7] for line in lines] == ["1.00", "0.90", "1.00", "0.75"]
