"""`wan-accel doctor`: what each check says of good and bad machines, and the links of a launch."""

import json
from pathlib import Path

import pytest
from packaging.version import Version
from ranks import run_ranks

from wan_accel import doctor, doctor_disk, doctor_machine, doctor_packages, doctor_ranks
from wan_accel.cli import main
from wan_accel.doctor_finding import Finding, Job, as_text, exit_code
from wan_accel.doctor_gpu import Gpu, gpu_finding, no_gpu_finding, provider_finding
from wan_accel.doctor_links import ring_phases
from wan_accel.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
GIB = 2**30
HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


def test_the_command_measures_the_recipes_folder_and_removes_its_file(tmp_path: Path, capsys) -> None:
    overrides = [f"training.output_dir={tmp_path / 'runs' / 'new'}", "model.attention=flash_3"]
    code = main(["doctor", "demo/animate_lora", "--disk_mib", "4", "--json", *overrides])
    findings = {found["name"]: found for found in json.loads(capsys.readouterr().out)}
    assert findings.keys() >= {"Python", "torch", "requirements", "owners", "NCCL", "host", "ulimit -n", "disk"}
    assert findings["disk"]["value"].startswith(str(tmp_path))
    assert "(one process, 4 MiB)" in findings["disk speed"]["value"]
    assert list(tmp_path.iterdir()) == []
    assert "needs an NVIDIA GPU" in findings["model.attention=flash_3"]["value"]
    assert code == 1


def test_the_command_refuses_what_it_cannot_use(tmp_path: Path, capsys) -> None:
    assert main(["doctor", "--disk_mib", "0"]) == 2
    assert "--disk_mib 0: give 1 or more" in capsys.readouterr().err
    assert main(["doctor", "--parallel.ulysses=2"]) == 2
    assert "without a recipe" in capsys.readouterr().err


def test_text_and_exit_code() -> None:
    findings = [
        Finding(name="a", level="ok", value="1"), Finding(name="longer", level="warning", value="2", advice="do it"),
    ]  # fmt: skip
    assert as_text(findings).splitlines() == [
        "ok       a       1", "warning  longer  2", "                 -> do it", "problems: 0, warnings: 1, notes: 0",
    ]  # fmt: skip
    assert exit_code(findings) == 0
    assert exit_code([*findings, Finding(name="b", level="problem", value="3")]) == 1


def test_a_check_that_breaks_is_a_finding() -> None:
    (finding,) = doctor.run_check("doctor_nothing", "check_nothing", Job())
    assert (finding.name, finding.level) == ("nothing", "problem")
    assert finding.value.startswith("ModuleNotFoundError")


def test_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in doctor_packages.TESTED} == doctor_packages.TESTED


def test_versions() -> None:
    tested = doctor_packages.TESTED["torch"]
    assert doctor_packages.version_finding("torch", Version(f"{tested}+cu130")).level == "ok"
    assert doctor_packages.version_finding("torch", Version("2.8.0a0")).level == "note"
    assert doctor_packages.version_finding("torch", None).level == "problem"
    (pair,) = doctor_packages.KNOWN_BAD
    for torch, torchvision, level in (("2.14.1", "0.29.1", "ok"), ("2.15.0", "0.29.1", "problem")):
        versions = {"torch": Version(torch), "torchvision": Version(torchvision)}
        assert doctor_packages.combination_finding(pair, versions).level == level


def package(folder: Path, name: str, version: str, *, modules: str = "", requires: str = "") -> None:
    """What pip leaves of a package, without the package."""
    listed = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    listed.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (listed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    (listed / "top_level.txt").write_text(f"{modules}\n")


def test_packages_over_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "opencv-python-headless", "4.11.0", modules="cv2")
    package(tmp_path, "onnxruntime-gpu", "1.32.0", modules="onnxruntime")
    package(tmp_path, "onnxruntime-tools", "1.7.0", modules="onnxruntime_tools")  # has files of its own
    package(tmp_path, "nvidia-nccl-cu11", "2.20.0")
    package(tmp_path, "nvidia-nccl-cu12", "2.27.0")
    monkeypatch.syspath_prepend(tmp_path)
    findings = {finding.name: finding for finding in doctor_packages.check_owners(Job())}
    assert findings["cv2"].value == "opencv-python and opencv-python-headless are installed over one another"
    assert findings["onnxruntime"].advice.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then install one")
    assert "nvidia-nccl-cu11 and nvidia-nccl-cu12" in findings["nvidia-nccl"].value
    assert {finding.level for finding in findings.values()} == {"problem"}


