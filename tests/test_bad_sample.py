"""A sample that cannot be trained on ends a run with one line that names it, on whichever rank it falls."""

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_clips import clip_row, write_clips

from wan_accel import cache, train
from wan_accel.data import store
from wan_accel.data.schema import LATENTS_SCHEMA, latents_features
from wan_accel.tiny import init_tiny

MESSAGE = (
    "wrong: clip square3 (row 3): latents (16, 2, 6, 4) where the bucket of 9 frames of 48x32 needs (16, 3, 6, 4): the "
    "row was written by something else; encode into a new data.latents folder"
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two clips of 5 frames and two of 9, one of which has the latents of 5."""
    folder = tmp_path_factory.mktemp("bad")
    init_tiny("t2v-1.3b", folder / "model")
    write_clips(folder / "clips", [clip_row(n, num_frames=9 if n == 2 else 5) for n in range(4)])
    path = folder / "recipe.yaml"
    path.write_text(
        f"variant: t2v-1.3b\nmodel: {{checkpoint: {folder}/model}}\nmethod: {{kind: lora, r: 4}}\n"
        f"data: {{clips: {folder}/clips, latents: {folder}/latents, global_batch: {{samples: 2}}}}\n"
        f"training: {{output_dir: {folder}/run, max_steps: 4, logging_steps: 1, save_strategy: 'no', seed: 0}}\n"
    )
    assert cache.main([str(path)]) == 0
    for part in ("text", "null"):
        (folder / "wrong").mkdir(exist_ok=True)
        (folder / "wrong" / part).symlink_to(folder / "latents" / part)
    with store.PartWriter(folder / "wrong" / "clips", writer="rank0", features=latents_features()) as writer:
        for row in store.load(folder / "latents" / "clips", LATENTS_SCHEMA):
            writer.write(row | ({"num_frames": 9} if row["clip_id"] == "square3" else {}))
    return str(path)


def launched(recipe: str, output_dir: str, num_workers: int) -> tuple[int, str]:
    """The exit code and what a terminal shows of a rank."""
    shown = io.StringIO()
    wrong = Path(recipe).parent / "wrong"
    settings = [f"data.latents={wrong}", f"training.output_dir={output_dir}"]
    with redirect_stderr(shown):
        code = train.main([recipe, *settings, f"training.dataloader_num_workers={num_workers}"])
    return code, shown.getvalue()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_process_says_it_in_one_line(recipe: str, tmp_path: Path, num_workers: int) -> None:
    """Read here or in a worker, whose exceptions come wrapped in their tracebacks."""
    code, shown = launched(recipe, str(tmp_path), num_workers)
    last = shown.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and last.endswith(MESSAGE) and "Traceback" not in shown
    state = json.loads((tmp_path / "run_state.json").read_text())
    assert state["state"] == "failed" and state["error"].endswith(MESSAGE)
    assert "in check_shapes" in (tmp_path / "logs" / "rank-0.log").read_text()  # where it was met, for the curious


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_other_ranks_end_with_it_and_say_nothing(recipe: str, tmp_path: Path, engine: str) -> None:
    (first, shown_by_first), (second, shown_by_second) = run_ranks(
        launched, 2, recipe, str(tmp_path), 0, engine=engine, timeout_seconds=120
    )
    assert (first, second) == (2, 2)
    errors = [line for line in (shown_by_first + shown_by_second).splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].endswith(MESSAGE) and errors[0] in shown_by_second
    assert "Traceback" not in shown_by_first + shown_by_second
    assert json.loads((tmp_path / "run_state.json").read_text())["error"].endswith(MESSAGE)
    assert "logs of the remote worker" in (tmp_path / "logs" / "rank-0.log").read_text()
