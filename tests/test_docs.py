"""What the pages say is so: commands are read by the real parser, marked blocks are run, links lead somewhere.

A block after the line `<!-- run -->` is run with the box, with two steps, in the order of its page.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from docs_tools import hooks, reference
from sfumato.cli.drawing import original_script
from sfumato.cli.main import COMMANDS, main, parser
from sfumato.types import Job

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
OURS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "index.md", DOCS / "migration.md", DOCS / "comparison.md",
        *sorted(DOCS.glob("learn/*.md")), *sorted(DOCS.glob("how-it-works/*.md"))]  # fmt: skip
BLOCK = re.compile(r"^(<!-- run -->\n)?```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    runs: bool
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(page, bool(mark), kind, text) for mark, kind, text in found]


def commands(text: str) -> list[list[str]]:
    """The words of each line; a line that ends in a backslash goes on, and comments are none."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.split("  #")[0], comments=True))]


@pytest.fixture(scope="module")
def top() -> argparse.ArgumentParser:
    return parser()


def problem(words: list[str], top: argparse.ArgumentParser, capsys) -> str | None:
    """What is wrong with a command; None where nothing is, or it is another program's."""
    if ">" in words:
        words = words[: words.index(">")]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    try:
        if words[0] == "sfumato" and words[1:] != ["--version"]:
            top.parse_args(words[1:])
        if words[:2] in (["python", "scripts/txt2img.py"], ["python", "scripts/img2img.py"]):
            name = Path(words[1]).stem
            original_script(importlib.import_module(f"sfumato.cli.{name}").ORIGINAL, name, words[2:])
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("recipes", "docs_tools"):
            text = (ROOT / f"{words[2].replace('.', '/')}.py").read_text()
            unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
            return f"{unknown} are no flags of {words[2]}" if unknown else None
    except SystemExit:
        return capsys.readouterr().err.splitlines()[-1]
    if words[0] == "make":
        return None if all(word in TARGETS or "=" in word for word in words[1:]) else f"{words} is no target"
    return None


