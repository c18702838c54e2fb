"""Trains the bundled model: AR pre-training, then conversion to block diffusion (`blockdraft.convert`).

    python recipes/nano/train.py OUT            # run.sh has the stages of the bundled weights

One schedule: warm-up, constant rate, linear decay over the last half of the conversion. Writes OUT/model.safetensors
(bfloat16), config.json, tokenizer files, log.jsonl and loss.png. A GPU is used where there is one. A run that was
interrupted goes on from OUT/state.pt, one that has ended does nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import data
from blockdraft import convert
from blockdraft.model.config import DRAFT_HEADS, ZayaConfig
from blockdraft.reference.model import Rows, ZayaReference
from export import export, plot_losses

# hidden_size, num_hidden_layers, heads, key-value heads, head_dim, experts, their inner size, router width
SIZES = {
    "nano": (256, 5, 4, 2, 32, 16, 64, 64),
    "ci": (128, 3, 4, 2, 32, 8, 64, 32),
    "tiny": (64, 2, 2, 2, 16, 4, 32, 16),
}
LOG_EVERY, SAVE_EVERY = 10, 200


def nano_config(size: str, vocab_size: int, block_length: int, mask_context: str) -> ZayaConfig:
    H, L, Hq, Hkv, D, E, inner, R = SIZES[size]
    return ZayaConfig(
        vocab_size=vocab_size, hidden_size=H, num_hidden_layers=L, num_attention_heads=Hq, num_key_value_heads=Hkv,
        head_dim=D, num_experts=E, moe_intermediate_size=inner, router_hidden_size=R, max_position_embeddings=2048,
        rope_parameters={"hybrid": {"rope_type": "default", "rope_theta": 2_000.0, "partial_rotary_factor": 0.5}},
        layer_types=("hybrid",) * L, bos_token_id=data.BOS, eos_token_ids=(data.EOS,), pad_token_id=data.PAD,
        mask_token_id=data.MASK, block_length=block_length, mask_parent=convert.MASK_CONTEXTS[mask_context],
    )  # fmt: skip


@torch.no_grad()
def initialise(model: ZayaReference) -> None:
    for name, p in model.named_parameters():
        if "conv_qk_depthwise.weight" in name:
            p.copy_(torch.tensor([0.0, 1.0]).expand_as(p) + 0.1 * torch.randn_like(p))
        elif name.endswith("bias") or name.endswith("conv_qk_grouped.weight"):
            p.normal_(0, 0.02)
        elif "embed_tokens" in name:
            p.normal_(0, 0.05)
        elif name.endswith("temp"):
            p.fill_(3.0)
        elif name.endswith("input_hidden_states_scale"):
            p.fill_(10.0)  # the tied head wants small embeddings, the stream wants entries near 1
        elif name.endswith("router_mlp.out_proj.weight"):
            p.normal_(0, 0.1 * p.shape[-1] ** -0.5)  # near-uniform routing at first
        elif p.dim() >= 2:
            p.normal_(0, p.shape[-1] ** -0.5 * (0.5 if "down_proj" in name or "o_proj" in name else 1.0))
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = -1.0  # the skip class is never chosen, as in the released models


@torch.no_grad()
def balance(model: ZayaReference, rate: float, length: int) -> float:
    """Moves each expert's selection bias against its load; returns the largest share any expert has of a layer.

    In layer 0 clean rows only: mask rows are all alike there and go to one expert, which no bias can spread. The mean
    stays 0: where most experts have little, all biases would rise together, and at 12 a choice is rounded to 2^-20.
    """
    worst = 0.0
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts.gate_up_proj.shape[0]
        chosen = layer.mlp.chosen[:, : length if i == 0 else None]
        load = chosen.flatten().bincount(minlength=experts + 1)[:experts].float()
        biases = layer.mlp.gate.balancing_biases[:experts]
        biases -= rate * (load - load.mean()).sign()
        biases -= biases.mean()
        worst = max(worst, float(load.max() / load.sum()))
    return worst


def batch_of(stream: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Pieces ``[batch, length]`` of the stream, with <bos> as their first token."""
    start = torch.randint(len(stream) - length, (batch,), generator=generator)
    tokens = stream[start[:, None] + torch.arange(length)].long()
    tokens[:, 0] = data.BOS
    return tokens


