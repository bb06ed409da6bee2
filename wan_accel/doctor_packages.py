"""Python packages: versions, unmet requirements, packages that overwrite one another. Torch-free."""

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from wan_accel.doctor_finding import Finding, Job

# What this version's tests ran with: the pins of constraints.txt, which an installed copy does not have (a test
# compares them).
TESTED = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "diffsynth": "2.1.12",
    "torchao": "0.18.0",
    "safetensors": "0.8.0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """Versions that do not work together. `is_bad` takes the installed versions by name."""

    name: str
    is_bad: Callable[[Mapping[str, Version]], bool]
    advice: str


def _strange_torchvision(versions: Mapping[str, Version]) -> bool:
    """torchvision 0.(N + 15) is built for torch 2.N; another one's operators do not load."""
    torch, torchvision = versions["torch"], versions["torchvision"]
    return torch.major == 2 and torchvision.release[:2] != (0, torch.minor + 15)


# Those that requirements in the packages' metadata do not show already.
KNOWN_BAD = (
    Combination(
        name="torch, torchvision",
        is_bad=_strange_torchvision,
        advice="torchvision 0.(N + 15) belongs to torch 2.N: install the one of this torch, from the same index",
    ),
)
# Importable names, with the start of the names of packages that install them: only one of those may be there.
OWNED = {
    "onnxruntime": ("onnxruntime", "for GPUs keep onnxruntime-gpu[cuda,cudnn], otherwise onnxruntime"),
    "decord": ("decord", "keep decord2, which the tests ran with"),
    "cv2": ("opencv", "keep opencv-python, which this package requires"),
}
ONE_BUILD = ("nvidia-nccl-cu", "nvidia-cudnn-cu")


def check_python(job: Job) -> list[Finding]:
    version, wanted = platform.python_version(), metadata.metadata("wan-accel")["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return [Finding(name="Python", level="ok", value=version)]
    return [Finding(name="Python", level="problem", value=version, advice=f"use {wanted}")]


def check_versions(job: Job) -> list[Finding]:
    versions = installed()
    return [version_finding(name, versions.get(name)) for name in TESTED]


def version_finding(name: str, version: Version | None) -> Finding:
    """A version beside the tested one; whether it is high enough is for `check_requirements`."""
    if version is None:
        return Finding(name=name, level="problem", value="not installed", advice=f"pip install {name}=={TESTED[name]}")
    if version.base_version == TESTED[name]:
        return Finding(name=name, level="ok", value=str(version))
    return Finding(
        name=name, level="note", value=str(version), advice=f"the tests ran with {TESTED[name]}; others may work"
    )


def check_requirements(job: Job) -> list[Finding]:
    """What wan-accel requires, and what that requires, as `pip check` does for everything installed."""
    unmet = sorted(set(_unmet("wan-accel", (), installed(), set())))
    if not unmet:
        return [Finding(name="requirements", level="ok", value="all met")]
    return [
        Finding(
            name="requirements", level="problem", value=line, advice="install wan-accel again in a new environment"
        )
        for line in unmet
    ]


def check_combinations(job: Job) -> list[Finding]:
    versions = installed()
    if not versions.keys() >= {"torch", "torchvision"}:  # said above
        return []
    return [combination_finding(combination, versions) for combination in KNOWN_BAD]


def combination_finding(combination: Combination, versions: Mapping[str, Version]) -> Finding:
    value = ", ".join(f"{name} {versions[name]}" for name in combination.name.split(", "))
    if combination.is_bad(versions):
        return Finding(name=combination.name, level="problem", value=value, advice=combination.advice)
    return Finding(name=combination.name, level="ok", value=f"{value} belong together")


def check_owners(job: Job) -> list[Finding]:
    """Modules that two packages install: the files are those of the last one installed, whatever pip lists."""
    owners = {module: (owners_of(module, prefix), advice) for module, (prefix, advice) in OWNED.items()}
    names = installed()
    for prefix in ONE_BUILD:
        builds = sorted(name for name in names if name.startswith(prefix))
        owners[prefix.removesuffix("-cu")] = (builds, "keep the one that torch requires (pip show torch)")
    return [_owner_finding(name, found, advice) for name, (found, advice) in owners.items() if len(found) > 1] or [
        Finding(name="owners", level="ok", value=f"no two packages for {', '.join(owners)}")
    ]


def _owner_finding(name: str, owners: list[str], advice: str) -> Finding:
    return Finding(
        name=name, level="problem", value=f"{' and '.join(owners)} are installed over one another",
        advice=f"pip uninstall -y {' '.join(owners)}, then install one of them again: {advice}",
    )  # fmt: skip


def owners_of(module: str, prefix: str) -> list[str]:
    """Packages that install a module. Only those whose names begin so are opened: the lists of all take seconds."""
    owners = set()
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if not name.startswith(prefix):
            continue
        declared = (distribution.read_text("top_level.txt") or "").split()
        if module in (declared or {file.parts[0] for file in distribution.files or []}):
            owners.add(name)
    return sorted(owners)


def installed() -> dict[str, Version]:
    """Versions by canonical name; of a package that is on the path twice, the one that Python imports."""
    found: dict[str, Version] = {}
    for distribution in metadata.distributions():
        about = distribution.metadata
        if about["Name"] is not None:
            found.setdefault(canonicalize_name(about["Name"]), Version(about["Version"]))
    return found


def _unmet(name: str, extras: tuple[str, ...], versions: Mapping[str, Version], seen: set[str]) -> Iterator[str]:
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        marker, other = requirement.marker, canonicalize_name(requirement.name)
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if other not in versions:
            yield f"{name} requires {requirement.name}, which is not installed"
        elif not requirement.specifier.contains(versions[other], prereleases=True):
            yield f"{name} requires {requirement.name}{requirement.specifier}, and {versions[other]} is installed"
        elif (key := f"{other}{sorted(requirement.extras)}") not in seen:
            seen.add(key)
            yield from _unmet(other, tuple(requirement.extras), versions, seen)
