"""What the command lines of the launch scripts have in common."""

from __future__ import annotations

import sys
from argparse import Action, ArgumentDefaultsHelpFormatter
from dataclasses import field
from pathlib import Path
from typing import Any

from ldmole_ds.training.runtime import UserError


def field_with_help(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of an argument dataclass: its default, and what ``--help`` says."""
    return field(default=default, metadata={"help": help, **kwargs})


class Formatter(ArgumentDefaultsHelpFormatter):
    """One line per flag: no spelling with hyphens beside the one with underscores, no "(default: None)"."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=120)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings[:2] if action.dest == "help" else action.option_strings[:1])
        values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices and len(action.choices) < 6 else ""
        kind = getattr(action.type, "__name__", "text")
        value = values or {"str": "TEXT", "int": "N", "float": "X", "string_to_bool": "BOOL"}.get(kind, "VALUE")
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: Action) -> str:
        if action.default is None or action.nargs == 0:
            return action.help or ""
        return super()._get_help_string(action) or ""


def raise_user_error(message: str) -> None:
    """What a parser calls for a wrong flag."""
    raise UserError(f"{message}; see {Path(sys.argv[0]).name} --help")
