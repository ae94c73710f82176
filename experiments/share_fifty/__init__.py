"""One Share model in place of fifty LoRA adapters of a small transformer."""
