"""docs/troubleshooting.md explains every message that a user can meet, and only messages that exist.

A message is what the package gives to an exception, a logged warning or an option parser, or prints to stderr, and what
a script of ``launch/`` writes there. Exceptions that pass on another one's text have none of their own; assertions are
for developers. Values in a message are gaps; the document writes a gap, or a part that it leaves out, as ``...``. So a
documented message stands for all those that have its fixed parts, in their order.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"
# Besides exceptions, whose names end in Error, and `print` to stderr.
SPEAKERS = {"SystemExit", "error", "exit", "raise_user_error", "tell", "warn", "warning", "warning_once"}
UNEXPLAINED = {
    f"module 'ldmole_ds' has no attribute {GAP}": "Python's own sentence, for names that a module makes when asked",
    "the expert-parallel marker is never called": "a module that is only looked at: no user can meet it",
    f"{GAP}; see launch/doctor.py --help": "a form: argparse's words stand in it",
    f"{GAP} rows written to {GAP}": "a note of success",
}
# What has fewer letters of its own is a form for text from elsewhere (`error: ...`); and a documented message must not
# stand for any message.
FEWEST_LETTERS = 12


def named_texts(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Constants of a module, and what its functions return at their end."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.FunctionDef(name=name, body=[*_, ast.Return(value=ast.expr() as value)]):
                yield name, value


def fixed_text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The words of an expression, with gaps for what is known only when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(fixed_text(part, constants) for part in parts)
        case ast.FormattedValue(value=value):
            return fixed_text(value, constants)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return fixed_text(left, constants) + fixed_text(right, constants)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="format")) if name in constants:
            return re.sub(r"\{.*?\}", GAP, fixed_text(constants[name], {}))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name in constants:
            return fixed_text(constants[name], {})
    return GAP


def is_speaker(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    to_stderr = any(word.arg == "file" and ast.unparse(word.value) == "sys.stderr" for word in call.keywords)
    return name.endswith("Error") or name in SPEAKERS or name == "print" and to_stderr


def messages_of_python(source: str, constants: dict[str, ast.expr]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and is_speaker(node):
            yield re.sub(r"%[sdg]", GAP, fixed_text(node.args[0], constants))


def messages_of_shell(source: str) -> list[str]:
    return [re.sub(r"\$\{.*?\}|\$\w+", GAP, text) for text in re.findall(r'echo "([^"]+)" >&2', source)]


def messages() -> dict[str, str]:
    """Where each message stands."""
    scripts = [path for path in (ROOT / "launch").rglob("*") if path.suffix in {".sh", ".sbatch"}]
    files = [path for folder in ("ldmole_ds", "launch") for path in (ROOT / folder).rglob("*.py")]
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(files)}
    own = {path: dict(named_texts(ast.parse(source))) for path, source in sources.items()}
    imported = {name: text for texts in own.values() for name, text in texts.items()}
    found = {path: messages_of_python(source, imported | own[path]) for path, source in sources.items()}
    found |= {path: messages_of_shell(path.read_text(encoding="utf-8")) for path in scripts}
    where = {text: str(path.relative_to(ROOT)) for path, texts in found.items() for text in texts}
    return {text: path for text, path in where.items() if letters(text) >= FEWEST_LETTERS}


def letters(text: str) -> int:
    return len(re.findall(r"[^\W\d_]", text))


def documented() -> list[str]:
    """Code spans in the first column of the document's tables, before the messages of others."""
    ours = DOCUMENT.read_text(encoding="utf-8").split("\n## Messages of others")[0]
    cells = [line.split(" | ")[0] for line in ours.splitlines() if line.startswith("| `")]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def stands_for(entry: str, message: str) -> bool:
    parts = [re.escape(part.strip()) for part in entry.split("...")]
    return re.search(".*".join(parts), message, flags=re.DOTALL) is not None


MESSAGES = messages()


def test_every_message_is_explained():
    entries = documented()
    left = [m for m in MESSAGES if m not in UNEXPLAINED and not any(stands_for(entry, m) for entry in entries)]
    assert [f"{MESSAGES[message]}: {message.replace(GAP, '...')}" for message in left] == []


def test_every_message_that_is_explained_exists():
    assert [entry for entry in documented() if not any(stands_for(entry, message) for message in MESSAGES)] == []
    assert [message for message in UNEXPLAINED if message not in MESSAGES] == []


def test_no_entry_stands_for_anything():
    assert [entry for entry in documented() if letters(entry) < FEWEST_LETTERS] == []
