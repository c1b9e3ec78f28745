"""PEFT's LoRA, the peer of `step.py` and `gpu_step.py`; it comes with an extra of its own."""

from __future__ import annotations

try:
    from peft import LoraConfig, get_peft_model
    from peft import __version__ as peft_version
except ModuleNotFoundError as error:
    raise SystemExit(f"plain LoRA is measured with PEFT, and {error}: pip install -e '.[bench]'") from None

__all__ = ["LoraConfig", "get_peft_model", "peft_version"]