def test_unmet_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "peft", "0.1", requires="accelerate>=99")
    monkeypatch.syspath_prepend(tmp_path)
    values = [finding.value for finding in doctor_packages.check_requirements(Job()) if finding.level == "problem"]
    assert "wan-accel requires peft>=0.18, and 0.1 is installed" in values
    assert any(value.startswith("peft requires accelerate>=99, and ") for value in values)


@pytest.mark.parametrize(
    ("name", "capability", "free", "level", "says"),
    [
        ("NVIDIA H200", (9, 0), 139, "ok", "140 GiB, compute capability 9.0; bf16 yes, fp8 yes, FlashAttention 3 yes"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 139, "ok", "fp8 no, FlashAttention 3 no; peak 312 TFLOP/s"),
        ("NVIDIA H200", (9, 0), 40, "warning", "peak 989.4 TFLOP/s"),
        ("Tesla V100", (7, 0), 139, "warning", "bf16 no, fp8 no, FlashAttention 3 no; peak unknown"),
    ],
)
def test_gpus(name: str, capability: tuple[int, int], free: int, level: str, says: str) -> None:
    gpu = Gpu(index=0, name=name, capability=capability, total_bytes=140 * GIB, free_bytes=free * GIB)
    finding = gpu_finding(gpu)
    assert finding.level == level
    assert says in finding.value


def test_no_gpu() -> None:
    assert no_gpu_finding("13.0", False, None).level == "note"
    assert no_gpu_finding("13.0", True, "").level == "note"
    assert no_gpu_finding(None, True, None).value == "the torch installed is built without CUDA"
    assert no_gpu_finding("13.0", True, "9").value == "none of those in CUDA_VISIBLE_DEVICES='9'"
    assert no_gpu_finding("13.0", True, None).level == "problem"
    assert provider_finding(["CPUExecutionProvider"], has_gpu=True).level == "warning"
    assert provider_finding(["CPUExecutionProvider"], has_gpu=False).level == "ok"


def test_shared_memory_and_open_files() -> None:
    needed = doctor_machine.shared_bytes(Job(), num_processes=8)
    assert needed == 8 * 4 * 2 * 32 * 2**20
    overrides = ["data.on_the_fly=[video]", "training.dataloader_num_workers=1"]
    live = Job(recipe=load_recipe("demo/animate_lora", overrides))
    assert doctor_machine.shared_bytes(live, num_processes=1) == 2 * 512 * 2**20
    docker = doctor_machine.shared_memory_finding(64 * 2**20, needed)
    assert (docker.level, docker.value) == ("warning", "0.1 GiB free, workers may take 2.0 GiB")
    levels = [doctor_machine.open_files_finding(soft, 4096).level for soft in (256, 1024, 4096)]
    assert levels == ["warning", "note", "ok"]


def test_compilers() -> None:
    find = doctor_machine.compiler_finding
    assert find(None, {}, engine="zero3").value == "no g++ and no ninja"
    assert [find(None, {}, engine=engine).level for engine in ("zero3", "fsdp2")] == ["warning", "note"]
    assert find("/usr/bin/g++", {"/usr/bin/ninja": "1.11", "/venv/bin/ninja": "1.13"}, engine=None).level == "warning"
    assert find("/usr/bin/g++", {"/venv/bin/ninja": "1.13"}, engine=None).value == "g++, ninja 1.13"


