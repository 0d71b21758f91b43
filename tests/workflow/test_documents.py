"""What the documents say, held against the code."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from checkout import Checkout, copy_repository

from commands import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTES = ROOT / "envs/README.md"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def readme_edges() -> set[tuple[str, str]]:
    """The arrows of the README's picture."""
    (picture,) = re.findall(r"```mermaid\n(.*?)```", README, re.DOTALL)
    edges: set[tuple[str, str]] = set()
    for line in picture.splitlines():
        names = [name.strip() for name in line.split("-->")]
        edges |= set(itertools.pairwise(names))
    return edges


def without_shortcuts(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no path of other arrows makes needless."""

    def reachable(start: str, goal: str, left_out: tuple[str, str]) -> bool:
        following = {b for a, b in edges if a == start and (a, b) != left_out}
        return goal in following or any(reachable(each, goal, left_out) for each in following)

    return {(a, b) for a, b in edges if not reachable(a, b, (a, b))}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_repository(tmp_path_factory.mktemp("documents"))


def test_the_picture_shows_the_rules(checkout: Checkout) -> None:
    done = checkout.snakemake("--profile", "local", "--rulegraph", "dot", "all")
    assert done.returncode == 0, done.stdout
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', done.stdout))
    arrows = re.findall(r"(\d+) -> (\d+)", done.stdout)
    rules = {(names[a], names[b]) for a, b in arrows if names[b] != "all"}
    assert without_shortcuts(rules) == readme_edges()


def test_every_stage_of_the_readme_is_a_rule() -> None:
    stages = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    rules = {
        name
        for path in (ROOT / "rules").glob("*.smk")
        for name in re.findall(r"^rule (\w+):", path.read_text(), re.MULTILINE)
    }
    assert len(stages) == 7 and stages <= rules


def test_every_path_that_the_readme_names_is_there() -> None:
    named = set(
        re.findall(r"[\w./-]*(?:config|profiles|envs|rules|scripts|tests)/[\w./-]+", README)
    )
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    made = {name for name in named if name.startswith("results/")}
    assert len(named - made) >= 4
    for name in named - made:
        assert (ROOT / name).exists(), name


def imported(file: Path) -> set[str]:
    """The modules that a file imports, by their full names, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_rooms_know_only_those_before_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (listed,) = re.findall(r"in rooms that know only those before them: ([^.]+)\.", text)
    rooms = re.findall(r"`(\w+)`", listed)
    library = ROOT / "scripts" / "megaqwen"
    assert set(rooms) == {file.parent.name for file in library.glob("*/*.py")}
    for number, room in enumerate(rooms):
        for file in (library / room).rglob("*.py"):
            known = {name.split(".")[1] for name in imported(file) if name.startswith("megaqwen.")}
            assert not known & set(rooms[number + 1 :]), file
    assert not any(
        name.startswith("snakemake") for f in library.rglob("*.py") for name in imported(f)
    )


def locked_versions() -> dict[str, str]:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return {package["name"]: package.get("version") for package in packages}


def test_the_conda_environment_is_that_of_the_lock() -> None:
    locked = locked_versions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "envs/megaqwen.yaml").read_text())
    (pip,) = (each["pip"] for each in environment["dependencies"] if isinstance(each, dict))
    pins = {}
    for pin in pip:
        requirement, version = pin.split("==")
        pins[requirement.split("[")[0]] = version
    assert pins == {name: locked[name] for name in pins}
    needed = {re.split(r"[\[<>=]", requirement)[0] for requirement in project["dependencies"]}
    # A job of a stage needs no Snakemake of its own environment.
    assert {name for name in needed if "snakemake" not in name} == set(pins)


def test_the_container_is_that_of_the_lock() -> None:
    definition = (ROOT / "envs/megaqwen.def").read_text()
    (image,) = re.findall(r"^From: (.+)", definition, re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)
    copied = re.findall(r"^ +([\w.-]+) /opt/lock/([\w.-]+)$", definition, re.MULTILINE)
    assert {name for name, same in copied if name == same} == {
        *("pyproject.toml", "uv.lock", ".python-version"),
    }
    # All that is installed is what the lock names; a pin beside it could differ.
    assert "uv sync --frozen --no-dev --extra gpu" in definition
    assert "==" not in definition.split("%test")[0]
    cuda = ".".join(locked_versions()["nvidia-cuda-runtime"].split(".")[:2])
    assert f"CUDA toolkit ({cuda}," in definition
    assert f"torch.version.cuda == '{cuda}'" in definition
    notes = NOTES.read_text()
    assert f"modules: cuda/{cuda}" in notes and f"major version, {cuda.split('.')[0]}," in notes
    assert f"docker://{image.replace('/', '#', 1)}" in notes


@pytest.mark.parametrize("before", ["", "LANG=C\nPATH=/of/the/image\n"])
def test_the_container_has_its_path_where_enroot_looks(tmp_path: Path, before: str) -> None:
    """The commands of the recipe, as the notes have enroot run them, without what installs."""
    (command,) = re.findall(r"sh -ec \"\$\((sed .+)\)\"$", NOTES.read_text(), re.MULTILINE)
    post = subprocess.run(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    assert "uv sync --frozen" in post
    lines = [line for line in post.splitlines() if "/etc/environment" in line]
    file = tmp_path / "environment"
    if before:
        file.write_text(before)
    script = "\n".join(lines).replace("/etc/environment", str(file))
    subprocess.run(["sh", "-ec", script], env={"PATH": "/usr/bin:/bin"}, check=True)
    kept = ["LANG=C"] if before else []
    assert file.read_text().splitlines() == [*kept, "PATH=/opt/megaqwen/bin:/usr/bin:/bin"]


def test_every_config_has_its_schema_for_editors() -> None:
    for path in [
        ROOT / "config/config.yaml",
        *sorted((ROOT / "config/experiments").glob("*.yaml")),
    ]:
        first = path.read_text().splitlines()[0]
        prefix = "# yaml-language-server: $schema="
        assert first.startswith(prefix), path
        assert (path.parent / first.removeprefix(prefix)).resolve().is_file(), path


def test_what_is_generated_from_the_config_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate_config.py", "--check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_the_docstring(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first = script.read_text().split('"""')[1].splitlines()[0]
    assert first in done.stdout
