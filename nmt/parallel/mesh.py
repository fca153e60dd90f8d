"""The processes that train together, and their collective operations.

torchrun starts the processes. PyTorch connects them: NCCL between GPUs, gloo between CPUs and for numbers on the host.
With one process, the methods of a `World` communicate with no one, so training code is the same for any number.

Every process holds all dense parameters and 1/M of the experts, where M is the size of an expert group. The processes
of a group together hold each expert once. If there are several groups, they are replicas of each other.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from nmt.config import ParallelConfig
from nmt.device import pick_device
from nmt.errors import ProcessError, StorageError, UserError, exit_status, same_error
from nmt.process import RENDEZVOUS, launched_rank

T = TypeVar("T")

# Found in the messages of gloo and NCCL when another process is gone or late.
_LOST = re.compile(r"gloo|nccl|connection|timed out|timeout|peer", re.IGNORECASE)


class World:
    """This process's rank among `size` processes, its device, and its rank in its expert group."""

    def __init__(
        self,
        device: torch.device,
        mesh: DeviceMesh | None = None,
        host: DeviceMesh | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.device = device
        self.timeout = timeout
        """Longest time that a process waits for the others."""
        self.mesh = mesh
        """Dimensions (replica, expert): the experts are spread over the second. None for a single process."""
        self.host_mesh = host
        """The same mesh for tensors on the host."""
        self.rank = dist.get_rank() if mesh else 0
        self.size = dist.get_world_size() if mesh else 1
        self.num_replicas = mesh.size(0) if mesh else 1
        self.group_size = mesh.size(1) if mesh else 1
        self.group_rank = mesh.get_local_rank("expert") if mesh else 0

    @classmethod
    def start(cls, device_name: str, config: ParallelConfig) -> "World":
        """Join the processes that torchrun started, or return a world of one process.

        UserError if the settings do not fit the number of processes; ProcessError if this one has no GPU.
        """
        size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        device = pick_device(device_name, "training.device")
        if size == 1:
            return cls(device)
        group = config.expert_group_size or size
        if size % group:
            raise UserError(
                f"parallel.expert_group_size={group} does not divide the {size} processes: use a divisor, or 0 for all"
            )
        if device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ProcessError(
                    f"process {local_rank} of this host has no GPU of its own ({torch.cuda.device_count()} are "
                    "visible): start as many processes as there are GPUs (torchrun --nproc-per-node=gpu)"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=config.timeout_seconds)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            if RENDEZVOUS in os.environ:
                # The processes meet through a file on this host, instead of a port that torchrun chooses.
                store = dist.FileStore(os.environ[RENDEZVOUS], size)
                dist.init_process_group(backend, store=store, world_size=size, rank=launched_rank(), timeout=timeout)
            else:
                dist.init_process_group(backend, timeout=timeout)
        shape, names = (size // group, group), ("replica", "expert")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        host = mesh if device.type == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
        for each in (mesh, host):
            for name in names:
                # PyTorch creates groups smaller than the world with its default timeout.
                _set_pg_timeout(timeout, each.get_group(name))
        return cls(device, mesh, host, timeout)

    def stop(self) -> None:
        """Disconnect. Call it only when no other process waits for this one."""
        if self.mesh:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        """The group of processes that together hold each expert once; None for a single process.

        If these are all, it is the group of all collective operations: a recorded step must not have several NCCL
        communicators without need, as their kernels could wait for each other.
        """
        if self.mesh and self.group_size == self.size:
            return dist.group.WORLD
        return self.mesh.get_group("expert") if self.mesh else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place, and return it. No gradient."""
        if self.mesh:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_group(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes of the expert group, in place, and return it."""
        if self.group_size > 1:
            dist.all_reduce(tensor, group=self.expert_group)
        return tensor

    def sum_over_replicas(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes that hold the same experts, in place, and return it.

        The gradients of bf16 experts are added in bf16: a float32 sum would need as much memory as the weights again.
        """
        if self.mesh and self.num_replicas > 1:
            dist.all_reduce(tensor, group=self.mesh.get_group("replica"))
        return tensor

    def sum_int(self, value: int) -> int:
        """Return the sum of `value` over all processes."""
        return int(self.sum(torch.tensor(value))) if self.mesh else value

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. They must be small and picklable."""
        values = [value] * self.size
        if self.mesh:
            dist.all_gather_object(values, value)
        return values

    def max(self, tensor: Tensor) -> Tensor:
        """Set each element of `tensor` to its maximum over all processes, and return `tensor`."""
        if self.mesh:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def max_int(self, value: int) -> int:
        """Return the maximum of `value` over all processes."""
        return int(self.max(torch.tensor(value))) if self.mesh else value

    def from_main(self, tensor: Tensor) -> Tensor:
        """Copy the main process's `tensor` to all processes, in place, and return it."""
        if self.mesh:
            dist.broadcast(tensor, src=0)
        return tensor

    def equal_on_all_ranks(self, shared: Tensor, replicated: Tensor) -> bool:
        """Return whether all processes have the same `shared`, and all with the same experts the same `replicated`.

        Both are int64 tensors on the host.
        """
        if self.host_mesh is None:
            return True
        differences = []
        for numbers, group in ((shared, None), (replicated, self.host_mesh.get_group("replica"))):
            extremes = torch.stack([numbers, ~numbers])  # ~ reverses the order and cannot overflow
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            differences.append((extremes[0] != ~extremes[1]).any())
        return not self.max_int(int(torch.stack(differences).any()))

    def on_main(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Call `action` in the main process while the others wait (in `group`, if given).

        All processes return its result, which must be small and picklable. If it raises, all raise.
        """
        told: list[tuple[T | None, int, str]] = [(None, 0, "")]
        error: Exception | None = None
        if self.is_main:
            try:
                told = [(action(), 0, "")]
            except Exception as raised:
                error = raised
                status = exit_status(raised) if isinstance(raised, ValueError) else StorageError.status
                told = [(None, status, " ".join(str(raised).split()))]
        if self.mesh:
            dist.broadcast_object_list(told, src=0, group=group)
        value, status, message = told[0]
        if status:
            raise error or same_error(status, message)
        return value  # type: ignore[return-value]

    @contextmanager
    def report_peer_failures(self, where: Callable[[], str]) -> Iterator[None]:
        """Context that raises ProcessError, with this rank and `where`, for PyTorch's errors about lost processes.

        Any other error, unless it is a user's mistake (ValueError), is a bug. It gets rank and `where` as a note, and
        is raised again.
        """
        try:
            yield
        except Exception as error:
            broke = isinstance(error, (dist.DistError, RuntimeError))
            lost = self.peer_failure(str(error), where()) if broke else None
            if lost is not None:
                raise lost from error
            if not isinstance(error, ValueError) and not hasattr(error, "__notes__"):
                error.add_note(f"rank {self.rank} of {self.size}, {where()}")
            raise

    def peer_failure(self, text: str, where: str) -> ProcessError | None:
        """Return the error to raise if `text` is PyTorch's message for a process that is gone or late, else None."""
        return self.peer_lost(text, where) if self.size > 1 and _LOST.search(text) else None

    def peer_lost(self, cause: str, where: str) -> ProcessError:
        """Return this process's error for another process that is gone or late."""
        return ProcessError(
            f"rank {self.rank} of {self.size} lost another {where} ({' '.join(cause.split())[:200]}): run the same "
            "command again to resume from the last checkpoint"
        )

    def wait_for_all(self) -> None:
        """Return when all processes have called this method."""
        if self.mesh:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
