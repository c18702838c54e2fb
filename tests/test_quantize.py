"""`blockdraft quantize`: its checkpoint, the models that load it, its report, and what it does with bad arguments."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import blockdraft
from blockdraft import SamplingParams, ZayaForCausalLM, cli, convert, quantize
from blockdraft.errors import CheckpointError, ConfigError, RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.config_styles import quantization_config
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.model.tensor_names import legacy_names
from blockdraft.plan import CostTable
from blockdraft.reference.pack_weight import mx_values
from blockdraft.roofline import ModelCost
from bundled_prompts import held_out_prompts
from checkpoints import random_model, save, tiny_config

DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Folder and JSON of one run of the command."""
    out = tmp_path_factory.mktemp("quantize") / "new" / "folder"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *values, **kw: printed.append(values[0]))
        assert cli.main(["quantize", str(blockdraft.bundled_model()), "--out", str(out), "--json"]) == 0
    return out, json.loads("".join(printed))


@pytest.fixture(scope="module")
def folder(report):
    return report[0]


@pytest.fixture
def tiny(tmp_path):
    """A small random checkpoint in bfloat16, without a tokenizer, and where to write."""
    return save(random_model(tiny_config()), tmp_path / "tiny", torch.bfloat16), tmp_path / "out"


def edit(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


# Weights


def test_values_are_the_nearest():
    weight = torch.randn(3, 5, 64).bfloat16()
    weight[1, 2] = 0
    weight[2, 4] = 1e-30
    weight[0, 0, 7] = -9
    values, scales = quantize.quantized(weight)
    assert (values.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (3, 5, 1))
    error = (weight.double() - values.double() * scales.double()).abs()
    assert (error <= scales.double() * 0.50001).all()
    rows = torch.ones(3, 5, dtype=torch.bool)
    rows[1, 2] = False
    assert (values.abs().amax(-1)[rows] == 127).all()
    assert values[0, 0, 7] == -127
    assert not values[1, 2].any()
    assert (scales > 0).all()


@pytest.mark.parametrize("code", range(16))
def test_mx_codes_are_the_nearest(code):
    """Of a value, of what lies a little beside it, and of the middles, which go to the even code."""
    size = MX_SIZES[code & 7]
    x = torch.tensor([size, size * 1.01, size * 0.99]) * (-1 if code & 8 else 1)
    assert quantize.mx_codes(x).tolist() == [code] * 3
    assert quantize.mx_rounded(x).tolist() == [float(x[0])] * 3
    if code & 7 < 7:
        middle = (size + MX_SIZES[(code & 7) + 1]) / 2 * (-1 if code & 8 else 1)
        assert quantize.mx_codes(torch.tensor([middle])).tolist() == [code + (code & 1)]
    else:
        assert quantize.mx_codes(torch.tensor([-1e9 if code & 8 else 1e9])).tolist() == [code]  # cut, not carried


MX_SIZES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def literal_e2m1(code: int) -> float:
    """OCP Microscaling Formats 1.0, 5.3.3: bias 1, no infinity, no NaN."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if code & 8 else size


def literal_e4m3(code: int) -> float:
    """The same, 5.3.1: bias 7, no infinity, NaN with all bits of size set."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    size = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if code & 128 else size


def test_codes_say_what_the_formats_say():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None, None]  # a block
    for exponent in (2, 127, 252):
        values = mx_values(codes[..., ::2] | codes[..., 1::2] << 4, torch.tensor([[[exponent]]], dtype=torch.uint8))
        assert values.flatten().tolist() == [literal_e2m1(code) * 2.0 ** (exponent - 127) for code in range(16)] * 2
        assert torch.equal(values, values.bfloat16().float())
    bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.tensor([literal_e4m3(code) for code in range(256)])
    assert torch.equal(bytes_.nan_to_num(7e7), expected.nan_to_num(7e7))


