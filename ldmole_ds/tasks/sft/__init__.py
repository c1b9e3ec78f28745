"""Supervised fine-tuning: from conversations and prompt-completion pairs to packed batches with loss on the answers."""
