"""Several samplers in step: each runs until it asks for the density at its point, and one evaluation answers all of them.

An evaluation of a few θ costs hardly more than that of one, but samplers as libraries have them ask for one at a time, from deep
inside. Each runs in a thread of its own, of which only one is awake at any moment, and always in the same order: what comes out
follows from the seeds, as if they ran one after the other, each with random numbers of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

#: y (D,) -> the log density (), and its gradient (D,).
Ask = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Stopped(BaseException):
    """Ends a sampler from inside."""


def in_step(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], samplers: Sequence[Callable[[Ask], None]], seeds: Sequence[int]
) -> None:
    """Run samplers to their ends; torch's global random numbers are not what they were before.

    Arguments:
        evaluate: y (K, D) -> log densities (K,) and gradients (K, D).
        samplers: Each is called with the function that it has to ask.
        seeds: Of torch's global generator, as each sampler finds it.

    Raises:
        BaseException: what ``evaluate`` or a sampler raised, after all samplers have ended.
    """
    runners = [_Runner(sampler, seed) for sampler, seed in zip(samplers, seeds, strict=True)]
    live = list(runners)
    try:
        while live:
            for runner in live:
                runner.step()
            live = [runner for runner in live if not runner.done]
            if live:
                values, slopes = evaluate(torch.stack([runner.point for runner in live]))
                for runner, value, slope in zip(live, values, slopes, strict=True):
                    runner.answer = value, slope
    finally:
        for runner in runners:
            runner.stop()


class _Runner:
    """One sampler, asleep but for :meth:`step`."""

    def __init__(self, sampler: Callable[[Ask], None], seed: int) -> None:
        self.sampler, self.done, self.stopping = sampler, False, False
        self.error: BaseException | None = None
        self.point, self.answer = torch.zeros(0), (torch.zeros(0), torch.zeros(0))
        self.random = torch.Generator().manual_seed(seed).get_state()
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name="chain", daemon=True)

    def step(self) -> None:
        """On to its next question, or its end."""
        torch.set_rng_state(self.random)
        if self.thread.ident is None:
            self.thread.start()
        self.go.release()
        self.back.acquire()
        self.random = torch.get_rng_state()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End it, wherever it is."""
        self.stopping = True
        if self.thread.ident is not None:
            self.go.release()
            self.thread.join()

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopping:
                self.sampler(self._ask)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.back.release()

    def _ask(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.point = y.detach()
        self.back.release()
        self.go.acquire()
        if self.stopping:
            raise _Stopped
        return self.answer
