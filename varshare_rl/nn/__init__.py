"""Task layers, architectures, policies and critics. Every network is called ``network(x, task_ids)``."""

from varshare_rl.nn.independent import Independent, IndependentLayer
from varshare_rl.nn.options import Architecture, Posterior
from varshare_rl.nn.shared import Shared, SharedLayer
from varshare_rl.nn.varshare import VarShare, VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRA, VarShareLoRALayer

__all__ = [
    "Architecture",
    "Independent",
    "IndependentLayer",
    "Posterior",
    "Shared",
    "SharedLayer",
    "VarShare",
    "VarShareLayer",
    "VarShareLoRA",
    "VarShareLoRALayer",
]
