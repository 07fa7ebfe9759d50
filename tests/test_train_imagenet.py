"""The example, run as its users run it: on a folder of images, on one process and on two, stopped and started again."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import train_imagenet  # noqa: E402

KILLS = int(os.environ.get("PE_FX_KILLS", "3"))
"""How often the training is killed: PE_FX_KILLS=20 pytest tests/test_train_imagenet.py -k killed"""

TINY = ["--img-size", "32", "--model-kwargs", "img_size=32", "embed_dim=16", "depth=2", "num_heads=2"]
VIT = ["--recipe", "vit", *TINY]
PLAIN = ["--recipe", "resnet", "--model", "vit_pe_small", *TINY]
"""Without mixup, which mixes the images of one process, and without norms over the batch: as one process, so two."""
RESNET = ["--recipe", "resnet", "--img-size", "64", "--model-kwargs", "layers=(2,2,1,1)", "channels=(4,8,8,8)"]
SHORT = ["--epochs", "2", "--batch-size", "4", "--workers", "0", "--save-every", "1", "--ema-decay", "0.9", "--lr", "0.01"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, of dark and of light noise: 17 images to train on, which four a step leave one of, and 7 to validate."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, counts in (("train", (9, 8)), ("validation", (4, 3))):
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(0, 128, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(120 * label)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """Processes that start with the example imported."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        context.set_forkserver_preload(["train_imagenet", "torch.export"])
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
        yield context


def run(arguments: Sequence[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    train_imagenet.main(arguments)


def start(server: Any, arguments: Sequence[str], world: int = 0) -> list[BaseProcess]:
    """What torchrun does for `world` processes; 0: one without it."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(max(world, 1)):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {}
        process = server.Process(target=run, args=(arguments, environment))
        process.start()
        processes.append(process)
    return processes


def train(server: Any, data: Path, output: Path, *arguments: str, world: int = 0) -> dict[str, Any]:
    """The last checkpoint of a run that nothing stops."""
    processes = start(server, ["--data", str(data), "--output", str(output), *SHORT, *arguments], world)
    for process in processes:
        process.join(120)
    assert not any(process.exitcode for process in processes)
    return last(output)


def last(output: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(output / "last.pt", weights_only=True)
    return state


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, dict):
        return {key: value for part, item in state.items() for key, value in tensors(item, f"{name}.{part}").items()}
    return {name: state} if isinstance(state, torch.Tensor) else {}


def assert_equal(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> None:
    a_tensors, b_tensors = tensors(a), tensors(b)
    assert a_tensors.keys() == b_tensors.keys()
    for name, value in a_tensors.items():
        torch.testing.assert_close(value, b_tensors[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def whole_run(server: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run of the ViT's recipe that nothing stopped, and how long it took."""
    output = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    train(server, images, output, *VIT)
    return output, time.monotonic() - begin


def test_a_run_leaves_a_log_and_checkpoints_that_timm_loads(whole_run: tuple[Path, float]) -> None:
    output, _ = whole_run
    assert sorted(file.name for file in output.iterdir()) == ["best.pt", "last.pt", "log.csv"]
    with (output / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"lr", "loss", "top1", "top5", "ema_top1", "ema_top5"} < set(rows[0])
    state = last(output)
    assert state["progress"]["epoch"] == 2
    options = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2}
    model = timm.create_model("vit_pe_small", checkpoint_path=output / "last.pt", **options)
    assert_equal({"": dict(model.state_dict())}, {"": state["state_dict_ema"]})
    assert "blocks.0.mlp.fc2.weight" not in state["state_dict"]


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    server: Any, images: Path, whole_run: tuple[Path, float], tmp_path: Path
) -> None:
    """Each time it does at least one step more; where it comes to its end it begins anew."""
    expected, seconds = whole_run
    file = tmp_path / "last.pt"
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        before = file.stat().st_mtime_ns if file.exists() else None
        (process,) = start(server, ["--data", str(images), "--output", str(tmp_path), *SHORT, *VIT])
        while process.exitcode is None and (file.stat().st_mtime_ns if file.exists() else None) == before:
            time.sleep(0.005)
        process.join(moments.uniform(0, 0.2) * seconds)
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            assert tensors(last(tmp_path)).keys() == tensors(last(expected)).keys()
        else:
            assert process.exitcode == 0
            assert_equal(last(tmp_path), last(expected))
            file.unlink()
    assert_equal(train(server, images, tmp_path, *VIT), last(expected))
    assert (tmp_path / "log.csv").read_text() == (expected / "log.csv").read_text()


