"""pe_fx.transformers: a tied model is saved and loaded as any other, and never filled in by a class that knows nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import pe_fx
import pe_fx.checkpoint
from pe_fx.transformers import PeFxConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IDS = torch.arange(14).view(2, 7)
TOKENS = {"input_ids": IDS}

ARCHITECTURES: dict[str, tuple[type, Any, dict[str, Tensor]]] = {
    "bert": (transformers.BertModel, transformers.BertConfig(vocab_size=99, **SMALL), TOKENS),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4), TOKENS),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=99, **SMALL), TOKENS),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        TOKENS | {"decoder_input_ids": IDS},
    ),
    "vit": (
        transformers.ViTModel,
        transformers.ViTConfig(image_size=16, patch_size=4, **SMALL),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)},
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(vocab_size=99, num_local_experts=2, num_key_value_heads=4, **SMALL),
        TOKENS,
    ),
}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def built(name: str) -> Any:
    cls, config, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return cls(config).eval()


def output(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**ARCHITECTURES[name][2])[0]


def bytes_of(folder: Path, part: str = "") -> int:
    sizes = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes += sum(file.get_tensor(key).nbytes for key in file.keys() if part in key)  # noqa: SIM118
    return sizes


def tied_folder(tmp_path: Path, name: str = "bert", **options: Any) -> tuple[Any, Path]:
    tied = pe_fx.transform(built(name), **options)
    tied.save_pretrained(tmp_path / "tied")
    return tied, tmp_path / "tied"


@each_architecture
@pytest.mark.parametrize("mix", ["none", "signed"])
def test_round_trip(name: str, mix: str, tmp_path: Path) -> None:
    dense = built(name)
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    tied = cls.from_pretrained(tmp_path / "dense", quantization_config=PeFxConfig(mix=mix))
    expected = output(tied, name)
    torch.testing.assert_close(expected, output(pe_fx.transform(dense, mix=mix), name))
    tied.save_pretrained(tmp_path / "tied")
    again, info = cls.from_pretrained(tmp_path / "tied", output_loading_info=True)
    assert torch.equal(output(again, name), expected)
    assert not any(info.values()), info
    assert [str(tie) for tie in pe_fx.plan(again).ties] == []
    again.save_pretrained(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "tied") < bytes_of(tmp_path / "dense")


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """And half the size, where all of a block's weights are tied: as in ViT, by the blocks."""
    outputs = {}
    for name in ARCHITECTURES:
        tied = pe_fx.transform(built(name), mix="signed")
        tied.save_pretrained(tmp_path / name)
        outputs[name] = output(tied, name)
        built(name).save_pretrained(tmp_path / f"{name} dense")
    assert bytes_of(tmp_path / "vit", "layer") <= 0.55 * bytes_of(tmp_path / "vit dense", "layer")
    torch.save({name: (outputs[name], ARCHITECTURES[name][2]) for name in ARCHITECTURES}, tmp_path / "outputs.pt")
    code = """
import sys, torch, transformers
import pe_fx.transformers
from pathlib import Path
folder = Path(sys.argv[1])
for name, (expected, inputs) in torch.load(folder / "outputs.pt").items():
    model = getattr(transformers, transformers.AutoConfig.from_pretrained(folder / name).architectures[0]).from_pretrained(folder / name)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected), name
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-3000:]


def test_without_the_import(tmp_path: Path) -> None:
    """A dense class refuses the folder, and its report says what to import."""
    _, folder = tied_folder(tmp_path)
    code = f"import transformers; transformers.AutoModel.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is tied: import pe_fx.transformers before from_pretrained" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: You set `ignore_mismatched_sizes` to `False`")


def test_the_plan_is_in_the_configuration(tmp_path: Path) -> None:
    _, folder = tied_folder(tmp_path, rules=["mlp"], mix="signed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "pe_fx"
    plan = pe_fx.Plan.from_json(json.dumps(config["plan"]))
    assert plan.sites == pe_fx.plan(built("bert"), rules=["mlp"], mix="signed").sites
    assert pe_fx.checkpoint.read_plan(folder / "model.safetensors") == plan


def test_a_base_model_in_one_with_a_head_and_back(tmp_path: Path) -> None:
    tied, folder = tied_folder(tmp_path, mix="signed")
    head, info = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert torch.equal(output(head.bert, "bert"), output(tied, "bert"))
    head.save_pretrained(tmp_path / "head")
    assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path / "head"), "bert"), output(tied, "bert"))


def test_shards_and_dtypes(tmp_path: Path) -> None:
    tied = pe_fx.transform(built("llama"), mix="signed")
    tied.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert again.dtype is torch.bfloat16
    expected = tied.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_it_is_none_that_is_quantized(tmp_path: Path) -> None:
    """So it converts and moves as before."""
    _, folder = tied_folder(tmp_path, "llama")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert not model.is_quantized
    assert model.half().float().dtype is torch.float32
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_untied_since(tmp_path: Path) -> None:
    tied, folder = tied_folder(tmp_path)
    pe_fx.untie(transformers.AutoModel.from_pretrained(folder)).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    plain = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    assert isinstance(dict(plain.named_parameters())["encoder.layer.0.output.dense.weight"], torch.nn.Parameter)
    torch.testing.assert_close(output(plain, "bert"), output(tied, "bert"))


def test_dense_weights_beside_a_plan_are_refused(tmp_path: Path) -> None:
    """As where a dense model is made of a tied one's configuration, and saved."""
    _, folder = tied_folder(tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.BertModel(config).save_pretrained(folder)
    for cls in (transformers.AutoModel, transformers.BertForSequenceClassification):
        with pytest.raises(pe_fx.PeFxError, match=r"holds a dense encoder.*take `quantization_config` out of config.json"):
            cls.from_pretrained(folder)


def test_by_a_plan_made_before(tmp_path: Path) -> None:
    dense = built("bert")
    dense.save_pretrained(tmp_path)
    plan = pe_fx.plan(dense, include=["encoder.layer.1.*"])
    tied = transformers.AutoModel.from_pretrained(tmp_path, quantization_config=PeFxConfig(plan, init="mean"))
    torch.testing.assert_close(output(tied, "bert"), output(pe_fx.apply(dense, plan, init="mean"), "bert"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "other"}, "mix='other' is unknown"),
        ({"init": "other"}, "init='other' is unknown"),
        ({"mixed": True}, "the option='mixed' is unknown"),
        ({"rules": [object()]}, "rules"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pe_fx.PeFxError, match=message):
        PeFxConfig(**options)


def test_state_dicts_of_files_load_into_tied_models(tmp_path: Path) -> None:
    """What stands for tied weights in a file is no weight, whoever reads it."""
    from safetensors.torch import load_file

    tied, folder = tied_folder(tmp_path)
    fresh = pe_fx.transform(built("bert"), init="reset")
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(output(fresh, "bert"), output(tied, "bert"))
    again = pe_fx.checkpoint.load(folder / "model.safetensors", built("bert"))
    assert torch.equal(output(again, "bert"), output(tied, "bert"))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": (torch.arange(8) + i) % 99, "labels": (torch.arange(8) + i) % 99}


def trained(model: Any, folder: Path, steps: int, **more: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=5,
        eval_steps=5,
        eval_strategy="steps",
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        load_best_model_at_end=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(**more)
    return trainer.model


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    start = pe_fx.transform(built("llama"), mix="signed")
    start.save_pretrained(tmp_path / "start")
    load = transformers.LlamaForCausalLM.from_pretrained
    whole = trained(load(tmp_path / "start"), tmp_path / "whole", 10)
    trained(load(tmp_path / "start"), tmp_path / "half", 5)
    resumed = trained(load(tmp_path / "start"), tmp_path / "half", 10, resume_from_checkpoint=True)
    assert not torch.equal(output(whole, "llama"), output(start, "llama"))
    assert torch.equal(output(resumed, "llama"), output(whole, "llama"))
    assert torch.equal(output(load(tmp_path / "half/checkpoint-10"), "llama"), output(whole, "llama"))


def test_adapters_on_a_tied_base(tmp_path: Path) -> None:
    import peft

    _, folder = tied_folder(tmp_path, "llama", mix="signed")
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    before = output(base, "llama")
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = output(model, "llama")
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(output(again, "llama"), after)


def test_offloaded_where_the_tied_folder_is_and_where_it_is_to_be_tied(tmp_path: Path) -> None:
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    where: dict[str, Any] = {"device_map": places | {"lm_head": "disk"}, "offload_folder": str(tmp_path / "offloaded")}
    tied, folder = tied_folder(tmp_path, "llama", mix="signed")
    again = transformers.LlamaForCausalLM.from_pretrained(folder, **where)
    assert torch.equal(output(again, "llama"), output(tied, "llama"))
    built("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(pe_fx.PeFxError, match=r"model\.layers\.1.* offloaded: nothing can be tied to it"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PeFxConfig(), **where)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_memory_of_loading_is_that_of_the_tied_weights(tmp_path: Path) -> None:
    """By checkpoint.load of what builds the model, too."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "intermediate_size": 3072}
    pe_fx.transform(built("bert"), mix="signed").save_pretrained(tmp_path / "small")
    tied = pe_fx.transform(transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)), TOKENS, mix="signed", inplace=True)
    tied.save_pretrained(tmp_path / "large")
    weights = sum(parameter.nbytes for parameter in tied.parameters())
    code = """
import sys, torch, transformers
import pe_fx.transformers
from pathlib import Path
from pe_fx import checkpoint
folder, way = Path(sys.argv[1]), sys.argv[2]
def resident(name):
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])
def loaded(size):
    if way == "from_pretrained":
        model = transformers.BertModel.from_pretrained(folder / size)
    else:
        config = transformers.AutoConfig.from_pretrained(folder / size)
        model = checkpoint.load(folder / size / "model.safetensors", lambda: transformers.BertModel(config))
    assert all(parameter.sum().isfinite() for parameter in model.parameters())
    return model
loaded("small")  # for what is imported on the way
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = loaded("large")
print(resident("VmHWM") - before)
"""
    bound = 1.15 * weights + 24e6
    for way in ("from_pretrained", "checkpoint.load"):
        peaks: list[int] = []
        while len(peaks) < 4 and not (peaks and peaks[-1] < bound):  # mapped pages of the file count as well, now and then all of them
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path), way], capture_output=True, text=True)
            peaks.append(int(done.stdout))
        assert min(peaks) < bound, (way, [peak / weights for peak in peaks], done.stderr[-500:])
