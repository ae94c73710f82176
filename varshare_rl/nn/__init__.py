"""Task layers, architectures, policies and critics. Every network is called ``network(x, task_ids)``."""

from varshare_rl.nn.care import CARE
from varshare_rl.nn.film import FiLM
from varshare_rl.nn.independent import Independent, IndependentLayer
from varshare_rl.nn.l2_soft import L2Soft, L2SoftLayer
from varshare_rl.nn.lora import LoRA
from varshare_rl.nn.moore import MOORE
from varshare_rl.nn.multi_head import MultiHead
from varshare_rl.nn.options import Architecture, Posterior
from varshare_rl.nn.paco import PaCo
from varshare_rl.nn.residual import ResidualLayer
from varshare_rl.nn.shared import Shared, SharedLayer
from varshare_rl.nn.soft_modularization import SoftModularization
from varshare_rl.nn.task_embedding import TaskEmbedding, TaskEmbeddingLayer
from varshare_rl.nn.varshare import VarShare, VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRA, VarShareLoRALayer

__all__ = [
    "CARE",
    "MOORE",
    "Architecture",
    "FiLM",
    "Independent",
    "IndependentLayer",
    "L2Soft",
    "L2SoftLayer",
    "LoRA",
    "MultiHead",
    "PaCo",
    "Posterior",
    "ResidualLayer",
    "Shared",
    "SharedLayer",
    "SoftModularization",
    "TaskEmbedding",
    "TaskEmbeddingLayer",
    "VarShare",
    "VarShareLayer",
    "VarShareLoRA",
    "VarShareLoRALayer",
]
