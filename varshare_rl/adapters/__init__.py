"""LoRA adapters: for any module of linear layers, in memory, and in the files of the `peft` library."""

from varshare_rl.adapters.adapter import Adapter, AdapterInfo, LowRank, adapter_scale, describe
from varshare_rl.adapters.folder import read_adapter, write_adapter

__all__ = ["Adapter", "AdapterInfo", "LowRank", "adapter_scale", "describe", "read_adapter", "write_adapter"]
