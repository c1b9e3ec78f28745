#!/usr/bin/env python
"""Continue prompts with an adapter. Needs torch, transformers and safetensors; one process, no DeepSpeed.

python launch/generate.py --adapter runs/demo --classify --prompt "my card was declined"
python launch/generate.py --adapter user/adapter --prompt "The capital of France is" --max_new_tokens 20
python launch/generate.py --adapter runs/mine/checkpoint-500 --prompt_file in.jsonl --output_file out.jsonl
python launch/generate.py --model_name_or_path Qwen/Qwen3-0.6B --prompt "the bare base model"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("model")
    what.add_argument("--adapter", help="folder of a run, of a checkpoint or of an adapter, or a hub id")
    what.add_argument("--adapter_revision", help="branch, tag or commit of an adapter on the hub")
    what.add_argument("--model_name_or_path", help="base model; default: the one the adapter was trained on")
    what.add_argument("--revision", help="branch, tag or commit of a base model on the hub; default: the adapter's")
    what.add_argument("--device", default=None, help="cuda, cpu, ...; default: cuda where there is one")
    what.add_argument("--trust_remote_code", action="store_true", help="run model code from the hub")
    prompts = parser.add_argument_group("prompts").add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="the text to continue, or the message to classify")
    prompts.add_argument("--prompt_file", type=Path, help='JSON Lines with {"prompt": "..."}; other keys are kept')
    how = parser.add_argument_group("prompt format")
    how.add_argument(
        "--chat", action="store_true", help="each prompt is a user's turn: put it into the chat template first"
    )
    files = parser.add_argument_group("output")
    files.add_argument(
        "--output_file", type=Path, help='a new file: the lines of --prompt_file, each with "completion"'
    )
    files.add_argument("--batch_size", type=int, default=8, help="prompts generated together (default 8)")
    files.add_argument("--classify", action="store_true", help="wrap --prompt as in training and rank the label words")
    how = parser.add_argument_group("generation")
    how.add_argument("--max_new_tokens", type=int, default=32, help="longest continuation (default 32)")
    how.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy, above samples")
    how.add_argument("--top_p", type=float, default=1.0, help="nucleus of sampling (default 1: all)")
    how.add_argument("--top_k", type=int, default=0, help="sample among the k most likely tokens (default 0: all)")
    how.add_argument("--num_beams", type=int, default=1, help="beam search width (default 1)")
    how.add_argument(
        "--seed", type=int, default=0, help="of sampling; same seed and batch size, same texts (default 0)"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """What can be known wrong before a model is loaded."""
    if args.adapter is None and args.model_name_or_path is None:
        raise ValueError("nothing to generate with: give --adapter, or --model_name_or_path for a bare base model")
    if args.classify and (args.adapter is None or args.prompt is None):
        raise ValueError("--classify ranks the label words of an --adapter for one --prompt: give both")
    if (args.prompt_file is None) != (args.output_file is None):
        raise ValueError("--prompt_file and --output_file go together: give both, or --prompt alone")
    if args.output_file is not None and args.output_file.exists():
        raise ValueError(f"--output_file {args.output_file} already exists: give a new file")
    if args.output_file is not None and not args.output_file.absolute().parent.is_dir():
        raise ValueError(f"--output_file {args.output_file}: its folder does not exist")
    for name, smallest in (("batch_size", 1), ("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0)):
        if getattr(args, name) < smallest:
            raise ValueError(f"--{name} must be at least {smallest}, got {getattr(args, name)}")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature must be 0 or more and --top_p in (0, 1], got {args.temperature}, {args.top_p}")


def read_prompts(path: Path) -> tuple[list[dict], list[str]]:
    """The rows of a JSON Lines file, and where each stands."""
    from ldmole_ds.tasks.rows import read_rows

    rows = read_rows(path)
    for row in rows:
        if not isinstance(row.fields.get("prompt"), str):
            raise ValueError(f'{row.where}: expected an object with a text under "prompt"')
    return [dict(row.fields) for row in rows], [row.where for row in rows]


def load(args: argparse.Namespace):
    """The model, wrapped where there is an adapter, its tokenizer, and the adapter's folder."""
    import torch

    from ldmole_ds.model.hub import adapter_folder
    from ldmole_ds.tasks.adapted_model import load_adapted

    folder = None if args.adapter is None else adapter_folder(args.adapter, revision=args.adapter_revision)
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    model, tokenizer = load_adapted(folder, args.model_name_or_path, **source)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer, folder


def classify(model, tokenizer, folder: Path, message: str) -> list[tuple[str, float]]:
    """Label words by probability among themselves, as the adapter was trained to answer."""
    import torch

    from ldmole_ds.tasks import ChoiceCollator, ChoiceDataset, Question, padding_id, score_candidates
    from ldmole_ds.tasks.prompt import classification_prompt

    words = json.loads((folder / "label_words.json").read_text(encoding="utf-8"))
    question = Question(classification_prompt(message, words), tuple(f" {word}" for word in words), 0)
    dataset = ChoiceDataset.from_questions([question], tokenizer, 2048)
    batch = ChoiceCollator.for_datasets(padding_id(tokenizer), dataset)([dataset[0]])
    device = next(model.parameters()).device
    with torch.no_grad():
        scores = score_candidates(model, {k: v.to(device) for k, v in batch.items()}, single_token=dataset.single_token)
    shares = scores[0].softmax(-1).tolist()
    return sorted(zip(words, shares, strict=True), key=lambda pair: -pair[1])


def as_chats(tokenizer, prompts: list[str]) -> list[str]:
    """Each prompt as the first user turn of a conversation, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise ValueError("--chat: the tokenizer has no chat template; leave it out")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    # Generation puts BOS before each prompt where the tokenizer does; the template has written its own.
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    return [text.removeprefix(bos) if bos else text for text in texts]


def generate(model, tokenizer, prompts: list[str], places: list[str], args: argparse.Namespace) -> list[str]:
    """The continuations, with a progress bar where there are many."""
    import torch
    from tqdm import tqdm

    from ldmole_ds.model.generation import generate_texts

    options = {"do_sample": False, "num_beams": args.num_beams}
    if args.temperature:
        options.update(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    torch.manual_seed(args.seed)
    sizes = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    with tqdm(total=len(prompts), unit="prompt", disable=args.prompt_file is None) as bar:
        return generate_texts(model, tokenizer, prompts, names=places, on_progress=bar.update, **sizes, **options)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        check(args)
        rows, places = read_prompts(args.prompt_file) if args.prompt_file else ([{"prompt": args.prompt}], ["--prompt"])
        model, tokenizer, folder = load(args)
        if args.classify:
            # A checkpoint's are those of its run, one folder up.
            folder = next((f for f in (folder, folder.parent) if (f / "label_words.json").is_file()), None)
            if folder is None:
                raise ValueError(f"{args.adapter} was not trained on text and label rows: leave out --classify")
            for word, share in classify(model, tokenizer, folder, args.prompt)[:5]:
                print(f"{share:6.1%}  {word}")
            return 0
        prompts = [row["prompt"] for row in rows]
        texts = generate(model, tokenizer, as_chats(tokenizer, prompts) if args.chat else prompts, places, args)
        if args.output_file is None:
            print(texts[0])
            return 0
        from ldmole_ds.model.adapter_io import write_atomically

        lines = [json.dumps({**r, "completion": t}, ensure_ascii=False) for r, t in zip(rows, texts, strict=True)]
        write_atomically(args.output_file, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        print(f"{len(rows)} rows written to {args.output_file}", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