class Material:
    """What batches are drawn from: true text, the model's own text, true text with own continuations as labels."""

    def __init__(self, args: argparse.Namespace, stream: Tensor) -> None:
        self.args, self.stream = args, stream
        self.own = torch.load(args.own_text) if args.own_text else None
        self.branches = torch.load(args.branches) if args.branches else None
        self.own_rows = 0
        if self.own is not None:
            self.own_rows = args.batch // 2 if args.own_rows is None else args.own_rows

    def ar_batch(self, generator: torch.Generator) -> Tensor:
        return batch_of(self.stream, self.args.batch, self.args.length, generator)

    def conversion_batch(self, offset: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and labels ``[batch, length]``; own text is at the end."""
        length, real = self.args.length, self.args.batch - self.own_rows
        tokens = labels = batch_of(self.stream, real, length, generator)
        if self.branches is not None:
            chosen = torch.randint(self.branches["tokens"].shape[1], (real,), generator=generator)
            tokens, labels = (self.branches[key][offset, chosen, :length].long() for key in ("tokens", "labels"))
        if not self.own_rows:
            return tokens, labels
        own = self.own[torch.randint(len(self.own), (self.own_rows,), generator=generator), :length].long()
        return torch.cat([tokens, own]), torch.cat([labels, own])


class Trainer:
    """Model, optimizer and what has been logged; `state.pt` is all of it."""

    def __init__(self, args: argparse.Namespace, model: ZayaReference, material: Material, device: str) -> None:
        self.args, self.model, self.material, self.device = args, model.to(device), material, device
        trained = convert.only_draft_head(model) if args.only_draft_head else list(model.parameters())
        matrices = [p for p in trained if p.dim() >= 2]
        others = [p for p in trained if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step, self.total, self.seconds = 0, args.steps + args.convert_steps, 0.0
        self.log: list[dict] = []

    def rate(self) -> float:
        args, warmup = self.args, min(100, self.args.steps // 4 + 1)
        left = 2 * (self.total - self.step) / max(1, args.convert_steps)
        return args.rate * min(1, (self.step + 1) / warmup, 1 if args.constant_rate else left)

    def losses(self) -> dict[str, Tensor]:
        """Of a new batch; "loss" is what is minimised."""
        args, model = self.args, self.model
        if self.step < args.steps:
            tokens = self.material.ar_batch(self.generator).to(self.device)
            logits = model(tokens, Rows.causal(args.length, self.device))
            ar = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            return {"loss": ar, "ar": ar}
        offset = int(torch.randint(args.block_length, (1,), generator=self.generator))
        tokens, labels = (x.to(self.device) for x in self.material.conversion_batch(offset, self.generator))
        batch = convert.doubled_batch(tokens, model.config, offset, labels, args.decay)
        logits = model(batch.input_ids, batch.rows, batch.previous)
        ar, diffusion = convert.losses(logits, batch, args.batch - self.material.own_rows)
        return {"loss": convert.objective(ar, diffusion, args.alpha), "ar": ar, "diffusion": diffusion}

    def train_step(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        losses = self.losses()
        self.optimizer.zero_grad(set_to_none=True)
        losses.pop("loss").backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        shown = {name: loss.item() for name, loss in losses.items()}
        if not self.args.only_draft_head:
            shown["max_load"] = balance(self.model, 3e-3 * self.rate() / self.args.rate, self.args.length)
        return shown

    @torch.no_grad()
    def evaluate(self, stream: Tensor) -> dict[str, float]:
        """Held-out losses in nats per token over 16 fixed windows, every mask weighing the same."""
        tokens = batch_of(stream, 16, self.args.length, torch.Generator().manual_seed(0)).to(self.device)
        batch = convert.doubled_batch(tokens, self.model.config)
        ar, diffusion = convert.losses(self.model(batch.input_ids, batch.rows, batch.previous), batch)
        return {"held_out_ar": ar.item(), "held_out_diffusion": diffusion.item()}

    def save(self, path: Path) -> None:
        state = {
            "arguments": vars(self.args) | {"out": ""},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in ("step", "seconds", "log")},
        }
        partial = path.with_suffix(".partial")
        torch.save(state | {"arguments": json.dumps(state["arguments"], default=str)}, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device)
        if state["arguments"] != json.dumps(vars(self.args) | {"out": ""}, default=str):
            raise SystemExit(f"{path}: of a run with other arguments; remove it to begin anew")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--steps", type=int, default=1000, help="AR pre-training")
    parser.add_argument("--convert-steps", type=int, default=1500, help="TiDAR objective, rate decays to 0")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--mask-context", choices=convert.MASK_CONTEXTS, default="prefix")
    parser.add_argument("--draft-head", choices=DRAFT_HEADS, help="with --init; default: the checkpoint's")
    parser.add_argument("--only-draft-head", action="store_true", help="train that alone: AR rows keep their bits")
    parser.add_argument("--vocab", type=int, default=272)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the AR loss in conversion")
    parser.add_argument("--decay", type=float, default=0.75, help="weight of the j-th mask of a block: decay ** j")
    parser.add_argument("--init", type=Path, help="start from this checkpoint (with --steps 0: conversion alone)")
    parser.add_argument("--own-text", type=Path, help="a part of each conversion batch, from own_text.py")
    parser.add_argument("--own-rows", type=int, help="how many rows of a batch; default: half of it")
    parser.add_argument("--branches", type=Path, help="true text with own continuations as labels, from branches.py")
    parser.add_argument("--constant-rate", action="store_true", help="no decay: a later stage goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-bytes", type=int, help="train on this much text only, for a quick run")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, Tensor, Tensor]:
    """Tokenizer, training and held-out stream; writes what they are made of to OUT/manifest.json."""
    train, held_out = data.split(args.max_bytes)
    (args.out / "manifest.json").write_text(json.dumps(data.manifest(train, held_out), indent=1) + "\n")
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    else:
        tokenizer = data.train_tokenizer([text for _, text in train], args.vocab)
    folder = args.out.parent  # the stages share it
    stream, held_out_stream = (data.encode(tokenizer, [text for _, text in part], folder) for part in (train, held_out))
    bytes_per_token = sum(len(text.encode()) for _, text in train) / len(stream)
    print(f"{len(train)} files, {len(stream)} tokens of {bytes_per_token:.2f} bytes; {len(held_out)} files held out")
    return tokenizer, stream, held_out_stream


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> ZayaReference:
    if args.init:
        options = {"block_length": args.block_length, "mask_context": args.mask_context, "draft_head": args.draft_head}
        return convert.load(args.init, **options)
    if args.draft_head:
        raise SystemExit("--draft-head: wanted with --init, for AR pre-training does not reach it")
    model = ZayaReference(nano_config(args.size, tokenizer.get_vocab_size(), args.block_length, args.mask_context))
    initialise(model)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, stream, held_out = prepare(args)
    trainer = Trainer(args, new_model(args, tokenizer), Material(args, stream), device)
    state = args.out / "state.pt"
    if state.exists():
        trainer.resume(state)
    started = time.time() - trainer.seconds
    progress = tqdm(total=trainer.total, initial=trainer.step, desc=args.out.name, mininterval=2)
    while trainer.step < trainer.total:
        entry = {"step": trainer.step, "seconds": round(time.time() - started, 1)} | trainer.train_step()
        trainer.step += 1
        last = trainer.step == trainer.total
        if entry["step"] % SAVE_EVERY == 0 or trainer.step == args.steps or last:
            entry |= trainer.evaluate(held_out)
        if entry["step"] % LOG_EVERY == 0 or "held_out_ar" in entry:
            trainer.log.append(entry)
            shown = {key: f"{value:.3f}" for key, value in entry.items() if "ar" in key or "diff" in key}
            progress.set_postfix(shown, refresh=False)
        if trainer.step % SAVE_EVERY == 0 or last:
            trainer.seconds = time.time() - started
            export(trainer.model, tokenizer, args.out)
            (args.out / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in trainer.log))
            trainer.save(state)
        progress.update()
    progress.close()
    plot_losses(args.out)


if __name__ == "__main__":
    main()
