import json
import shutil
from pathlib import Path

import pytest

from preprocessing.cli import main

DEMO = Path(__file__).parents[2] / "demo"
WALKER = DEMO / "videos/walker.mp4"
FILES = {
    "--detector": DEMO / "models/person_detector.onnx",
    "--pose": DEMO / "models/wholebody133.onnx",
    "--segmenter": DEMO / "models/person_segmenter.onnx",
}


def animate(output: Path, *arguments: object, files: dict[str, Path] = FILES) -> list[str]:
    models = [str(part) for pair in files.items() for part in pair]
    return ["animate", *map(str, arguments), "--output", str(output), *models]


def refused(capsys, arguments: list[str]) -> str:
    """Run, expect exit code 2, nothing on stdout and one line on stderr; returns that line."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4"], "missing.mp4: no such file or folder"),
        ([DEMO / "LICENSES"], "LICENSES holds no videos (.mp4"),
        ([WALKER, "--num-frames", 80], "--num-frames 80 is not 4n + 1: use 81"),
        ([WALKER, "--fps", 0], "--fps 0: give a positive number"),
        ([WALKER, "--max-clips", 0], "--max-clips 0: give 1 or more"),
        ([WALKER, "--resolution-area", "480*832*3"], "'480*832*3' is not an area: write 480*832"),
        ([WALKER, "--purpose", "drive"], "--purpose drive needs the picture of the character"),
        ([WALKER, "--purpose", "drive", "--reference", "x.png"], "reference x.png: not a picture"),
        ([WALKER, "--reference", "x.png"], "--reference x.png is for --purpose drive"),
        ([WALKER, "--retarget"], "--retarget is for --purpose drive"),
        ([WALKER, "--purpose", "watch"], "argument --purpose: invalid choice: 'watch'"),
        ([WALKER, "--provider", "abacus"], "provider 'abacus' is unknown: use cpu, cuda, tensorrt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, animate(tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_all_problems_come_at_once(capsys, tmp_path):
    line = refused(capsys, animate(tmp_path / "out", WALKER, "--num-frames", 4, "--stride", 0, "--retarget"))
    assert "--num-frames 4 is not 4n + 1" in line and "--retarget is for" in line


def test_a_missing_model_is_named_with_its_source(capsys, tmp_path):
    files = {**FILES, "--pose": tmp_path / "vitpose.onnx"}
    line = refused(capsys, animate(tmp_path / "out", WALKER, files=files))
    assert f"--pose {tmp_path / 'vitpose.onnx'}: no such file" in line
    assert "wan-preprocess download" in line


def test_models_that_are_swapped_are_noticed(capsys, tmp_path):
    files = {**FILES, "--detector": FILES["--pose"]}
    assert "a person detector has input" in refused(capsys, animate(tmp_path / "out", WALKER, files=files))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_dataset_is_refused(capsys, tmp_path, command):
    output = ["--output", str(tmp_path / "sheets")] if command == "inspect" else []
    assert "is not a dataset of wan-accel" in refused(capsys, [command, str(tmp_path), *output])
    assert not (tmp_path / "sheets").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run of the command: one clip of 5 frames, and the arguments that made it."""
    output = tmp_path_factory.mktemp("cli") / "clips"
    small = ["--num-frames", 5, "--fps", 2, "--resolution-area", "160x288", "--max-clips", 1, "--num-threads", 2]
    arguments = animate(output, WALKER, *small)
    assert main(arguments) == 0
    return output, arguments


def test_the_same_command_again_says_that_nothing_is_to_do(made, capsys):
    assert main(made[1]) == 0
    assert "nothing to do, 1 videos finished, 0 rejected" in capsys.readouterr().out
    assert main(["status", str(made[0])]) == 0
    assert "1 of 1 videos done (100.0%): 1 finished, 0 rejected; 1 clips; 0 jobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (["--caption", "a woman"], "caption: '' there, 'a woman' now"),
        (["--pose-channel-order", "bgr"], "pose_channel_order: 'rgb' there, 'bgr' now"),
        (["--fp16"], "fp16: False there, True now"),
    ],
)
def test_another_setting_is_refused_with_the_difference(made, capsys, changed, difference):
    assert difference in refused(capsys, [*made[1], *changed])


def test_a_setting_that_says_what_the_profile_says_is_no_difference(made, capsys):
    assert main([*made[1], "--pose-channel-order", "rgb"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_verify_accepts_a_sound_dataset_and_names_a_damaged_part(made, capsys, tmp_path):
    assert main(["verify", str(made[0]), "--num-workers", "1"]) == 0
    assert "every part and every clip is sound (1 clips)" in capsys.readouterr().out
    copy = tmp_path / "copy"
    shutil.copytree(made[0], copy)
    (part,) = copy.rglob("*.arrow")
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    assert main(["verify", str(copy), "--num-workers", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert part.name in line and "differs from its hash" in line


def test_rejected_videos_are_reported(made, capsys, tmp_path):
    arguments = [argument if argument != str(made[0]) else str(tmp_path / "out") for argument in made[1]]
    arguments[1] = str(tmp_path / "noise.mp4")
    Path(arguments[1]).write_bytes(b"noise" * 50)
    assert "no video gave a clip" in refused_with_log(capsys, arguments)
    (entry,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (entry["path"], entry["reason"]) == (str(tmp_path / "noise.mp4"), "unreadable")


def refused_with_log(capsys, arguments: list[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]