def test_mxfp4_takes_the_better_scale():
    """No other power of two has a smaller error; blocks of zeros, of the smallest and the largest numbers too."""
    weight = torch.randn(2, 5, 96).bfloat16()
    weight[0, 0], weight[0, 1, :32], weight[1, 1, 40] = 0, 1e-38, 3e38
    weight[1, 2, :32] = 6.5  # cut to 6, or 8, which is nearer
    weight[1, 2, 0] = 7
    codes, scales = quantize.quantized(weight, "mxfp4")
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.uint8, (2, 5, 48), torch.uint8, (2, 5, 3))
    assert scales.min() >= 2
    assert scales.max() <= 252
    blocks = weight.double().unflatten(-1, (3, 32))
    error = (mx_values(codes, scales).double().unflatten(-1, (3, 32)) - blocks).square().sum(-1)
    for step in (-2, -1, 1, 2):
        other = scales.double() + step
        nearest = torch.tensor([literal_e2m1(code) for code in range(16)]).double() * 2.0 ** (
            other[..., None, None] - 127
        )
        errors = (blocks[..., None] - nearest).square().min(-1).values.sum(-1)
        inside = (other >= 2) & (other <= 252)
        assert (errors[inside] >= error[inside] * (1 - 1e-9)).all()
    assert not mx_values(codes, scales)[0, 0].any()


def test_fp8_values_are_the_nearest():
    weight = torch.randn(2, 5, 64).bfloat16()
    weight[1, 2], weight[0, 0, 7] = 0, -9
    values, scales = quantize.quantized(weight, "fp8")
    assert (values.dtype, scales.shape) == (torch.float8_e4m3fn, (2, 5, 1))
    numbers = torch.tensor([literal_e4m3(code) for code in range(256) if code & 127 != 127]).double()
    error = (weight.double() / scales.double() - values.double()).abs()
    nearest = (weight.double()[..., None] / scales.double()[..., None] - numbers).abs().min(-1).values
    assert (error <= nearest + 1e-4).all()
    assert values[0, 0, 7] == -448
    assert not values[1, 2].float().any()


