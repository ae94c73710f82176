"""The processes that torchrun has train one agent together: what is divided, and what they tell each other.

All ranks hold the same networks, statistics and random generators and see all transitions, so that they decide
alike without asking. Divided are the environments, the replay, and the rows of every batch: losses and gradients
are means over ranks. One process alone is :data:`ALONE`, and everything here is then what it would be without.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from varshare_rl.errors import RunFailure, UserError, one_line

T = TypeVar("T")

#: Time that ranks wait for each other: longer than an environment or a full disk is waited for.
PATIENCE = timedelta(minutes=45)
#: What a rank may say to all: a signal has come, a checkpoint is due, training is to end, its environments failed.
WORDS = ("signal", "save", "end", "failed")
#: What torchrun tells a process.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostRank(RunFailure):
    """Another rank has ended, or does not answer."""


class Ranks:
    """One process alone. :class:`RankGroup` has the meaning of everything where there are several.

    Attributes:
        rank: number of this process; size: number of all; on_machine: number of those of this machine.
    """

    rank, size, on_machine = 0, 1, 1

    def __init__(self) -> None:
        self._said = dict.fromkeys(WORDS, 0)

    @property
    def first(self) -> bool:
        """Return True for the one that writes, prints and decides what a clock decides."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """Words that start a module in as many processes."""
        return "python"

    def say(self, word: str, value: int) -> None:
        """Leave one of :data:`WORDS` for all ranks."""
        self._said[word] = int(value)

    def silence(self) -> None:
        """Forget all that was said; on every rank."""
        self._said = dict.fromkeys(WORDS, 0)

    def said(self, word: str) -> int:
        """Return what this rank has said."""
        return self._said[word]

    def heard(self, word: str) -> int:
        """Return the largest value that a rank had said before the last :meth:`exchange`."""
        return self._said[word]

    def exchange(self, tensor: Tensor) -> Tensor:
        """Do :meth:`unite` with a tensor on the CPU, and hear what has been said."""
        return tensor

    def unite(self, tensor: Tensor) -> Tensor:
        """Put together, to the bit, what ranks have filled in where all others have zeros; of 4 or 8 bytes each."""
        return tensor

    def mean(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Mean over ranks, in one message; gradients are those of the own values, for :meth:`average`."""
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over ranks in the place of every tensor."""

    def rows(self, x: Tensor) -> Tensor:
        """Own rows of ``[T, B, ...]``, every ``size``-th."""
        return x

    def all_rows(self, own: Tensor) -> Tensor:
        """Put the own rows ``[T, B / size]`` of all ranks together again, ``[T, B]``."""
        return own

    def by_rows(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)`` of ``[T, B, ...]`` to ``[T, B]``, without a graph: each rank computes its rows."""
        return function(x)

    @contextmanager
    def dividing(self) -> Iterator[None]:
        """Inside, batches are own rows: :func:`for_rows` draws for those of all ranks, and takes these."""
        yield

    def require_even(self, rows: int, what: str) -> None:
        """Raise UserError unless a batch of so many rows can be divided."""

    def least(self, number: int) -> int:
        """Return the least number of all ranks."""
        return number

    def require_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raise RunFailure unless all ranks have the same bits in tensors."""

    def together(self, action: Callable[[], T]) -> T:
        """Do it on every rank; what fails on one fails on all."""
        return action()

    def from_first(self, action: Callable[[], T]) -> T:
        """Do it on the first rank; all get what it returns or raises."""
        return action()

    @contextmanager
    def entered(self, manager: AbstractContextManager[T]) -> Iterator[T]:
        """Have the first rank enter a context; all get what it gives."""
        with manager as value:
            yield value


class RankGroup(Ranks):
    """The processes that torchrun has started; waits for all of them to be there.

    Raises:
        UserError: they cannot be reached.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heard = dict.fromkeys(WORDS, 0)
        self.rank, self.size, local, self.on_machine = (int(os.environ[name]) for name in _TOLD[:4])
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
            store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"rank {self.rank} of {self.size} cannot join the others at {where} ({one_line(error)})"
            ) from error

    @property
    def launcher(self) -> str:
        machines = self.size // self.on_machine
        return f"torchrun {f'--nnodes {machines} ' * (machines > 1)}--nproc-per-node {self.on_machine}"

    def silence(self) -> None:
        super().silence()
        self._heard = dict.fromkeys(WORDS, 0)

    def heard(self, word: str) -> int:
        return self._heard[word]

    def exchange(self, tensor: Tensor) -> Tensor:
        words = torch.zeros(self.size, len(WORDS), dtype=torch.int32)
        words[self.rank] = torch.tensor([self._said[word] for word in WORDS], dtype=torch.int32)
        bits = torch.cat([_bits(tensor), words.view(-1)])
        self._reduce(bits)
        bits, said = bits[: -words.numel()], bits[-words.numel() :].view_as(words).amax(0).tolist()
        self._heard = dict(zip(WORDS, said, strict=True))
        return bits.view(tensor.dtype).view(tensor.shape)

    def unite(self, tensor: Tensor) -> Tensor:
        bits = _bits(tensor)
        self._reduce(bits)
        return bits.view(tensor.dtype).view(tensor.shape)

    def mean(self, *values: Tensor) -> tuple[Tensor, ...]:
        means: tuple[Tensor, ...] = _Mean.apply(self, *values)  # type: ignore[no-untyped-call]
        return means

    def average(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._reduce(flat)
        flat /= self.size
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)])

    def rows(self, x: Tensor) -> Tensor:
        return x[:, self.rank :: self.size].contiguous()

    def all_rows(self, own: Tensor) -> Tensor:
        whole = own.new_zeros(own.shape[0], own.shape[1] * self.size)
        whole[:, self.rank :: self.size] = own
        return self.unite(whole)

    def by_rows(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x.shape[1] % self.size:
            return function(x)
        with self.dividing():
            return self.all_rows(function(self.rows(x)))

    @contextmanager
    def dividing(self) -> Iterator[None]:
        global _divided
        before, _divided = _divided, self
        try:
            yield
        finally:
            _divided = before

    def require_even(self, rows: int, what: str) -> None:
        if rows % self.size:
            raise UserError(
                f"{what} has {rows} rows, which {self.size} ranks cannot divide; give a multiple of {self.size}"
            )

    def least(self, number: int) -> int:
        found = torch.tensor([number])
        self._reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def require_same(self, tensors: Sequence[Tensor], what: str) -> None:
        own = torch.zeros(self.size, 1, dtype=torch.int64)
        own[self.rank] = sum(int(_bits(tensor).sum(dtype=torch.int64)) for tensor in tensors)
        self._reduce(own)
        if bool((own != own[0]).any()):
            raise RunFailure(
                f"{what} differs between ranks, and so their processors or packages; use machines of one kind"
            )

    def together(self, action: Callable[[], T]) -> T:
        error: UserError | RunFailure | None = None
        result = None
        try:
            result = action()
        except LostRank:
            raise
        except (UserError, RunFailure) as caught:
            error = caught
        except (OSError, MemoryError) as caught:
            error = RunFailure(one_line(caught))
        news = None if error is None else (type(error), str(error), getattr(error, "episode", None))
        told: list[Any] = [None] * self.size
        with self._losing():
            dist.all_gather_object(told, news)
        if error is not None:
            raise error
        for rank, other in enumerate(told):
            if other is not None:
                kind, message, episode = other
                failure = kind(f"rank {rank}: {message}")
                if isinstance(failure, RunFailure):
                    failure.episode = episode
                raise failure
        return result  # type: ignore[return-value]

    def from_first(self, action: Callable[[], T]) -> T:
        result = self.together(lambda: action() if self.first else None)
        told = [result]
        with self._losing():
            dist.broadcast_object_list(told, 0)
        return told[0]  # type: ignore[return-value]

    @contextmanager
    def entered(self, manager: AbstractContextManager[T]) -> Iterator[T]:
        with ExitStack() as stack:
            yield self.from_first(lambda: stack.enter_context(manager))

    def _reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        with self._losing():
            dist.all_reduce(tensor, operation)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Raise LostRank for what a backend says; no signal of torchrun's comes in between from then on."""
        try:
            yield
        except RuntimeError as error:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            raise LostRank(
                f"another rank of the {self.size} has ended or does not answer ({_reason(error)}); all end"
            ) from error


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: RankGroup, *values: Tensor) -> tuple[Tensor, ...]:
        means = [value.detach().clone() for value in values]
        group.average(means)
        pairs = zip(means, values, strict=True)
        ctx.mark_non_differentiable(*[mean for mean, value in pairs if not value.requires_grad])
        return tuple(means)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *grads)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, flat and a copy: sums of them with zeros are exact, whatever they stand for."""
    return tensor.detach().reshape(-1).clone().view(torch.int32)


def _reason(error: RuntimeError) -> str:
    """Return what gloo says, without the place in its code and its advice."""
    return re.sub(r"^\[[^\]]*\] ?", "", str(error)).partition(". ")[0][:100]


ALONE = Ranks()
_joined: RankGroup | None = None
_divided: RankGroup | None = None


def several() -> bool:
    """Return True in a process that torchrun, or another launcher in its words, has started beside others."""
    return all(name in os.environ for name in _TOLD) and int(os.environ["WORLD_SIZE"]) > 1


def join() -> Ranks:
    """Return the ranks that this process is one of, once all of them are there.

    Raises:
        UserError: they cannot be reached.
    """
    global _joined
    if not several():
        return ALONE
    _joined = _joined or RankGroup()
    return _joined


def speaks(error: BaseException | None = None) -> bool:
    """Return True for the one process of a machine that says what all know, and the first to notice a loss."""
    if not several():
        return True
    if isinstance(error, LostRank):
        with suppress(RuntimeError):
            return int(dist.distributed_c10d._get_default_store().add("lost", 1)) == 1
        return True  # the store is lost, too
    known = error is None or isinstance(error, UserError | RunFailure)
    return os.environ["LOCAL_RANK"] == "0" or not known


def for_rows(draw: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """``draw(like)`` for rows ``[K, B, ...]``, which may be a rank's part of those that it would be drawn for."""
    if _divided is None:
        return draw(like)
    return _divided.rows(draw(like.new_empty(like.shape[0], like.shape[1] * _divided.size, *like.shape[2:])))
