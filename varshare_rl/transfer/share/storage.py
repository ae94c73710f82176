"""What a Share model stores, counted like for like with one LoRA adapter per task."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

#: Everything is float32, LoRA's factors included.
BYTES_PER_NUMBER = 4


@dataclass(frozen=True)
class Storage:
    """Bytes of a basis with the coefficients of ``tasks`` tasks, and of as many LoRA adapters.

    Attributes:
        tasks: number of tasks.
        shared_bytes: of the bases, needed once.
        task_bytes: of the coefficients of one task, mean over tasks.
        originals_bytes: of the adapters that are kept beside them; 0 unless asked for.
        lora_task_bytes: of one task's LoRA adapter, mean over tasks.
        trained_numbers: what a new task trains that learns coefficients alone, at the largest rank among the tasks.
    """

    tasks: int
    shared_bytes: int
    task_bytes: float
    originals_bytes: int
    lora_task_bytes: float
    trained_numbers: int

    @property
    def lora_trained_numbers(self) -> float:
        """What a new LoRA adapter trains."""
        return self.lora_task_bytes / BYTES_PER_NUMBER

    @property
    def total_bytes(self) -> float:
        """Everything that is stored: basis, all coefficients, kept originals."""
        return self.shared_bytes + self.tasks * self.task_bytes + self.originals_bytes

    @property
    def lora_bytes(self) -> float:
        """One adapter per task."""
        return self.tasks * self.lora_task_bytes

    @property
    def saving(self) -> float:
        """How many times smaller than the adapters, the basis included."""
        return self.lora_bytes / self.total_bytes

    @property
    def saving_without_basis(self) -> float:
        """The same without the shared basis, as it is often published: a task's adapter over its coefficients."""
        return self.lora_task_bytes / self.task_bytes

    @property
    def break_even_tasks(self) -> int | None:
        """From how many tasks on basis and coefficients take less than the adapters; None: never.

        The least ``N`` with ``shared + N * task < N * lora``. Kept originals are left out: with them it is never.
        """
        gain = self.lora_task_bytes - self.task_bytes
        return math.floor(self.shared_bytes / gain) + 1 if gain > 0 else None

    def as_dict(self) -> dict[str, float | int | None]:
        """All of it by name."""
        derived = (
            *("total_bytes", "lora_bytes", "saving", "saving_without_basis"),
            *("break_even_tasks", "lora_trained_numbers"),
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}