def test_it_goes_on_within_an_epoch(server: Any, images: Path, whole_run: tuple[Path, float], tmp_path: Path) -> None:
    """Not merely from the epoch's beginning: the steps that were done are not done again. Who loads the images does not matter."""
    expected, _ = whole_run
    args, recipe = train_imagenet.parse(["--data", str(images), "--output", str(tmp_path), *SHORT, *VIT, "--workers", "1"])
    training = train_imagenet.Training(args, recipe, torch.device("cpu"), 0, 1)
    steps = []

    def stop_at_the_sixth(*_: Any) -> None:
        steps.append((training.progress.epoch, training.progress.step))
        if len(steps) == 6:
            raise KeyboardInterrupt

    training.trained.register_forward_pre_hook(lambda module, _: stop_at_the_sixth() if module.training else None)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert steps[-1] == (1, 1)
    assert (last(tmp_path)["progress"]["epoch"], last(tmp_path)["progress"]["step"]) == (1, 1)
    again = train_imagenet.Training(args, recipe, torch.device("cpu"), 0, 1)
    again.trained.register_forward_pre_hook(lambda module, _: steps.append(again.progress.step) if module.training else None)
    again.run()
    assert steps[6:] == [1, 2, 3]
    assert_equal(last(tmp_path), last(expected))


def test_two_processes_are_as_one_and_sharded_ones_go_on_from_their_checkpoint(server: Any, images: Path, tmp_path: Path) -> None:
    one = train(server, images, tmp_path / "one", *PLAIN)
    two = train(server, images, tmp_path / "two", *PLAIN, world=2)
    assert_equal(two, one, 1e-5)

    output = tmp_path / "killed"
    processes = start(server, ["--data", str(images), "--output", str(output), *SHORT, *PLAIN], world=2)
    while not (output / "last.pt").exists():
        assert all(process.exitcode is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    assert (last(output)["progress"]["epoch"], last(output)["progress"]["step"]) != (2, 0)
    assert_equal(train(server, images, output, *PLAIN, "--fsdp", world=2), one, 1e-5)


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_one_process_of_torchrun_is_as_one_without(
    server: Any, images: Path, whole_run: tuple[Path, float], tmp_path: Path, flags: list[str]
) -> None:
    assert_equal(train(server, images, tmp_path, *VIT, *flags, world=1), last(whole_run[0]), tolerance=1e-5)


def test_the_recipe_of_the_resnet_with_bfloat16(images: Path, tmp_path: Path) -> None:
    train_imagenet.main(["--data", str(images), "--output", str(tmp_path), *SHORT, *RESNET, "--bf16", "--epochs", "1"])
    state = last(tmp_path)
    assert "layer1.1.conv3.weight" not in state["state_dict"]
    assert state["state_dict"]["layer1.0.conv3.weight"].dtype == torch.float32
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {1e-4}
    assert "momentum_buffer" in state["optimizer"]["state"][0]


def test_compiled_it_learns_the_same(images: Path, tmp_path: Path) -> None:
    for backend in ("none", "pe_fx"):
        output = tmp_path / backend
        train_imagenet.main(
            ["--data", str(images), "--output", str(output), *SHORT, *VIT, "depth=1", "--epochs", "1", "--backend", backend]
        )
    assert_equal(last(tmp_path / "pe_fx"), last(tmp_path / "none"), 1e-4)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_text("before")
    with contextlib.suppress(KeyboardInterrupt), train_imagenet.replacing(tmp_path / "last.pt") as draft:
        draft.write_text("aft")
        raise KeyboardInterrupt
    assert (tmp_path / "last.pt").read_text() == "before"
    with train_imagenet.replacing(tmp_path / "last.pt") as draft:
        draft.write_text("after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("last.pt", "after")]


def test_other_settings_do_not_go_on_from_a_checkpoint(images: Path, whole_run: tuple[Path, float]) -> None:
    output, _ = whole_run
    with pytest.raises(SystemExit, match="other settings"):
        train_imagenet.main(["--data", str(images), "--output", str(output), *SHORT, *VIT, "--lr", "1"])
    with pytest.raises(SystemExit, match="other settings"):
        train_imagenet.main(["--data", str(images), "--output", str(output), *SHORT, *VIT, "--seed", "7"])
    with pytest.raises(SystemExit, match="set --batch-size"):
        train_imagenet.main(["--data", str(images), "--output", str(output), "--recipe", "vit", *TINY])


def test_every_image_is_seen_once_an_epoch_whatever_the_number_of_processes() -> None:
    order = list(range(17))
    assert train_imagenet.batches(order, 4, 0, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert train_imagenet.batches(order, 4, 0, 2) == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert train_imagenet.batches(order, 4, 1, 2) == [[2, 3], [6, 7], [10, 11], [14, 15]]