def test_disks(tmp_path: Path) -> None:
    assert doctor_disk.filesystem_of(Path("/proc/self")) == "proc"
    levels = {kind: doctor_disk.room_finding(tmp_path, kind, 99 * GIB).level for kind in ("ext4", "tmpfs", "nfs4")}
    assert levels == {"ext4": "ok", "tmpfs": "warning", "nfs4": "note"}
    assert doctor_disk.room_finding(tmp_path, "ext4", 9 * GIB).level == "warning"
    slow = doctor_disk.speed_finding(doctor_disk.DiskSpeed(write=50, read=500), 256)
    assert (slow.level, "takes 57 minutes" in slow.advice) == ("warning", True)
    full = doctor_disk.check_disk(Job(output_dir=Path("/proc/self/fdinfo"), disk_mib=1))
    assert full[-1].level in ("note", "problem")  # no room, or no right to write


@pytest.mark.parametrize(("size", "num_phases", "num_links"), [(2, 1, 1), (3, 3, 3), (4, 2, 4), (5, 3, 5)])
def test_rounds_of_links_are_disjoint(size: int, num_phases: int, num_links: int) -> None:
    phases = ring_phases(range(10, 10 + size))
    assert len(phases) == num_phases
    assert all(len({rank for pair in phase for rank in pair}) == 2 * len(phase) for phase in phases)
    assert len({tuple(sorted(pair)) for phase in phases for pair in phase}) == num_links


def test_slow_and_different_ranks_are_named() -> None:
    slow = doctor_ranks.spread("speed", {0: 100.0, 1: 99.0, 2: 98.0, 3: 40.0}, HOSTS)
    assert (slow.level, slow.value) == ("warning", "98.5; slowest 40, rank 3 (b); fastest 100, rank 0 (a)")
    assert doctor_ranks.spread("speed", {0: 100.0, 1: 90.0}, HOSTS).level == "ok"
    other = doctor_ranks.difference("torch", {0: "2.14", 1: "2.14", 2: "2.13", 3: "2.14"}, HOSTS)
    assert other is not None and other.level == "problem"
    assert other.value == "rank 2 (b) has 2.13; the others have 2.14"
    assert doctor_ranks.difference("torch", dict.fromkeys(HOSTS, "2.14"), HOSTS) is None


def test_a_slow_link_is_named_among_its_kind() -> None:
    """Between machines 20 is usual, inside one it is slow."""
    links = {0: {1: 300.0, 3: 20.0}, 1: {0: 299.0, 2: 21.0}, 2: {1: 21.0, 3: 310.0}, 3: {2: 310.0, 0: 20.0}}
    assert doctor_ranks.link_finding("dp_shard", links, HOSTS).level == "ok"
    hosts = {**HOSTS, 4: "b"}
    links[4] = {3: 20.0}
    found = doctor_ranks.link_finding("dp_shard", links, hosts)
    assert found.level == "warning"
    assert found.value == "inside machines 299, between machines 20.5; slowest 20, rank 3 (b) - rank 4 (b)"


def launched(output_dir: str) -> tuple[int, str]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        overrides = ["parallel.ulysses=2", "data.global_batch.samples=2", "memory.compile=false"]
        options = ["--json", "--disk_mib", "1", "--link_mib", "1", "--output_dir", output_dir]
        code = doctor.main(["demo/animate_lora", *options, *overrides])
    return code, out.getvalue()


def test_two_ranks(tmp_path: Path) -> None:
    (code, text), (other_code, nothing) = run_ranks(launched, 2, str(tmp_path), engine="fsdp2")
    assert (code, nothing) == (other_code, "")
    findings = {found["name"]: found for found in json.loads(text)}
    assert findings["ranks"]["value"] == "2 on 1 machines, all alike"
    for axis in ("ulysses", "dp_shard"):
        for collective in ("all-gather", "reduce-scatter", "all-to-all", "all-reduce"):
            assert "slowest" in findings[f"{axis} {collective} GB/s"]["value"]
        assert "rank 0" in findings[f"{axis} links GB/s"]["value"]
    assert findings["disk"]["value"].startswith(str(tmp_path))
