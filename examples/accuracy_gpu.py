"""Runs of `accuracy.py` side by side on one GPU.

A small net alone leaves nearly all of a GPU idle. So each variant has a few seats: a net, its optimizer, and its whole step (the batch,
forward, backward, clipping, AdamW) as one CUDA graph on a stream of its own. A seat takes run after run: it copies the start's values
into its net, and the run's rows and learning rates into tables from which the graph reads. Products are in TF32. (Six nets of a variant
in one graph, mapped over by `torch.func`, took half as many steps a second on an H200: 800 beside 1,600.)
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accuracy import Row, Run, Study, data_of, rate, row_of, start_of
from accuracy_tasks import Digits, Text, Variant, groups_of, loss_of
from torch import Tensor, nn
from tqdm import tqdm

TENTHS = 10
AHEAD = 2
CHUNK = 25
PAUSE = 0.5
"""Seconds between two looks at what is wanted."""


@functools.cache
def starting_values(task: str, variant: str, scale: int, seed: int) -> list[Tensor]:
    return values_of(start_of(task, variant, scale, seed))


def values_of(model: nn.Module) -> list[Tensor]:
    return [value.detach() for value in (*model.parameters(), *model.buffers())]


@functools.cache
def table_of(task: str, scale: int, seed: int, steps: int) -> Tensor:
    return data_of(task, "cpu", scale).rows(seed, steps)


class Seat:
    """A net of one variant and its step. On a CPU nothing is recorded: each step is taken as it comes."""

    def __init__(self, study: Study, variant: Variant, data: Text | Digits, device: torch.device) -> None:
        self.study, self.variant, self.data, self.device = study, variant, data, device
        self.model = start_of(study.task, variant.name, study.scale, 0).to(device)
        cuda = device.type == "cuda"
        groups = [
            {"params": own, "weight_decay": decay, "lr": torch.tensor(1e-3, device=device) if cuda else 1e-3, "times": times}
            for own, times, decay in groups_of(variant, self.model)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=cuda, capturable=cuda)
        longest = max(study.steps)
        rows = table_of(study.task, study.scale, 0, 1)
        self.rows = torch.zeros(longest, rows.shape[1], dtype=torch.long, device=device)
        self.rates = torch.zeros(longest, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.scored = torch.zeros((), device=device)
        self.curve = torch.zeros(TENTHS, device=device)
        self.run: Run | None = None
        self.taken = 0
        self.pending: list[Any] = []
        self.stream: Any = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        self.step, self.score = self._step, self._score
        if cuda:
            torch.cuda.synchronize()
            self.step, self.score = self._recorded(self._step), self._recorded(self._score)

    def _step(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        loss = loss_of(self.model, *self.data.batch(self.rows.index_select(0, self.place)[0]))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        now = self.rates.index_select(0, self.place)[0]
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(now * group["times"])
            else:
                group["lr"] = now.item() * group["times"]
        self.optimizer.step()
        self.place.add_(1)

    @torch.no_grad()
    def _score(self) -> None:
        self.model.eval()
        self.scored.copy_(self.data.score(self.model))

    def _recorded(self, call: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.place.zero_()
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            call()
        return graph.replay

    @torch.no_grad()
    def begin(self, run: Run) -> None:
        self.run, self.taken = run, 0
        with torch.cuda.stream(self.stream):
            for mine, value in zip(values_of(self.model), starting_values(run.task, run.variant, run.scale, run.seed), strict=True):
                mine.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.rows[: run.steps].copy_(table_of(run.task, run.scale, run.seed, run.steps))
            self.rates[: run.steps].copy_(torch.tensor([run.lr * rate(step, run.steps) for step in range(run.steps)]))
            self.place.zero_()

    def advance(self) -> Row | None:
        """Hands the GPU more steps, if it is near the end of those that it has; the row, when the run is over."""
        assert self.run is not None
        self.pending = [event for event in self.pending if not event.query()]
        steps = self.run.steps
        if self.taken == steps and not self.pending:
            with torch.cuda.stream(self.stream):
                curve = self.curve.tolist()
            row = row_of(self.run, self.model, curve, self.device.type)
            self.run = None
            return row
        if self.taken < steps and len(self.pending) < AHEAD:
            with torch.cuda.stream(self.stream):
                for _ in range(min(CHUNK, steps - self.taken)):
                    self.step()
                    self.taken += 1
                    if self.taken * TENTHS % steps < TENTHS:
                        self.score()
                        self.curve[self.taken * TENTHS // steps - 1].copy_(self.scored)
                if self.stream is not None:
                    self.pending.append(self.stream.record_event())
        return None


def side_by_side(studies: Sequence[Study], device: str, seats: int, seconds: float) -> Callable[[Callable[[], list[Run]]], Iterator[Row]]:
    """Runs on so many seats for each variant; no run begins after so many seconds."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    start = time.monotonic()
    todo = [(study, variant) for _ in range(seats) for study in studies for variant in study.variants]
    places = [
        Seat(study, variant, data_of(study.task, device, study.scale), torch.device(device)) for study, variant in tqdm(todo, "seats")
    ]

    def run_some(wanted: Callable[[], list[Run]]) -> Iterator[Row]:
        queues: dict[tuple[str, str], list[Run]] = {}
        asked, is_new = -math.inf, True
        while True:
            if is_new and time.monotonic() > asked + PAUSE:
                taken = {seat.run for seat in places}
                queues = defaultdict(list)
                for run in sorted(wanted(), key=lambda run: -run.steps):  # else they would be the last to end
                    if run not in taken:
                        queues[run.task, run.variant].append(run)
                asked, is_new = time.monotonic(), False
            for seat in places:
                if seat.run is None and time.monotonic() < start + seconds and (queue := queues[seat.study.task, seat.variant.name]):
                    seat.begin(queue.pop(0))
                if seat.run is not None and (row := seat.advance()) is not None:
                    is_new = True
                    yield row
            if not is_new and all(seat.run is None for seat in places):
                return
            time.sleep(0.001)

    return run_some
