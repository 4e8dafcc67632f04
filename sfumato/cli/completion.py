"""Print completion of commands and flags for a shell: bash, zsh, fish, made from the parser itself.

bash: sfumato completion bash > ~/.local/share/bash-completion/completions/sfumato
zsh:  sfumato completion zsh > a folder of $fpath, as the file _sfumato
fish: sfumato completion fish > ~/.config/fish/completions/sfumato.fish
"""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato completion`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, help="whose completion")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code. ValueError where shtab is missing."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The completion script of one of SHELLS, with every command and flag there is now."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError('completion: shtab is needed: pip install "sfumato[completion]"') from error
    from sfumato.cli.main import parser  # late: main imports this file when it makes the parser

    text: str = shtab.complete(parser(), shell)
    return text
