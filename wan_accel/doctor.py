"""`wan-accel doctor`: what a machine, or the ranks of a launch, lack for training.

On one machine it is the command; links are measured by this module under `accelerate launch`, which sets the ranks up.
It imports nothing that may itself be broken: a package that cannot be imported is a finding.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module

from wan_accel.doctor_finding import Finding, Job, add_options, as_json, as_text, exit_code, job_of

# Modules and functions of Job -> list[Finding], in the order of the report: a check more is a row more.
CHECKS = (
    ("doctor_packages", "check_python"),
    ("doctor_packages", "check_versions"),
    ("doctor_packages", "check_requirements"),
    ("doctor_packages", "check_combinations"),
    ("doctor_packages", "check_owners"),
    ("doctor_gpu", "check_gpus"),
    ("doctor_gpu", "check_driver"),
    ("doctor_gpu", "check_nccl"),
    ("doctor_gpu", "check_recipe"),
    ("doctor_gpu", "check_provider"),
    ("doctor_machine", "check_memory"),
    ("doctor_machine", "check_shared_memory"),
    ("doctor_machine", "check_open_files"),
    ("doctor_machine", "check_compiler"),
    ("doctor_machine", "check_video"),
    ("doctor_machine", "check_hub"),
    ("doctor_disk", "check_disk"),
)


def examine(job: Job) -> list[Finding]:
    """Everything that one process can find out about its machine."""
    return [finding for module, name in CHECKS for finding in run_check(module, name, job)]


def run_check(module: str, name: str, job: Job) -> list[Finding]:
    """A row of the table. Whatever it raises is a finding: a broken driver or library must not hide the others."""
    try:
        return getattr(import_module(f"wan_accel.{module}"), name)(job)
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
        advice = "what this check uses is broken: mend it first (versions and requirements are above)"
        return [Finding(name=name.removeprefix("check_"), level="problem", value=value, advice=advice)]


def show(findings: Sequence[Finding], *, is_json: bool) -> int:
    """Print the report; returns the exit code."""
    sys.stdout.write((as_json(findings) if is_json else as_text(findings)) + "\n")
    return exit_code(findings)


def main(argv: Sequence[str] | None = None) -> int:
    """The module's entry, on each rank of a launch."""
    parser = argparse.ArgumentParser(prog="wan_accel.doctor", description="Examine a launch.", allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--link_mib", type=int, help="size of the tensors that measure links: 64 on GPUs, 4 on CPUs")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, where JSON must be alone
            from accelerate import PartialState

            from wan_accel.doctor_launch import examine_ranks
            from wan_accel.parallel.engine import launched_engine

            findings = examine_ranks(job_of(arguments, overrides, engine=launched_engine()))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    state = PartialState()
    code = show(findings, is_json=arguments.json) if state.is_main_process else exit_code(findings)
    state.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
