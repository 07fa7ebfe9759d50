"""`python examples/train_imagenet.py --data IMAGENET --recipe vit`: the two recipes of arXiv 2401.16438 on a folder of images.

--data holds `train/CLASS/*.jpeg` and `validation/CLASS/*.jpeg` (or `val`). Several GPUs and nodes:

    torchrun --nproc-per-node 8 examples/train_imagenet.py --data IMAGENET --recipe resnet --bf16 --backend pe_fx [--fsdp]

Stopped at any moment, the same command goes on from `last.pt` and ends as it would have without the stop, also on another
number of processes where each loads its own share: what is random (order, augmentation, mixup, dropout) is drawn from the seed and
the place in the training alone, so there is no random state to save. Files are replaced as a whole, never written in place.
--output gets `last.pt`, `best.pt` and `log.csv`; with several nodes it must be a folder that all of them see.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from timm.data import Mixup, create_dataset, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import pe_fx.timm  # noqa: F401  registers the tied models
from pe_fx.tied.weight import Tied


@dataclass(frozen=True)
class Recipe:
    """`lr` is for `lr_batch` images a step and grows with the batch; `batch_size` is that of all processes together.

    The dicts go to timm: create_optimizer_v2, create_scheduler_v2, create_transform, resolve_model_data_config and Mixup.
    """

    model: str
    epochs: int
    batch_size: int
    lr: float
    lr_batch: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    augment: dict[str, Any]
    images: dict[str, Any] = field(default_factory=dict)
    mixup: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    ema_decay: float = 0.0


RECIPES = {
    "vit": Recipe(  # DeiT-S's
        model="vit_pe_small",
        epochs=300,
        batch_size=1024,
        optimizer={"opt": "adamw", "weight_decay": 0.05},
        lr=5e-4,
        lr_batch=512,
        schedule={"warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5},
        augment={"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"},
        mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
        drop_path=0.1,
        ema_decay=0.99996,
    ),
    "resnet": Recipe(  # torchvision's, with a cosine schedule
        model="resnet50_pe1",
        epochs=90,
        batch_size=256,
        optimizer={"opt": "momentum", "momentum": 0.9, "weight_decay": 1e-4, "filter_bias_and_bn": False},
        lr=0.1,
        lr_batch=256,
        schedule={"warmup_epochs": 5, "warmup_lr": 1e-3},
        augment={"color_jitter": 0.0},
        images={"interpolation": "bilinear", "crop_pct": 0.875},
    ),
}


class Images(Dataset[tuple[Tensor, int]]):
    """The images of a split; each is augmented by the seed that comes with its index."""

    def __init__(self, root: Path, split: str, transform: Any) -> None:
        self.images = create_dataset("", root=root, split=split, transform=transform)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        return len(self.images.reader.class_to_idx)

    def __getitem__(self, place: tuple[int, tuple[int, ...]]) -> tuple[Tensor, int]:
        index, seed = place
        seed_all(*seed)
        return self.images[index]  # type: ignore[no-any-return]


def seed_all(*place: int) -> None:
    """Every generator, from a place in the training: what is drawn there can be drawn again."""
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def batches(order: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This process's part of each batch; images that fill no batch are left out."""
    share = batch_size // world
    starts = range(rank * share, len(order) // batch_size * batch_size, batch_size)
    return [list(order[start : start + share]) for start in starts]


@dataclass
class Progress:
    """How far the training is: `step` steps of epoch `epoch` are done."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    best: float = -1.0
    log: list[dict[str, float]] = field(default_factory=list)


class Training:
    def __init__(self, args: argparse.Namespace, recipe: Recipe, device: torch.device, rank: int, world: int) -> None:
        self.args, self.recipe, self.device, self.rank, self.world = args, recipe, device, rank, world
        self.progress = Progress()
        seed_all(args.seed)
        classes = Images(args.data, "train", None).classes
        model = timm.create_model(recipe.model, num_classes=classes, drop_path_rate=recipe.drop_path, **args.model_kwargs).to(device)
        self.model: nn.Module = model
        if args.backend == "pe_fx" and not any(isinstance(module, Tied) for module in model.modules()):
            raise SystemExit(f"--backend pe_fx would tie {recipe.model} in its graphs alone: take its twin, --model {recipe.model}_pe")
        self.settings = {"recipe": asdict(recipe), "model_kwargs": args.model_kwargs, "seed": args.seed, "img_size": args.img_size}
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay, foreach=not args.fsdp) if recipe.ema_decay else None
        if args.fsdp:
            for module in filter(None, (model, self.ema and self.ema.module)):
                shard(module, device, world)
        self.trained: Any = model if args.backend == "none" else torch.compile(model, backend=args.backend)
        if dist.is_initialized() and not args.fsdp:
            self.trained = DistributedDataParallel(self.trained)

        config = resolve_model_data_config(model, {"img_size": args.img_size, **recipe.images})
        self.train_set = Images(args.data, "train", create_transform(**config, is_training=True, **recipe.augment))
        self.test_set = Images(args.data, "validation", create_transform(**config))
        self.steps = len(self.train_set) // recipe.batch_size
        if not self.steps:
            raise SystemExit(f"{len(self.train_set)} images are less than one batch of {recipe.batch_size}: set --batch-size")
        self.mixup = Mixup(num_classes=classes, **recipe.mixup) if recipe.mixup else None

        self.optimizer = create_optimizer_v2(model, lr=recipe.lr * recipe.batch_size / recipe.lr_batch, **recipe.optimizer)
        schedule = recipe.schedule | {"warmup_epochs": min(recipe.schedule["warmup_epochs"], recipe.epochs // 2)}
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, num_epochs=recipe.epochs, step_on_epochs=False, updates_per_epoch=self.steps, **schedule
        )

    def run(self) -> None:
        self.resume()
        while self.progress.epoch < self.recipe.epochs:
            self.train_epoch()
            self.end_epoch()

    def train_epoch(self) -> None:
        progress, args = self.progress, self.args
        seed_all(args.seed, progress.epoch)
        order = torch.randperm(len(self.train_set)).tolist()
        mine = batches(order, self.recipe.batch_size, self.rank, self.world)[progress.step :]
        total = torch.full((), progress.loss, dtype=torch.float64, device=self.device)
        self.trained.train()
        bar = tqdm(total=self.steps, initial=progress.step, desc=f"epoch {progress.epoch}", unit="step", disable=self.rank > 0)
        for images, labels in self.load(self.train_set, mine, progress.epoch):
            seed_all(args.seed, progress.epoch, progress.step, self.rank)
            targets = labels
            if self.mixup:
                images, targets = self.mixup(images, labels)
            self.schedule.step_update(progress.epoch * self.steps + progress.step)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                loss = nn.functional.cross_entropy(self.trained(images), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.update(self.model)
            total += loss.detach()
            progress.step += 1
            bar.update()
            if progress.step % args.save_every == 0 and progress.step < self.steps:
                progress.loss = self.mean(total)
                self.save("last.pt")
                bar.set_postfix(loss=f"{progress.loss / progress.step:.3f}")
        bar.close()
        progress.loss = self.mean(total)

    def end_epoch(self) -> None:
        progress = self.progress
        row = {"epoch": progress.epoch, "lr": self.optimizer.param_groups[0]["lr"], "loss": progress.loss / self.steps}
        row |= self.test(self.model)
        if self.ema:
            row |= {f"ema_{name}": value for name, value in self.test(self.ema.module).items()}
        self.progress = Progress(progress.epoch + 1, best=progress.best, log=[*progress.log, row])
        score = row["ema_top1" if self.ema else "top1"]
        if score > progress.best:
            self.progress.best = score
            self.save("best.pt")
        self.save("last.pt")
        self.write_log()

    @torch.no_grad()
    def test(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in per cent. All processes take as many batches, the last ones filled up, since FSDP waits for each of them."""
        for buffer in model.buffers() if dist.is_initialized() else ():
            dist.broadcast(buffer, 0)  # each has its own running statistics: those that are saved count
        size, count = self.recipe.batch_size, len(self.test_set)
        places = batches(range(-(-count // size) * size), size, self.rank, self.world)
        loader = self.load(self.test_set, [[place % count for place in batch] for batch in places])
        model.eval()
        right = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, (images, labels) in zip(places, loader, strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                outputs = model(images)
            hits = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
            hits &= torch.tensor(batch, device=self.device)[:, None] < count
            right += torch.stack([hits[:, :1].sum(), hits.sum()])
        if dist.is_initialized():
            dist.all_reduce(right)
        top1, top5 = (100 * right / count).tolist()
        return {"top1": top1, "top5": top5}

    def load(self, images: Images, places: Sequence[Sequence[int]], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        seeded = [[(index, (self.args.seed, epoch, index)) for index in batch] for batch in places]
        loader = DataLoader(images, batch_sampler=seeded, num_workers=self.args.workers, pin_memory=self.device.type == "cuda")
        for batch, labels in loader:
            yield batch.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def mean(self, total: Tensor) -> float:
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= self.world
        return total.item()

    def save(self, name: str) -> None:
        state: dict[str, Any] = {"settings": self.settings, "progress": asdict(self.progress)}
        state["state_dict"] = whole(self.model.state_dict())
        state["state_dict_ema"] = whole(self.ema.module.state_dict()) if self.ema else None
        state["optimizer"] = whole(self.optimizer.state_dict())
        if self.rank == 0:
            with replacing(self.args.output / name) as draft, draft.open("wb") as file:
                torch.save(state, file)

    def resume(self) -> None:
        path = self.args.output / "last.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(f"{path} was written with other settings ({state['settings']}): choose another --output")
        load_whole(self.model, state["state_dict"])
        if self.ema:
            load_whole(self.ema.module, state["state_dict_ema"])
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, values in state["optimizer"]["state"].items():
            state["optimizer"]["state"][index] = {key: like(value, parameters[index]) for key, value in values.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.write_log()

    def write_log(self) -> None:
        if self.rank == 0 and self.progress.log:
            with replacing(self.args.output / "log.csv") as draft, draft.open("w", newline="") as file:
                rows = csv.DictWriter(file, self.progress.log[0])
                rows.writeheader()
                rows.writerows(self.progress.log)


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """FSDP2; modules that share a weight are one unit."""
    from pe_fx.distributed import fully_shard

    fully_shard(model, mesh=init_device_mesh(device.type, (world,)))


def whole(value: Any) -> Any:
    """Shards, in any nesting, as whole tensors on the CPU; all processes must take part."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor, sharded as the parameter that it belongs to."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def load_whole(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({name: like(value, own[name]) for name, value in state_dict.items()})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft that takes the file's place once it is whole and on the disk; until then the file is what it was."""
    draft = path.with_name(f"{path.name}.part")
    yield draft
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


@contextlib.contextmanager
def processes() -> Iterator[tuple[torch.device, int, int]]:
    """This process's device, its rank and the number of processes, as torchrun says."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device, 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description="Trains tied models on ImageNet. Stopped, the same command goes on where it was.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/IMAGE and validation/CLASS/IMAGE")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--output", type=Path, default=Path("output"), help="checkpoints and log (default: output)")
    parser.add_argument("--backend", choices=("pe_fx", "inductor", "none"), default="none", help="of torch.compile (default: none)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--fsdp", action="store_true", help="shard parameters, gradients and optimizer state over the processes")
    parser.add_argument("--workers", type=int, default=8, help="processes that load images, for each that trains (default: 8)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints within an epoch (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--img-size", type=int, help="default: the model's")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="e.g. entry=keep rules=mlp")
    changes = parser.add_argument_group("instead of the recipe's")
    for name, type_ in (("model", str), ("epochs", int), ("batch_size", int), ("lr", float), ("ema_decay", float)):
        changes.add_argument(f"--{name.replace('_', '-')}", type=type_)
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in ("model", "epochs", "batch_size", "lr", "ema_decay") if getattr(args, name) is not None}
    return args, dataclasses.replace(RECIPES[args.recipe], **given)


def main(arguments: Sequence[str] | None = None) -> None:
    args, recipe = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    with processes() as (device, rank, world):
        if recipe.batch_size % world:
            raise SystemExit(f"a batch of {recipe.batch_size} cannot be divided among {world} processes")
        if args.fsdp and not dist.is_initialized():
            raise SystemExit("--fsdp: start several processes with torchrun")
        Training(args, recipe, device, rank, world).run()


if __name__ == "__main__":
    main()
