"""Reference pages as Markdown, made from the program: the command line from its parser, a Job from its dataclass.

Made when the site is built, so that they cannot grow old. Knows nothing of MkDocs.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
from collections.abc import Iterator, Sequence

from sfumato.cli.job_flags import GROUPS, SUMMARIES, Flag, flag_names
from sfumato.cli.main import COMMANDS, EXIT_CODES, parser
from sfumato.tasks.checks import RANGES
from sfumato.types import Control, Hires, Job

NOTE = "This page is made from the program when the site is built.\n"


def command_line() -> str:
    """The page of all commands: what each does, an example, and its flags; and the exit codes."""
    lines = ["# Command line", "", NOTE, "`sfumato COMMAND --help` says the same.", "", "## Exit codes", ""]
    lines += table(("code", "what it means"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()])
    lines += ["", "Code 1 with a traceback is a bug: please tell us.", ""]
    for name, sub in subparsers(parser()):
        lines += [f"## sfumato {name}", "", *about(name, sub), *flags_of(sub, "###")]
        for action, inner in subparsers(sub):
            lines += [f"### sfumato {name} {action}", "", f"{escaped(inner.description or '')}", ""]
            lines += flags_of(inner, "####")
    return "\n".join(lines) + "\n"


def about(name: str, sub: argparse.ArgumentParser) -> Iterator[str]:
    """What a command does, and its example."""
    summary, example = COMMANDS[name]
    yield from (escaped(" ".join((sub.description or summary).split())), "")
    yield from ("```sh", f"sfumato {name} {example}", "```", "")


def subparsers(parent: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    """The commands of a parser by name, in their order."""
    for action in parent._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.items())
    return []


def flags_of(sub: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    """A table for each group of flags of a parser."""
    for group in sub._action_groups:
        rows = [
            (spelling(action), escaped(_help(sub, action)))
            for action in group._group_actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        ]
        if not rows:
            continue
        title = group.title or ""
        if title not in ("positional arguments", "options"):
            yield from (f"{heading} {title}", "", *([f"{group.description}.", ""] if group.description else []))
        yield from (*table(("flag", "what it does"), rows), "")


def spelling(action: argparse.Action) -> str:
    """How a flag is written, as code."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = ""
    if action.nargs != 0:
        named = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        value = f" {named}"
    return "`" + ", ".join(action.option_strings).replace("|", "\\|") + value.replace("|", "\\|") + "`"


def _help(sub: argparse.ArgumentParser, action: argparse.Action) -> str:
    known = {**vars(action), "prog": sub.prog}
    return (action.help or "") % known


def job_page() -> str:
    """The page of a Job's fields: type, default, what is allowed, what it does, its flags."""
    lines = ["# The fields of a Job", "", NOTE]
    lines += [
        "A [Job](python.md) is the one description of pictures to make: flags and the recipe in a PNG are a Job.",
        "",
    ]
    lines += ["`None` means the model's own, or the profile's where `like` names one.", ""]
    for title, flags in GROUPS.items():
        lines += [f"## {title}", "", *([f"{SUMMARIES[title]}.", ""] if title in SUMMARIES else [])]
        lines += table(("field", "default", "allowed", "what it is", "flag"), [_row(*item) for item in flags.items()])
        lines.append("")
    for kind in (Hires, Control):
        lines += [f"## The fields of {kind.__name__}", "", escaped(" ".join((kind.__doc__ or "").split())), ""]
        lines += table(("field", "type", "default"), [(f"`{f.name}`", *_typed(f)) for f in dataclasses.fields(kind)])
        lines.append("")
    return "\n".join(lines)


def _row(name: str, flag: Flag) -> tuple[str, ...]:
    owner = Hires() if name.startswith("hires.") else Job()
    default = getattr(owner, name.removeprefix("hires."))
    said = f"`{default!r}`" if default is not None else f"{escaped(flag.unset)} (`None`)"
    known = RANGES.get(name)
    allowed = flag.allowed or ("" if known is None else f"{known.low:g} to {known.high:g}")
    flags = ", ".join(f"`{each}`" for each in flag_names(name))
    return f"`{name}`", said, escaped(allowed), escaped(flag.help), flags


def _typed(field: dataclasses.Field[object]) -> tuple[str, str]:
    has = field.default is not dataclasses.MISSING
    return f"`{field.type}`".replace("|", "\\|"), f"`{field.default!r}`" if has else "empty"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def escaped(text: str) -> str:
    """Text as it stands in a cell of a table."""
    plain = html.escape(" ".join(text.split()), quote=False)
    for mark in "|*_`[]":
        plain = plain.replace(mark, f"\\{mark}")
    return plain


PAGES = {"reference/command-line.md": command_line, "reference/job.md": job_page}
