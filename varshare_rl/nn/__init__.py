"""Task layers, architectures, policies and critics. Every network is called ``network(x, task_ids)``."""

from varshare_rl.nn.care import CAREConfig
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.film import FiLMConfig
from varshare_rl.nn.independent import IndependentConfig, IndependentLayer, MultiHeadConfig
from varshare_rl.nn.layer import TaskLayer
from varshare_rl.nn.lora import L2SoftConfig, L2SoftLayer, LoRAConfig, ResidualLayer
from varshare_rl.nn.moore import MOOREConfig
from varshare_rl.nn.paco import PaCoConfig
from varshare_rl.nn.shared import SharedConfig, SharedLayer
from varshare_rl.nn.soft_modularization import SoftModularizationConfig
from varshare_rl.nn.task_embedding import TaskEmbeddingConfig, TaskEmbeddingLayer
from varshare_rl.nn.varshare import VarShareConfig, VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRAConfig, VarShareLoRALayer

__all__ = [
    "CAREConfig",
    "FiLMConfig",
    "IndependentConfig",
    "IndependentLayer",
    "L2SoftConfig",
    "L2SoftLayer",
    "LoRAConfig",
    "MOOREConfig",
    "MultiHeadConfig",
    "NetworkConfig",
    "PaCoConfig",
    "Posterior",
    "ResidualLayer",
    "SharedConfig",
    "SharedLayer",
    "SoftModularizationConfig",
    "TaskEmbeddingConfig",
    "TaskEmbeddingLayer",
    "TaskLayer",
    "VarShareConfig",
    "VarShareLayer",
    "VarShareLoRAConfig",
    "VarShareLoRALayer",
]