def test_checkpoint_has_all_tensors(folder):
    before, after = (load_file(path / "model.safetensors") for path in (blockdraft.bundled_model(), folder))
    experts = {name for name in before if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert len(experts) == 10
    assert after.keys() == before.keys() | {f"{name}_scale" for name in experts}
    for name, tensor in before.items():
        if name in experts:
            values, scales = quantize.quantized(tensor)
            assert torch.equal(after[name], values)
            assert torch.equal(after[f"{name}_scale"], scales)
        else:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == quantization_config("int8")
    assert (folder / "tokenizer.json").read_bytes() == (blockdraft.bundled_model() / "tokenizer.json").read_bytes()
    assert not (folder / "costs.json").exists()  # times of the model before


@pytest.mark.parametrize("experts", EXPERT_FORMATS)
def test_loads_as_the_products_of_values_and_scales(tmp_path, experts):
    """In float32, where a model with those products for weights differs by float32 roundings alone."""
    source = save(random_model(tiny_config(moe_intermediate_size=64)), tmp_path / "tiny", torch.bfloat16)
    out = tmp_path / "out"
    quantize.quantize(source, out, progress=False, experts=experts)
    products = shutil.copytree(out, out.parent / "products")
    tensors = load_file(out / "model.safetensors")
    scales = {name: value for name, value in tensors.items() if name.endswith("proj_scale")}
    changed: dict[str, Tensor | None] = dict.fromkeys(scales)
    for name, scale in scales.items():
        weight = name.removesuffix("_scale")
        is_mx = experts == "mxfp4"
        changed[weight] = mx_values(tensors[weight], scale) if is_mx else tensors[weight].float() * scale
    edit(products, changed)
    config = json.loads((out / "config.json").read_text())
    (products / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    ids = torch.arange(3, 43)[None]
    a, b, original = (
        ZayaForCausalLM.from_pretrained(path, dtype=torch.float32, progress=False).logits(ids)
        for path in (out, products, source)
    )
    if experts == "mxfp4":
        assert torch.equal(a, b)
    assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert (a - original).abs().max() > 1e-3 * b.abs().max()


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_blocks_give_the_tokens_of_plain_decoding(folder, dtype, law):
    model = ZayaForCausalLM.from_pretrained(folder, dtype=dtype, progress=False)
    prompts = held_out_prompts(6)
    drafters = ("mask", "mask", "ngram", "auto", "mask", "auto")
    plain = [
        model.generate(p, SamplingParams(max_tokens=48, seed=i, sampler="ar", **law))[0] for i, p in enumerate(prompts)
    ]
    params = [
        SamplingParams(max_tokens=48, seed=i, drafter=drafter, groups=i % 3 if drafter == "mask" else None, **law)
        for i, drafter in enumerate(drafters)
    ]
    outputs = model.generate(prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert sum(output.stats.accepted for output in outputs) > 50


@pytest.mark.parametrize("experts", ["mxfp4", "fp8"])
def test_other_formats(tmp_path, capsys, experts):
    """The command, its report, what the folder loads as and what that generates."""
    out = tmp_path / "new"
    command = ["quantize", str(blockdraft.bundled_model()), "--format", experts, "--out", str(out), "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["experts"] == experts
    assert result["bytes_after"] < {"mxfp4": 0.45, "fp8": 0.65}[experts] * result["bytes_before"]
    change = result["report"]
    assert 1e-6 < change["kl_mean"] < {"mxfp4": 0.1, "fp8": 0.005}[experts]
    assert change["top1_agreement"] > {"mxfp4": 0.85, "fp8": 0.97}[experts]
    assert EXPERT_FORMATS[experts].about_scales in quantize.as_text(result)
    config = ZayaConfig.from_folder(out)
    assert config.quantized_experts == experts
    model = ZayaForCausalLM.from_pretrained(out, progress=False)
    prompts = held_out_prompts(3)
    plain = model.generate(prompts, SamplingParams(max_tokens=32, sampler="ar"))
    blocks = model.generate(prompts, [SamplingParams(max_tokens=32, drafter=d) for d in ("mask", "ngram", "auto")])
    assert [output.token_ids for output in blocks] == [output.token_ids for output in plain]
    assert sum(output.stats.accepted for output in blocks) > 10


def test_costs_of_mxfp4(folder):
    int8 = ZayaConfig.from_folder(folder)
    mxfp4 = replace(int8, quantized_experts="mxfp4")
    a, b = (ModelCost.of(config).forward(1, 512, 16, 16) for config in (mxfp4, int8))
    assert a.expert_bytes * 32 == b.expert_bytes * 17
    assert CostTable.modelled(mxfp4, 2).time(1, 1) < CostTable.modelled(int8, 2).time(1, 1)


def test_costs_count_a_byte_a_weight(folder):
    int8, plain = (ZayaConfig.from_folder(path) for path in (folder, blockdraft.bundled_model()))
    assert (int8.quantized_experts, plain.quantized_experts) == ("int8", None)
    a, b = (ModelCost.of(config).forward(1, 512, 16, 16) for config in (int8, plain))
    assert a.expert_bytes * 2 == b.expert_bytes
    assert a.dense_bytes == b.dense_bytes
    assert CostTable.modelled(int8, 2).time(1, 1) < CostTable.modelled(plain, 2).time(1, 1)


def test_legacy_names_of_scales():
    names = legacy_names(f"{DOWN}_scale", tiny_config())
    assert names[4] == "model.layers.3.zaya_block.experts.local_experts.4.linear_fc2.weight_scale"


def test_training_refuses_it(folder):
    with pytest.raises(ConfigError, match="quantization_config: wanted none"):
        convert.load(folder)


# Report


def test_json(report):
    out, result = report
    assert (result["model"], result["out"]) == (str(blockdraft.bundled_model()), str(out))
    assert result["experts"] == "int8"
    assert result["bytes_before"] == (blockdraft.bundled_model() / "model.safetensors").stat().st_size
    assert result["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert result["bytes_after"] < 0.65 * result["bytes_before"]
    change = result["report"]
    assert change["text"] == "built-in"
    assert change["positions"] == change["scored"] + len(blockdraft.verify.PROMPTS)
    assert 0 < change["kl_mean"] < change["kl_p99"] < change["kl_max"] < 0.05
    assert 0.9 < change["top1_agreement"] <= 1
    assert change["bits_per_token"][0] == pytest.approx(change["bits_per_token"][1], rel=0.02)
    assert change["bits_per_token"][0] != change["bits_per_token"][1]
    assert change["bits_per_byte"][0] < change["bits_per_token"][0]


def test_report_is_what_the_logits_say(folder, tmp_path):
    """Taken together once more, in plain terms; text of more than one window."""
    text = "".join(held_out_prompts(16))
    (tmp_path / "text").write_text(text)
    models = [ZayaForCausalLM.from_pretrained(path, progress=False) for path in (blockdraft.bundled_model(), folder)]
    windows = quantize.windows_of(models[0], quantize.texts_of(str(tmp_path / "text")), 1500)
    assert [len(window) for window in windows] == [1024, 478]
    assert {window[0] for window in windows} == {2}
    with torch.inference_mode():
        before = quantize.states_of(models[0], windows, progress=False)
        compared = quantize.compare(models[1], windows, before, progress=False)
    change = quantize.change_of(models[1], "text", windows, compared)
    kl, same, bits = [], [], []
    for window in windows:
        p, q = (model.logits(torch.tensor([window]))[0].double().softmax(-1) for model in models)
        kl.append(torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        bits.append(-torch.stack([law[range(len(window) - 1), window[1:]].log2() for law in (p, q)], 1))
    kls, size = torch.cat(kl), len(models[0].tokenizer.decode(windows[0][1:] + windows[1][1:]).encode())
    assert change.positions == len(kls) == change.scored + 2
    assert change.kl_mean == pytest.approx(float(kls.mean()), rel=1e-6)
    assert change.kl_p99 == pytest.approx(float(kls.sort().values[math.ceil(0.99 * len(kls))]), rel=0.3)
    assert change.kl_max == pytest.approx(float(kls.max()), rel=1e-6)
    assert change.top1_agreement == pytest.approx(float(torch.cat(same).double().mean()))
    assert change.bits_per_token == pytest.approx(torch.cat(bits).mean(0).tolist())
    assert change.bits_per_byte == pytest.approx((torch.cat(bits).sum(0) / size).tolist(), rel=1e-3)


def test_text(report):
    text = quantize.as_text(report[1])
    assert "9.4 MB before, 5.6 MB after (60%)" in text
    assert "built-in prompts" in text
    assert "bits per byte" in text


def test_no_report(tiny, capsys):
    source, out = tiny
    assert cli.main(["quantize", str(source), "--out", str(out), "--no-report"]) == 0
    assert "no report" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


# Errors


def refused(tiny, message: str, *arguments: str, capsys) -> None:
    source, out = tiny
    assert cli.main(["quantize", str(source), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_folder_that_is_not_empty(tiny, capsys):
    tiny[1].mkdir()
    (tiny[1] / "notes").write_text("mine")
    refused(tiny, f"--out: wanted a new or empty folder, got {tiny[1]} with 1 entries", capsys=capsys)
    assert (tiny[1] / "notes").read_text() == "mine"


def test_folder_that_is_a_file(tiny, capsys):
    tiny[1].write_text("")
    refused(tiny, f"--out: wanted a folder, got the file {tiny[1]}", "--no-report", capsys=capsys)


def test_twice(tiny, capsys):
    quantize.quantize(*tiny, progress=False)
    again = tiny[1], tiny[1].parent / "again"
    refused(again, "the experts are int8 already, wanted floats", "--no-report", capsys=capsys)
    assert not again[1].exists()


def test_report_without_tokenizer(tiny, capsys):
    refused(tiny, "the report needs a tokenizer.json beside the weights; --no-report leaves it out", capsys=capsys)
    assert not tiny[1].exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n", "wanted some text, got none"), (b"\xff", "not UTF-8")],
    ids=["absent", "empty", "binary"],
)
def test_text_that_cannot_be_used(tiny, capsys, content, message):
    path = tiny[0].parent / "text"
    if content is not None:
        path.write_bytes(content)
    refused(tiny, f"--text: {path}: {message}", "--text", str(path), capsys=capsys)


@pytest.mark.parametrize("name", ["tokens", "threads"])
def test_counts(tiny, capsys, name):
    refused(tiny, f"--{name}: wanted 1 to 16777216, got 0", f"--{name}", "0", capsys=capsys)


def test_format(tiny, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quantize", str(tiny[0]), "--format", "int4", "--out", str(tiny[1])])
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_full_disk(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(RequestError, match="wanted 0.0 GB of free space, got 0.0 GB"):
        quantize.quantize(*tiny, progress=False)
    assert not tiny[1].exists()


def test_nothing_half_written_stays(tiny, monkeypatch):
    source, out = tiny
    tensors = quantize.tensors_of

    def fails(checkpoint, experts):
        yield next(tensors(checkpoint, experts))
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "tensors_of", fails)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(source, out, progress=False)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {DOWN: t[DOWN].bfloat16()}, f"{DOWN}: dtype BF16, wanted I8, because of quantization_config"),
        (lambda t: {DOWN: t[DOWN].clone().fill_(-128)}, f"{DOWN}: holds -128, wanted -127 to 127"),
        (lambda t: {f"{DOWN}_scale": None}, f"{DOWN}_scale: missing"),
        (lambda t: {f"{DOWN}_scale": t[f"{DOWN}_scale"][:, :, 0].contiguous()}, r"down_proj_scale: shape \[5, 64\]"),
        (lambda t: {f"{DOWN}_scale": t[f"{DOWN}_scale"] * torch.nan}, "down_proj_scale: holds NaN"),
        (lambda t: {"model.norm.weight": t["model.norm.weight"].to(torch.int8)}, "norm.weight: dtype I8, wanted F32"),
    ],
    ids=["float-experts", "-128", "no-scale", "scale-shape", "scale-nan", "int8-norm"],
)
def test_checkpoints_that_are_refused(tiny, change, message):
    quantize.quantize(*tiny, progress=False)
    edit(tiny[1], change(load_file(tiny[1] / "model.safetensors")))
    with pytest.raises(CheckpointError, match=message):
        ZayaForCausalLM.from_pretrained(tiny[1], progress=False)


def test_int8_without_quantization_config(tiny):
    quantize.quantize(*tiny, progress=False)
    config = json.loads((tiny[1] / "config.json").read_text())
    del config["quantization_config"]
    (tiny[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gate_up_proj: dtype I8, wanted F32, BF16 or F16"):
        ZayaForCausalLM.from_pretrained(tiny[1], progress=False)


@pytest.mark.parametrize(
    ("experts", "change", "message"),
    [
        ("mxfp4", lambda t: {DOWN: t[DOWN].to(torch.int8)}, f"{DOWN}: dtype I8, wanted U8, because of quant"),
        ("mxfp4", lambda t: {f"{DOWN}_scale": t[f"{DOWN}_scale"].float()}, f"{DOWN}_scale: dtype F32, wanted U8"),
        (
            "mxfp4",
            lambda t: {f"{DOWN}_scale": t[f"{DOWN}_scale"] * 0},
            "holds scales of exponent 0 to 0, wanted 2 to 252",
        ),
        (
            "mxfp4",
            lambda t: {f"{DOWN}_scale": t[f"{DOWN}_scale"] | 255},
            "holds scales of exponent 255 to 255, wanted 2",
        ),
        ("mxfp4", lambda t: {DOWN: t[DOWN][..., :8].contiguous()}, r"shape \[5, 64, 8\], wanted \[5, 64, 32\]"),
        ("fp8", lambda t: {DOWN: t[DOWN].view(torch.uint8)}, f"{DOWN}: dtype U8, wanted F8_E4M3, because of quant"),
        ("fp8", lambda t: {DOWN: nan_at_the_end(t[DOWN])}, f"{DOWN}: holds NaN"),
        ("fp8", lambda t: {f"{DOWN}_scale": t[f"{DOWN}_scale"] / 0}, "down_proj_scale: holds NaN or infinity"),
    ],
)
def test_other_checkpoints_that_are_refused(tmp_path, experts, change, message):
    source = save(random_model(tiny_config(moe_intermediate_size=64)), tmp_path / "tiny", torch.bfloat16)
    quantize.quantize(source, tmp_path / "out", progress=False, experts=experts)
    edit(tmp_path / "out", change(load_file(tmp_path / "out" / "model.safetensors")))
    with pytest.raises(CheckpointError, match=message):
        ZayaForCausalLM.from_pretrained(tmp_path / "out", progress=False)


def nan_at_the_end(values: Tensor) -> Tensor:
    codes = values.view(torch.uint8).clone()
    codes[-1, -1, -1] = 255
    return codes.view(torch.float8_e4m3fn)


def test_mxfp4_wants_whole_blocks(tiny, capsys):
    message = "moe_intermediate_size: wanted a multiple of 32 with experts of mxfp4, got 40"
    refused(tiny, message, "--format", "mxfp4", "--no-report", capsys=capsys)
    assert not tiny[1].exists()


def test_fp8_experts_of_the_older_layout(tmp_path):
    """One tensor for each expert, with a scale in bfloat16."""
    source = save(random_model(tiny_config()), tmp_path / "tiny", torch.bfloat16)
    quantize.quantize(source, tmp_path / "out", progress=False, experts="fp8")
    config, tensors = ZayaConfig.from_folder(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj_scale")]:
        tensors[name] = tensors[name].bfloat16().float()
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    older = shutil.copytree(tmp_path / "out", tmp_path / "older")
    parts: dict[str, Tensor] = {}
    for name, value in tensors.items():
        names = legacy_names(name, config)
        value = value.bfloat16() if name.endswith("_proj_scale") else value
        parts |= zip(names, value if ".experts." in name else [value], strict=True)
    save_file({name: value.clone() for name, value in parts.items()}, older / "model.safetensors")
    ids = torch.arange(3, 43)[None]
    a, b = (ZayaForCausalLM.from_pretrained(tmp_path / n, progress=False).logits(ids) for n in ("out", "older"))
    assert torch.equal(a, b)
