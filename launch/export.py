#!/usr/bin/env python
"""Turn a checkpoint or an adapter folder into an adapter to share: weights in one file, settings, a model card.

python launch/export.py --adapter runs/demo --output_dir exported/demo --dtype bfloat16
python launch/export.py --adapter runs/mine/checkpoint-500 --output_dir exported/mine

Needs neither the base model, nor DeepSpeed, nor the number of ranks of training.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# What launch/generate.py --classify needs; a run writes it beside its checkpoints.
LABEL_WORDS = "label_words.json"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapter", required=True, help="folder of a run, of a checkpoint or of an adapter, or a hub id"
    )
    parser.add_argument("--adapter_revision", help="branch, tag or commit of an adapter on the hub")
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder; it appears whole or not at all")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the weights, and compute with them in this dtype (default: as trained)",
    )
    parser.add_argument(
        "--model_name_or_path",
        help="base model to record (default: the one that was trained on; worth giving where that was a local path)",
    )
    parser.add_argument("--revision", help="base model's revision to record")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        from ldmole_ds.model.export import export_adapter
        from ldmole_ds.model.hub import adapter_folder

        source = adapter_folder(args.adapter, revision=args.adapter_revision)
        words = [folder / LABEL_WORDS for folder in (source, source.parent) if (folder / LABEL_WORDS).is_file()]
        facts = export_adapter(
            source,
            args.output_dir,
            dtype=args.dtype,
            base_model=args.model_name_or_path,
            base_revision=args.revision,
            also=words[:1],
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{facts['parameters']:,} parameters, {facts['bytes'] / 1e6:.1f} MB, for {facts['base_model']}")
    print(f"{args.output_dir}: choose a licence at the top of README.md before you share it")
    print(f'python launch/generate.py --adapter {args.output_dir} --prompt "..."')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