@pytest.mark.parametrize("page", OURS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_read_by_the_parser(page, top, capsys):
    wrong = {
        " ".join(words): found
        for block in blocks(page)
        if block.kind == "sh"
        for words in commands(block.text)
        if (found := problem(words, top, capsys))
    }
    assert wrong == {}


def test_commands_in_the_tables_of_the_readme_are_read_by_the_parser(top, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [command for command in re.findall(r"`((?:sfumato|python scripts/)[^`]+)`", text) if " " in command]
    wrong = {each: why for each in found if (why := problem(shlex.split(each), top, capsys))}
    assert len(found) > 20 and wrong == {}


def test_a_misspelt_flag_is_found(top, capsys):
    assert "--stpes" in (problem(["sfumato", "txt2img", "--prompt", "a", "--stpes", "2"], top, capsys) or "")
    assert problem(["make", "pictures"], top, capsys)
    assert problem(["python", "-m", "recipes.box.train", "clip", "--no-such-flag"], top, capsys)
    assert problem(["python", "scripts/txt2img.py", "--pmls"], top, capsys)


THEIRS = {"--indir", "--dpm", "--medvram", "--lowvram", "--build-arg", "--version", "--help"}


def spellings(sub: argparse.ArgumentParser) -> set[str]:
    """Every flag of a parser and of those below it."""
    own = {spelling for action in sub._actions for spelling in action.option_strings}
    return own.union(*(spellings(inner) for _, inner in reference.subparsers(sub)))


@pytest.mark.parametrize("page", OURS, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_named_in_the_text_are_flags(page, top):
    text = "\n".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text))
    assert named - spellings(top) - THEIRS == set()


def test_fields_named_for_other_programs_are_fields_of_a_job():
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]+) \|$", (DOCS / "migration.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z_]+)`", row)]
    strangers = set(named) - set(Job.__dataclass_fields__) - {"x_mask.png"}
    assert len(named) > 40 and strangers == set()


@pytest.mark.parametrize("page", OURS, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_imports_what_there_is(page):
    for block in blocks(page):
        if block.kind == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfumato"):
                    module = importlib.import_module(node.module)
                    assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def in_two_steps(words: list[str], top: argparse.ArgumentParser) -> list[str]:
    """The command with --steps 2 where it has steps, on the CPU where it has a device."""
    sub = dict(reference.subparsers(top))[words[0]]
    inner = dict(reference.subparsers(sub)).get(words[1] if len(words) > 1 else "")
    flags = [spelling for each in (inner or sub)._actions for spelling in each.option_strings]
    own = ["--steps", "2"] if "--steps" in flags else []
    return [*words, *own, *(["--device", "cpu"] if "--device" in flags else [])]


RUN = [page for page in OURS if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_marked_blocks_run(page, top, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_ADAPTERS", raising=False)
    for block in blocks(page):
        if not block.runs:
            continue
        if block.kind == "python":
            text = re.sub(r"(steps)=\d+", r"\1=2", block.text)
            exec(compile(text, str(page), "exec"), {"__name__": "page"})
            continue
        for words in commands(block.text):
            assert words[0] == "sfumato", "only these are run"
            assert main(in_two_steps(words[1:], top)) == 0, words
    assert list(tmp_path.rglob("*.png"))


def test_how_it_works_draws_with_no_more_than_it_shows():
    """The block that shows the whole of drawing is the whole of drawing."""
    (block,) = [each for each in blocks(DOCS / "how-it-works" / "index.md") if each.kind == "python"]
    shown: dict = {}
    exec(compile(block.text.replace('"karras", schedule, 20', '"karras", schedule, 6'), "index.md", "exec"), shown)
    red, green, blue = shown["pixels"][0, :, 48:80, 48:80].mean((1, 2)).tolist()
    assert red > 0.4 > 0 > max(green, blue)


def heads(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are spelled in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    made = {DOCS / name for name in reference.PAGES}
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() or file in made, f"{page.name}: {target}"
        if anchor and file.suffix == ".md" and file not in made:
            assert anchor in heads(file), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(reference.PAGES)
    assert named - there == set()
    mine = ("learn", "how-it-works", "reference")
    assert {name for name in there if name.split("/")[0] in mine} - named == set()


def test_links_out_of_the_docs_become_text_or_lead_to_the_repository():
    text = "[test](../tests/test_docs.py#L1), [b](other.md), ![c](../d.png), [`tests/x.py`](../../tests/x.py)"
    found = hooks.inward(text, "page.md", None)
    assert found.startswith("test (`tests/test_docs.py`), [b](other.md), ![c](../d.png)")
    assert hooks.inward("[x](../y.md)", "learn/page.md", None) == "[x](../y.md)"
    assert hooks.inward("[x](../../y.py)", "learn/page.md", "https://h/o/r") == "[x](https://h/o/r/blob/main/y.py)"


def test_the_reference_has_every_command_and_every_field():
    page = reference.command_line()
    assert [name for name in COMMANDS if f"\n## sfumato {name}\n" not in page] == []
    assert "`--prompt TEXT`" in page and "| 130 |" in page and "### sfumato lora merge" in page
    rows = reference.job_page()
    groups = {name for name in Job.__dataclass_fields__ if f"| `{name}` |" not in rows and name != "hires"}
    assert groups == set() and "| `hires.scale` |" in rows


FIGURES = [
    ("loading.json", ["median", "sfumato, single file", "ready_s"], "2.304"),
    ("loading.json", ["median", "sfumato, folder", "ready_s"], "2.603"),
    ("loading.json", ["median", "diffusers, folder", "ready_s"], "5.935"),
    ("loading.json", ["median", "sfumato, single file", "resident_gb"], "0.257"),
    ("loading.json", ["median", "diffusers, folder", "resident_gb"], "0.488"),
    ("loading.json", ["median", "diffusers, folder", "load_s"], "0.437"),
    ("picture_seconds-2026-11-22.json", ["seconds", "command to picture", "median"], "3.82"),
    ("picture_seconds-2026-11-22.json", ["seconds", "draw 1", "median"], "1.83"),
    ("picture_seconds-2026-11-22.json", ["seconds", "draw 8", "median"], "5.81"),
    ("unet_call-openvino-2026-11-22.json", ["sizes", "512", "ratio", "plain", "wall", "median"], "0.998"),
    ("unet_call-openvino-2026-11-22.json", ["sizes", "512", "ratio", "fast", "wall", "median"], "0.665"),
    ("unet_call-openvino-2026-11-22.json", ["sizes", "512", "ratio", "openvino", "wall", "median"], "0.825"),
    ("picture-sd1-512-2026-11-23.json", ["runs", "fast", 0, "wall", "whole"], "176.1"),
    ("picture-sd1-512-2026-11-23.json", ["runs", "diffusers", 0, "wall", "whole"], "264.4"),
    ("picture-sd1-512-2026-11-23.json", ["peak of weights", "fast"], "2.88"),
    ("train_step-AVX512-fp32-2026-11-23.json", ["shapes", "box", "times_as_fast", "processor"], "1.59"),
    ("train_step-AVX512-fp32-2026-11-23.json", ["shapes", "sd", "times_as_fast", "processor"], "1.67"),
    ("train_step-AVX512-bf16-2026-11-23.json", ["shapes", "box", "times_as_fast", "processor"], "1.54"),
    ("train_step-AVX2-fp32-2026-11-23.json", ["shapes", "box", "times_as_fast", "processor"], "1.44"),
    ("train_step-AVX2-fp32-2026-11-23.json", ["shapes", "sd", "times_as_fast", "processor"], "1.36"),
    ("serving-2026-11-22.json", ["figures", "merged", "pictures a second"], "1.79"),
    ("serving-2026-11-22.json", ["figures", "one at a time", "pictures a second"], "0.73"),
    ("serving-2026-11-22.json", ["figures", "merged", "p50 wait"], "6.9"),
    ("serving-2026-11-22.json", ["figures", "merged", "worst wait"], "19.2"),
    ("tiles-memory-2026-11-22.json", ["ways", "whole", "512", "MiB"], "183.9"),
    ("tiles-memory-2026-11-22.json", ["ways", "tiles", "4096", "MiB"], "249.6"),
    ("tiles-memory-2026-11-22.json", ["ways", "tiles", "4096", "seconds"], "525.8"),
    ("sampler_error-2026-11-22.json", ["errors", "deterministic", "euler", 4, 1], "0.0790"),
    ("sampler_error-2026-11-22.json", ["errors", "deterministic", "heun", 2, 1], "0.0462"),
    ("sampler_error-2026-11-22.json", ["errors", "deterministic", "dpmpp_2m", 4, 1], "0.0122"),
    ("sampler_error-2026-11-22.json", ["errors", "deterministic", "unipc", 4, 1], "0.0023"),
]


@pytest.mark.parametrize("file, where, said", FIGURES, ids=lambda value: value if isinstance(value, str) else "-")
def test_the_comparison_says_what_was_measured(file, where, said):
    value = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    for key in where:
        value = value[key]
    assert f"{value:.{len(said.partition('.')[2])}f}" == said
    assert f"| {said} |" in (DOCS / "comparison.md").read_text(encoding="utf-8")


def test_figures_of_numbers_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from docs_tools import figures

    assert figures.main(["noise-schedules", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "noise-schedules.png").stat().st_size > 10_000
    kept = {path.stem for path in figures.OUT.glob("*.png")}
    assert kept == set(figures.FIGURES)
    assert all(path.stat().st_size < 300_000 for path in figures.OUT.glob("*.png"))


def test_the_site_asks_nobody_elses_host():
    """The configuration is strict and fetches nothing; `make docs` builds it."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "strict: true" in text and "font: false" in text and "http" not in text


def test_no_page_names_a_place_of_a_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp)/", page.read_text(encoding="utf-8")), page
