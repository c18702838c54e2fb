#!/usr/bin/env python3
"""What `make` uses to prepare .venv: checks the machine, installs torch, builds blockdraft, installs extras.

usage: environment.py check | create [TORCH ...] | build | extras NAME ...

`create` takes torch from the interpreter that runs it where that has 2.11 or newer; a requirement given as TORCH is
installed into .venv instead. In either case .venv/constraints.txt then pins torch, so that nothing replaces it.
"""

from __future__ import annotations  # an old Python must get as far as saying that it is one

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
DEFAULT_TORCH = "torch==2.13.0"  # always exact: a bare "torch" is the newest CUDA build
BUILD_TOOLS = ["scikit-build-core>=0.11", "pybind11>=2.13", "cmake>=3.28", "ninja>=1.11"]
PYTHON = os.path.join(".venv", "bin", "python")
CONSTRAINTS = os.path.join(".venv", "constraints.txt")
LOG = os.path.join(".venv", "build.log")


def say(text: str) -> None:
    print("==", text, flush=True)


def pip(*arguments: str) -> list[str]:
    constraints = ["-c", CONSTRAINTS] if os.path.exists(CONSTRAINTS) else []
    return [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", *constraints, *arguments]


def run(command: list[str]) -> None:
    status = subprocess.run(command).returncode
    if status:
        sys.exit("failed: " + " ".join(command))


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", "import " + name], stderr=subprocess.DEVNULL).returncode == 0


def compiles_cxx20() -> bool:
    names = [os.environ["CXX"].split()] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]  # as CMake looks
    compiler = next((name for name in names if shutil.which(name[0])), None)
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write("#include <bit>\nint main() { return std::bit_cast<int>(0.0f); }\n")
        command = [*compiler, "-std=c++20", source, "-o", os.path.join(folder, "probe")]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def missing() -> list[tuple[str, str]]:
    """What the machine lacks, each with the Debian or Ubuntu package that has it."""
    found = []
    if sys.version_info < OLDEST_PYTHON:
        return [(f"Python 3.11 or newer (this is {platform.python_version()}; another with PYTHON=...)", "python3.11")]
    if not (has_module("venv") and has_module("ensurepip")):
        found.append(("Python's venv module", "python3-venv"))
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        found.append(("Python's C headers", "python3-dev"))
    if not compiles_cxx20():
        found.append(("a C++20 compiler (g++ 11 or newer; another one with CXX=...)", "g++"))
    return found


def check() -> None:
    lacking = missing()
    for what, package in lacking:
        print(f"missing: {what} -- apt-get install {package}", file=sys.stderr)
    if lacking:
        sys.exit(2)


def torch_of(python: str) -> str:
    """Version of the torch that this interpreter imports, as pip knows it, "" for none."""
    probe = "import torch, importlib.metadata; print(importlib.metadata.version('torch'))"  # __version__ may add +cu130
    result = subprocess.run([python, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def new_enough(torch: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", torch)
    return numbers is not None and tuple(map(int, numbers.groups())) >= OLDEST_TORCH


def create_venv(shared: bool) -> None:
    run([sys.executable, "-m", "venv", "--clear", *(["--system-site-packages"] if shared else []), ".venv"])
    if shared and sys.prefix != sys.base_prefix:
        # A virtual environment made from another one sees the packages of the interpreter below both, not those.
        folder = f"python{sys.version_info.major}.{sys.version_info.minor}"
        with open(os.path.join(".venv", "lib", folder, "site-packages", "parent.pth"), "w") as file:
            file.write(sysconfig.get_paths()["purelib"] + "\n")


def create(requirement: list[str]) -> None:
    if os.path.realpath(sys.prefix) == os.path.realpath(".venv"):
        sys.exit("this python is the one of .venv, which is to be made anew: say `deactivate` first, or give PYTHON=")
    existing = torch_of(sys.executable) if not requirement else ""
    shared = new_enough(existing)
    say("creating .venv" + (f" on the torch {existing} that is installed" if shared else ""))
    create_venv(shared)
    if not shared:
        requirement = requirement or [DEFAULT_TORCH]
        say("installing " + " ".join(requirement) + " (TORCH=... for another)")
        run(pip(*requirement, "numpy"))
    torch = torch_of(PYTHON)
    if not new_enough(torch):
        sys.exit(f"torch 2.11 or newer is needed, got {torch or 'none'}")
    with open(CONSTRAINTS, "w") as file:
        file.write(f"torch=={torch}\n")
    say("installing build tools")
    # Also where the interpreter below has them: their commands must be in .venv/bin.
    run(pip("--quiet", "--ignore-installed", *BUILD_TOOLS))


def progress_line(line: str) -> bool:
    """Of a verbose build: the compiler's steps and what pip does, not the copying of files."""
    return bool(re.match(r"\s*(\[\d+/\d+\]|\*\*\*|Collecting|Successfully|ERROR|error)", line))


def build() -> None:
    """Editable, so that changed Python files count at once; dependencies come as wheels."""
    say(f"building the operators (a minute or two; whole log in {LOG})")
    command = pip("-v", "--no-build-isolation", "-e", ".")
    with open(LOG, "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout
        for line in process.stdout:
            log.write(line)
            if progress_line(line):
                print(line.rstrip()[:120], flush=True)
    if process.wait():
        with open(LOG) as log:
            sys.exit("".join(log.readlines()[-60:]) + "failed: " + " ".join(command))


def extras(names: list[str]) -> None:
    """Installs the requirements of these extras without building the package again."""
    import tomllib

    with open("pyproject.toml", "rb") as file:
        groups = tomllib.load(file)["project"]["optional-dependencies"]
    say("installing the extras " + ", ".join(names))
    own_commands = ["--ignore-installed"] if "dev" in names else []
    run(pip("--quiet", *own_commands, *(requirement for name in names for requirement in groups[name])))


def main() -> None:
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "check":
        check()
    elif command == "create":
        check()
        create(arguments)
    elif command == "build":
        build()
    elif command == "extras" and arguments:
        extras(arguments)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
