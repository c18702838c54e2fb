"""Trains the bundled model: AR pre-training, then conversion to block diffusion by the TiDAR objective.

    python recipes/nano/train.py OUT            # run.sh has the stages of the bundled weights

One schedule: warm-up, constant rate, linear decay over the last half of the conversion. Writes OUT/model.safetensors
(bfloat16), config.json, tokenizer files, log.jsonl and loss.png. A GPU is used where there is one.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import data
import tidar
from blockdraft.model.config import ZayaConfig
from blockdraft.reference.model import Rows, ZayaReference
from export import export, plot_losses


def nano_config(vocab_size: int, block_length: int) -> ZayaConfig:
    return ZayaConfig(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_experts=16, moe_intermediate_size=64, router_hidden_size=64, max_position_embeddings=2048,
        rope_parameters={"hybrid": {"rope_type": "default", "rope_theta": 2_000.0, "partial_rotary_factor": 0.5}},
        layer_types=("hybrid",) * 5, bos_token_id=data.BOS, eos_token_ids=(data.EOS,), pad_token_id=data.PAD,
        mask_token_id=data.MASK, block_length=block_length, mask_parent="anchor",
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

    In layer 0 clean rows only: mask rows are all alike there and go to one expert, which no bias can spread.
    """
    worst = 0.0
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts.gate_up_proj.shape[0]
        load = (
            layer.mlp.chosen[:, : length if i == 0 else None]
            .flatten()
            .bincount(minlength=experts + 1)[:experts]
            .float()
        )
        layer.mlp.gate.balancing_biases[:experts] -= rate * (load - load.mean()).sign()
        worst = max(worst, float(load.max() / load.sum()))
    return worst


def own_batch(rows: Tensor, batch: int, length: int, generator: torch.Generator, device: str) -> Tensor:
    return rows[torch.randint(len(rows), (batch,), generator=generator), :length].long().to(device)


def branch_batch(
    branches: dict[str, Tensor], offset: int, batch: int, generator: torch.Generator, device: str
) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(branches["tokens"].shape[1], (batch,), generator=generator)
    return branches["tokens"][offset, chosen].long().to(device), branches["labels"][offset, chosen].long().to(device)


def batch_of(stream: Tensor, batch: int, length: int, generator: torch.Generator, device: str) -> Tensor:
    start = torch.randint(len(stream) - length, (batch,), generator=generator)
    tokens = stream[start[:, None] + torch.arange(length)].long()
    tokens[:, 0] = data.BOS
    return tokens.to(device)


@torch.no_grad()
def evaluate(model: ZayaReference, stream: Tensor, length: int, block_length: int, device: str) -> tuple[float, float]:
    """Held-out AR and diffusion loss in nats per token over 16 fixed windows."""
    tokens = batch_of(stream, 16, length, torch.Generator().manual_seed(0), device)
    doubled = torch.cat([tokens, torch.full_like(tokens, data.MASK)], 1)
    rows = tidar.doubled_rows(length, block_length, 0, model.config.mask_parent, device)
    ar, diffusion = tidar.losses(model(doubled, rows), tokens, tokens, block_length, 0, 1.0, len(tokens))
    return ar.item(), diffusion.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="AR pre-training")
    parser.add_argument("--convert-steps", type=int, default=1500, help="TiDAR objective, rate decays to 0")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--block-length", type=int, default=16)
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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    train, held_out = data.split()
    texts = [text for _, text in train]
    if args.max_bytes:
        texts = ["".join(texts)[: args.max_bytes]]
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    else:
        tokenizer = data.train_tokenizer(texts, args.vocab)
    stream = data.encode(tokenizer, texts)
    held_out_stream = data.encode(tokenizer, [text for _, text in held_out])
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stream)
    print(f"{len(train)} files, {len(stream)} tokens of {bytes_per_token:.2f} bytes; {len(held_out)} files held out")

    config = nano_config(tokenizer.get_vocab_size(), args.block_length)
    model = ZayaReference(config)
    initialise(model)
    if args.init:
        model.load_state_dict({k: v.float() for k, v in load_file(args.init / "model.safetensors").items()})
    own = torch.load(args.own_text) if args.own_text else None
    own_rows = 0 if own is None else args.batch // 2 if args.own_rows is None else args.own_rows
    branches = torch.load(args.branches) if args.branches else None
    model.to(device)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    total, warmup = args.steps + args.convert_steps, min(100, args.steps // 4 + 1)
    causal = Rows.causal(args.length, device)
    log = (args.out / "log.jsonl").open("w")
    start = time.time()

    progress = tqdm(range(total), mininterval=10)
    for step in progress:
        converting = step >= args.steps
        left = 2 * (total - step) / max(1, args.convert_steps)
        rate = args.rate * min(1, (step + 1) / warmup, 1 if args.constant_rate else left)
        for group in optimizer.param_groups:
            group["lr"] = rate
        real = args.batch - own_rows if converting else args.batch
        tokens = batch_of(stream, real, args.length, generator, device)
        if real < args.batch:
            tokens = torch.cat([tokens, own_batch(own, args.batch - real, args.length, generator, device)])
        if converting:
            offset = int(torch.randint(args.block_length, (1,), generator=generator))
            labels = tokens
            if branches is not None:
                text, text_labels = branch_batch(branches, offset, real, generator, device)
                tokens, labels = torch.cat([text, tokens[real:]]), torch.cat([text_labels, tokens[real:]])
            rows = tidar.doubled_rows(args.length, args.block_length, offset, config.mask_parent, device)
            logits = model(torch.cat([tokens, torch.full_like(tokens, data.MASK)], 1), rows)
            ar, diffusion = tidar.losses(logits, tokens, labels, args.block_length, offset, args.decay, real)
            loss = (args.alpha * ar + diffusion) / (1 + args.alpha)
        else:
            logits = model(tokens, causal)
            ar, diffusion = (
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
                None,
            )
            loss = ar
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        worst = balance(model, 3e-3 * rate / args.rate, args.length)
        if step % 10 == 0 or step + 1 == total:
            entry = {"step": step, "seconds": round(time.time() - start, 1), "ar": ar.item(), "max_load": worst}
            if diffusion is not None:
                entry["diffusion"] = diffusion.item()
            if step % 200 == 0 or step + 1 == total:
                entry["held_out_ar"], entry["held_out_diffusion"] = evaluate(
                    model, held_out_stream, args.length, args.block_length, device
                )
                export(model, tokenizer, args.out)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            progress.set_postfix({key: f"{value:.3f}" for key, value in entry.items() if "ar" in key or "diff" in key})
    plot_losses(args.out)


if __name__ == "__main__":
    main()
