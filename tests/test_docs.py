"""What the documents name exists, and the settings they state are those of the code."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from ldmole_ds.config import PRESETS, LDMoLEConfig
from ldmole_ds.training.arguments import adapter_config, parse_flags

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SUFFIXES = {".py", ".md", ".sh", ".json", ".jsonl", ".png", ".yaml", ".safetensors"}


def named_paths(text):
    """Words with a slash that end like one of our files, or in the slash; `runs/` is what training writes."""
    words = re.findall(r"(?<![\w/])[A-Za-z.][\w.*/-]*", re.sub(r"https?://\S+", "", text))
    words = {word.rstrip(".") for word in words if "/" in word and not word.startswith("runs/")}
    return sorted(word for word in words if word.endswith("/") or Path(word).suffix in SUFFIXES)


def exists(path, document):
    """Relative to the document, as links are, to the checkout or to the package."""
    return any(any(base.glob(path)) for base in (document.parent, ROOT, ROOT / "ldmole_ds"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_path_that_is_named_exists(document):
    paths = named_paths(document.read_text(encoding="utf-8"))
    assert [path for path in paths if not exists(path, document)] == []


def test_paths_are_found_and_missed_ones_noticed():
    text = "`ops/sparsegen.py`, [x](docs/method.md), ldmole_ds/tasks/. q/k/v, https://a.b/c.py, runs/x.json, 1/2/, a.py"
    assert named_paths(text) == ["docs/method.md", "ldmole_ds/tasks/", "ops/sparsegen.py"]
    document = ROOT / "README.md"
    assert exists("ops/sparsegen.py", document) and not exists("ops/sparsegem.py", document)
    assert exists("ldmole_ds/tasks/", document) and not exists("ldmole_ds/task/", document)


def test_the_readme_links_every_page():
    table = DOCUMENTS[0].read_text(encoding="utf-8").split("## Documentation")[1]
    assert [page.name for page in DOCUMENTS[1:] if f"(docs/{page.name})" not in table] == []


def test_anchors_are_headings():
    """``page.md#heading`` as GitHub makes it: lower case, hyphens for spaces, no other signs."""
    for document in DOCUMENTS:
        for page, anchor in re.findall(r"\(([\w./-]*\.md)?#([\w-]+)\)", document.read_text(encoding="utf-8")):
            text = (document.parent / page if page else document).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], (document, anchor)


def test_the_method_states_our_defaults():
    defaults = {f.name: f.default for f in fields(LDMoLEConfig) if f.default is not MISSING}
    section = METHOD.split("## Defaults and presets")[1].split("| preset |")[0]
    stated = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, flags=re.MULTILINE)
    assert len(stated) > 10
    for name, value in stated:
        is_number = type(defaults[name]) in (int, float)
        assert (float(value) if is_number else value) == (defaults[name] if is_number else str(defaults[name])), name


def test_the_method_states_our_presets():
    def shown(value):
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    rows = METHOD.split("| preset | sets |\n| --- | --- |\n")[1].split("\n\n")[0].splitlines()
    assert rows == [
        f"| `{name}` | {', '.join(f'`{key}` {shown(value)}' for key, value in preset.items())} |"
        for name, preset in PRESETS.items()
    ]


def test_the_flags_of_the_papers_run_are_flags():
    flags = re.search(r"In flags: `([^`]+)`", METHOD).group(1).split()
    parsed = parse_flags([*flags, "--output_dir", "unused"])
    config = adapter_config(parsed)
    assert (config.lambda_hidden_size, config.lambda_init, config.mask_padding) == (512, "paper", False)
    assert (parsed.learning_rate, parsed.weight_decay, parsed.label_smoothing_factor) == (1e-4, 0.1, 0.1)
