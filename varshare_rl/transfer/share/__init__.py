"""Share: one low-rank basis for all tasks' adapters, a few coefficients each (arXiv 2602.06043)."""

from varshare_rl.transfer.share.config import BasisMethod, Merge, ShareConfig, SizeConfig
from varshare_rl.transfer.share.folder import read_basis, write_basis
from varshare_rl.transfer.share.layer import ShareLinear, share_layers, using_tasks
from varshare_rl.transfer.share.layer_basis import Coefficients, LayerBasis
from varshare_rl.transfer.share.learn import (
    LearnConfig,
    attach,
    fine_tune,
    take_adapter,
    take_coefficients,
    trained_parameters,
)
from varshare_rl.transfer.share.model import Share, add, consolidate, merge, project, put_coefficients
from varshare_rl.transfer.share.selection import ReturnBandit, average, for_all_tasks, task_by_td_error

__all__ = [
    "BasisMethod",
    "Coefficients",
    "LayerBasis",
    "LearnConfig",
    "Merge",
    "ReturnBandit",
    "Share",
    "ShareConfig",
    "ShareLinear",
    "SizeConfig",
    "add",
    "attach",
    "average",
    "consolidate",
    "fine_tune",
    "for_all_tasks",
    "merge",
    "project",
    "put_coefficients",
    "read_basis",
    "share_layers",
    "take_adapter",
    "take_coefficients",
    "task_by_td_error",
    "trained_parameters",
    "using_tasks",
    "write_basis",
]
