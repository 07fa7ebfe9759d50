"""Runs of `accuracy.py` side by side on one GPU.

A small net alone leaves nearly all of a GPU idle. So each variant has a seat for several nets at once: their parameters are stacked, the
nets are mapped over them (`torch.func`), and a whole step of all (their batches, forward, backward, clipping, AdamW) is one CUDA graph
on a stream of its own. A seat takes runs of one length together: it copies the starts' values into its nets, and the runs' rows and
learning rates into tables from which the graph reads. Products are in TF32.
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
from accuracy_tasks import Digits, Net, Text, Variant, groups_of, loss_of
from torch import Tensor, nn
from tqdm import tqdm

TENTHS = 10
AHEAD = 2
CHUNK = 25
PAUSE = 0.5
"""Seconds between two looks at what is wanted."""
BETAS, EPS = (0.9, 0.95), 1e-8


@functools.cache
def table_of(task: str, scale: int, seed: int, steps: int) -> Tensor:
    return data_of(task, "cpu", scale).rows(seed, steps)


@functools.cache
def starting_values(task: str, variant: str, scale: int, seed: int) -> list[Tensor]:
    return values_of(start_of(task, variant, scale, seed))


def values_of(model: nn.Module) -> list[Tensor]:
    return [value.detach() for value in (*model.parameters(), *model.buffers())]


class Seat:
    """Several nets of one variant, and their step. On a CPU nothing is recorded: each step is taken as it comes."""

    def __init__(self, study: Study, variant: Variant, data: Text | Digits, device: torch.device, nets: int) -> None:
        self.study, self.variant, self.data, self.nets = study, variant, data, nets
        self.model = start_of(study.task, variant.name, study.scale, 0).to(device)
        self.parameters, self.buffers = (
            {name: value.detach().expand(nets, *value.shape).clone() for name, value in named}
            for named in (self.model.named_parameters(), self.model.named_buffers())
        )
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.groups = [([names[id(each)] for each in own], times, decay) for own, times, decay in groups_of(variant, self.model)]
        for value in self.parameters.values():
            value.requires_grad_()
        self.moments = [{name: torch.zeros_like(value) for name, value in self.parameters.items()} for _ in BETAS]
        longest = max(study.steps)
        width = table_of(study.task, study.scale, 0, 1).shape[1]
        self.rows = torch.zeros(longest, nets, width, dtype=torch.long, device=device)
        self.rates = torch.zeros(longest, nets, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.scored = torch.zeros(nets, device=device)
        self.curve = torch.zeros(TENTHS, nets, device=device)
        self.runs: list[Run] = []
        self.taken = 0
        self.pending: list[Any] = []
        cuda = device.type == "cuda"
        self.stream: Any = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        self.step, self.score = self._step, self._score
        if cuda:
            torch.cuda.synchronize()
            self.step, self.score = self._recorded(self._step), self._recorded(self._score)

    def _net(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Net:
        """The model with one net's values."""
        return lambda inputs: torch.func.functional_call(self.model, (parameters, buffers), (inputs,))

    def _step(self) -> None:
        """As `accuracy.Course` takes it, for every net with its own rows, rate and norm of the gradients."""
        self.model.train()
        rows = self.rows.index_select(0, self.place)[0]
        batches = [self.data.batch(rows[net]) for net in range(self.nets)]
        inputs, targets = (torch.stack(part) for part in zip(*batches, strict=True))
        losses = torch.vmap(lambda *values: loss_of(self._net(*values[:2]), *values[2:]))(self.parameters, self.buffers, inputs, targets)
        names = list(self.parameters)
        gradients = dict(zip(names, torch.autograd.grad(losses.sum(), [self.parameters[name] for name in names]), strict=True))
        with torch.no_grad():
            norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()]).sum(0).sqrt()
            clip = (1 / (norms + 1e-6)).clamp(max=1.0)
            now, taken = self.rates.index_select(0, self.place)[0], self.place + 1
            first, second = ((1 - beta**taken).float() for beta in BETAS)
            for own, times, decay in self.groups:
                for name in own:
                    value, gradient = self.parameters[name], gradients[name]
                    shape = (-1,) + (1,) * (value.dim() - 1)
                    lr, gradient = (now * times).view(shape), gradient * clip.view(shape)
                    mean, square = (moments[name] for moments in self.moments)
                    mean.lerp_(gradient, 1 - BETAS[0])
                    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                    value.mul_(1 - lr * decay).sub_(lr / first * mean / (square.sqrt() / second.sqrt() + EPS))
            self.place.add_(1)

    @torch.no_grad()
    def _score(self) -> None:
        self.model.eval()
        self.scored.copy_(torch.vmap(lambda *values: self.data.score(self._net(*values)))(self.parameters, self.buffers))

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
    def begin(self, runs: list[Run]) -> None:
        """Runs of one length, as many as there are nets or fewer."""
        self.runs, self.taken = runs, 0
        steps = runs[0].steps
        with torch.cuda.stream(self.stream):
            for net, run in enumerate(runs):
                values = starting_values(run.task, run.variant, run.scale, run.seed)
                for mine, value in zip((*self.parameters.values(), *self.buffers.values()), values, strict=True):
                    mine[net].copy_(value)
                self.rows[:steps, net].copy_(table_of(run.task, run.scale, run.seed, steps))
                self.rates[:steps, net].copy_(torch.tensor([run.lr * rate(step, steps) for step in range(steps)]))
            for moments in self.moments:
                for value in moments.values():
                    value.zero_()
            self.place.zero_()

    def advance(self) -> list[Row]:
        """Hands the GPU more steps, if it is near the end of those that it has; the rows, when the runs are over."""
        self.pending = [event for event in self.pending if not event.query()]
        steps = self.runs[0].steps
        if self.taken == steps and not self.pending:
            with torch.cuda.stream(self.stream):
                curves = self.curve.t().tolist()
            rows = [row_of(run, self.model, curve, self.curve.device.type) for run, curve in zip(self.runs, curves, strict=False)]
            self.runs = []
            return rows
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
        return []


def side_by_side(studies: Sequence[Study], device: str, nets: int, seconds: float) -> Callable[[Callable[[], list[Run]]], Iterator[Row]]:
    """So many nets of each variant at once; no run begins after so many seconds."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    start = time.monotonic()
    seats = []
    for study, variant in tqdm([(each, variant) for each in studies for variant in each.variants], "seats"):
        seats.append(Seat(study, variant, data_of(study.task, device, study.scale), torch.device(device), nets))

    def run_some(wanted: Callable[[], list[Run]]) -> Iterator[Row]:
        queues: dict[tuple[str, str, int], list[Run]] = {}
        asked, is_new = -math.inf, True
        while True:
            if is_new and time.monotonic() > asked + PAUSE:
                taken = {run for seat in seats for run in seat.runs}
                queues = defaultdict(list)
                for run in wanted():
                    if run not in taken:
                        queues[run.task, run.variant, run.steps].append(run)
                asked, is_new = time.monotonic(), False
            for seat in seats:
                for steps in seat.study.steps if not seat.runs and time.monotonic() < start + seconds else ():
                    queue = queues[seat.study.task, seat.variant.name, steps]
                    if queue and not seat.runs:
                        seat.begin(queue[:nets])
                        del queue[:nets]
                for row in seat.advance() if seat.runs else []:
                    is_new = True
                    yield row
            if not is_new and not any(seat.runs for seat in seats):
                return
            time.sleep(0.001)

    return run_some
