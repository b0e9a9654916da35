"""Lion with a few kernels for all parameters together, where a loop over them launches eight for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lion_pytorch
import torch


class Lion(lion_pytorch.Lion):
    """lion-pytorch's Lion (Chen et al. 2023), with its arguments and its state; in fp32 on a processor its numbers too,
    bit for bit.

    Args:
        params, lr, betas, weight_decay: As there.
        foreach: Update the parameters of a group together, by torch's `_foreach` operations: one kernel for parts of
            many parameters. They hold a copy of the momenta while they run. None decides as torch's own optimizers do:
            on a card only, since a processor launches nothing.
    """

    def __init__(self, params: Iterable, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0, foreach: bool | None = None) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.foreach = foreach

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            for p in learning:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            together = all(p.is_cuda for p in learning) if self.foreach is None else self.foreach
            if together and not any(p.grad.is_sparse for p in learning):
                self._together(learning, group)
                continue
            for p in learning:
                self.update_fn(p, p.grad, self.state[p]["exp_avg"], group["lr"], group["weight_decay"], *group["betas"])
        return loss

    def _together(self, learning: list[torch.Tensor], group: dict) -> None:
        lr, (beta1, beta2), alike = group["lr"], group["betas"], {}
        for p in learning:
            alike.setdefault((p.device, p.dtype), []).append(p)
        for parameters in alike.values():
            gradients = [p.grad for p in parameters]
            momenta = [self.state[p]["exp_avg"] for p in parameters]
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
            updates = torch._foreach_mul(momenta, beta1)
            torch._foreach_add_(updates, gradients, alpha=1.0 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_add_(parameters, updates, alpha=-lr)
            torch._foreach_mul_(momenta, beta2)
            torch._foreach_add_(momenta, gradients, alpha=1.0 - beta2)
