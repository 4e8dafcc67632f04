"""Packages hold what they must and nothing else; house files are there and agree with one another."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import yaml

from docs_tools.package import contents, main, problems
from sfumato import __version__

ROOT = Path(__file__).parents[1]
NAMES = (
    "sfumato/box.safetensors", "sfumato/py.typed", "sfumato/__init__.pyi", "sfumato/cli/main.py",
    "sfumato/kernels/winograd.cpp", "sfumato/kernels/vectors.h",
    "sfumato/models/clip_merges.txt.gz", "sfumato-0.1.0.dist-info/licenses/LICENSES/x.txt",
)  # fmt: skip
GOOD = dict.fromkeys(NAMES, 1)


def test_a_good_package_has_no_problems_and_each_lack_is_told():
    assert problems("a.whl", GOOD, 1) == []
    for name in GOOD:
        rest = {each: size for each, size in GOOD.items() if each != name}
        assert len(problems("a.whl", rest, 1)) == 1, name
    assert problems("a.whl", GOOD | {"tests/test_box.py": 1}, 1) == ["a.whl: tests/test_box.py does not belong there"]
    assert "are allowed" in problems("a.whl", GOOD, 10**9)[0]


def test_a_folder_is_looked_through(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in GOOD:
            wheel.writestr(name, "x")
    assert contents(tmp_path / "a.whl") == GOOD
    assert main([str(tmp_path)]) == 0
    assert "all is there" in capsys.readouterr().out


def test_what_must_be_in_a_package_is_in_the_tree():
    for name in ("box.safetensors", "py.typed", "__init__.pyi"):
        assert (ROOT / "sfumato" / name).is_file()


def test_the_versions_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__ and cited["cff-version"] == "1.2.0"
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "Unreleased"


def test_the_workflow_does_what_every_change_must_pass():
    flow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text(encoding="utf-8"))
    assert ".ci/run" in [step.get("run") for step in flow["jobs"]["test"]["steps"]]
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy", "codespell"}


def test_the_container_copies_only_what_is_there():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    copied = {name for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]}
    assert copied <= allowed and all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["sfumato"]' in text
