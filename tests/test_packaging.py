import ast
import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import blockdraft
from blockdraft import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "blockdraft"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "costs.json", "README.md")
DATA = ("py.typed", "_host.pyi", "trace.html", *(f"data/nano/{name}" for name in MODEL))


def tracked_files():
    """What the repository holds, without what a build or a tool left behind."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def texts(files):
    for path in files:
        data = path.read_bytes()
        if b"\0" not in data:
            yield path, data.decode()


def constant(path, name):
    """Value of a module-level constant, without importing the module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no {name}")


def test_version_is_written_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert constant(PACKAGE / "__init__.py", "__version__") == blockdraft.__version__
    assert f"## [{blockdraft.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("blockdraft")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree, not installed")
    assert installed == blockdraft.__version__


def test_torch_pin_of_the_build_and_of_make_agree():
    pin = constant(ROOT / "tools" / "build_backend.py", "TORCH")
    assert pin == constant(ROOT / "tools" / "environment.py", "DEFAULT_TORCH")
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", pin), "unpinned, pip takes the newest CUDA build"


def test_lint_versions_of_pre_commit_and_dev_extra_agree():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    pinned = {requirement for hook in hooks for requirement in hook.get("additional_dependencies", [])}
    assert pinned
    assert pinned <= set(PROJECT["project"]["optional-dependencies"]["dev"])


@pytest.mark.parametrize("name", DATA)
def test_package_data_is_beside_the_package(name):
    assert (Path(blockdraft.__file__).parent / name).is_file()


def test_package_data_is_not_ignored():
    """The wheel and the source distribution leave out what .gitignore names."""
    command = ["git", "check-ignore", *(str(PACKAGE / name) for name in DATA)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == ""


def test_bundled_model_is_small():
    files = list(blockdraft.bundled_model().iterdir())
    assert sum(path.stat().st_size for path in files) <= 12 * 10**6


def test_console_script_exists():
    module, function = PROJECT["project"]["scripts"]["blockdraft"].split(":")
    tree = ast.parse((ROOT / "python" / f"{module.replace('.', '/')}.py").read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


# Absolute paths of someone's machine, addresses of package registries, options that name one.
FORBIDDEN = re.compile(r"/(?:home|root|work)/\w|pypi\.org|files\.pythonhosted|download\.pytorch|--(?:extra-)?index-url")


def test_no_machine_paths_or_registry_hosts():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in texts(tracked_files())
        if path != Path(__file__) and (match := FORBIDDEN.search(text))
    ]
    assert not found


def test_documents_link_to_files_that_exist():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


COMMANDS = ("demo", "generate", "info", "bench", "verify", "calibrate", "trace", "sweep", "passk", "roofline")


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_every_command(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main([command, "--help"])
    assert f"blockdraft {command}" in (ROOT / "README.md").read_text()
