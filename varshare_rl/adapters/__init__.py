"""LoRA adapters: for any module of linear layers, in memory, and in the files of the `peft` library."""

from varshare_rl.adapters.adapter import Adapter, AdapterInfo, LowRank, adapter_scale, describe
from varshare_rl.adapters.agent import base_network, task_adapter
from varshare_rl.adapters.folder import read_adapter, write_adapter
from varshare_rl.adapters.layer import LoRALinear
from varshare_rl.adapters.lora import AdapterSet, apply_lora

__all__ = [
    "Adapter",
    "AdapterInfo",
    "AdapterSet",
    "LoRALinear",
    "LowRank",
    "adapter_scale",
    "apply_lora",
    "base_network",
    "describe",
    "read_adapter",
    "task_adapter",
    "write_adapter",
]
