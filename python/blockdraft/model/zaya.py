"""`ZayaForCausalLM`: a checkpoint, ready to generate."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from blockdraft import ops
from blockdraft.cache import Cache
from blockdraft.errors import CheckpointError, ConfigError, RequestError
from blockdraft.generate import Engine
from blockdraft.model.config import ZayaConfig
from blockdraft.model.decoder import Decoder
from blockdraft.model.heads import Heads
from blockdraft.model.weights import Checkpoint, read_adapters, resolve_folder
from blockdraft.outputs import GenerationOutput, StreamEvent
from blockdraft.plan import CostTable, Planner
from blockdraft.runner import CudaCapture, EagerRunner, GraphRunner
from blockdraft.sampler import SamplingParams
from blockdraft.steps import Block, make_step

Prompt = str | Sequence[int]

DTYPES = (torch.bfloat16, torch.float32)
CHUNK = 512  # rows of a prefill forward: enough to be compute-bound, small enough for the activations
CACHE_BYTES = 2**30  # of keys and values by default


class ZayaForCausalLM:
    """A ZAYA1-class model. Make it with `from_pretrained`.

    Attributes:
        config: `ZayaConfig`.
        decoder: The layers (`blockdraft.model.decoder.Decoder`).
        tokenizer: `tokenizers.Tokenizer`, None where the checkpoint has no tokenizer.json.
        dtype, device: Of weights, activations and cache.
        heads: The LM head, and the drafts' own where the checkpoint has one.
        planner: Decides for requests that leave `SamplingParams.groups` open; learns from every request.
        runner: Runs the steps of `generate` and `stream`, on a GPU as graphs (`blockdraft.runner`).
    """

    def __init__(
        self,
        config: ZayaConfig,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_tokens: int | None = None,
        max_batch_size: int | None = None,
        heads: Heads | None = None,
        costs: CostTable | None = None,
        gpu_graphs: bool = True,
    ) -> None:
        self.config, self.decoder, self.tokenizer = config, decoder, tokenizer
        self.heads = heads or Heads(decoder.lm_head)
        self.dtype, self.device = dtype, device
        self.max_batch_size = max_batch_size or 16
        self.kv_cache_tokens = kv_cache_tokens or self._default_cache_tokens()
        self.planner = Planner(costs or CostTable.load(config, dtype, device), config.block_length)
        graphs = gpu_graphs and device.type == "cuda"
        self.runner = GraphRunner(self, CudaCapture(device)) if graphs else EagerRunner(self)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        mask_token_id: int | None = None,
        skip_expert: str = "zero",
        kv_cache_tokens: int | None = None,
        max_batch_size: int | None = None,
        progress: bool = True,
        gpu_graphs: bool = True,
    ) -> "ZayaForCausalLM":
        """Loads a checkpoint in the native 40-layer or the legacy 80-half-layer layout, single or sharded safetensors.

        Args:
            path_or_hub_id: Folder with config.json, weights and (for string prompts) tokenizer.json, or a hub id.
            dtype: torch.bfloat16 or torch.float32.
            device: Where it runs. Weights go there one by one: the host holds one tensor at a time.
            mask_token_id: Overrides the checkpoint's; needed for mask drafting where it names none.
            skip_expert: What a row gives that the router sends to the skip class: "zero" (transformers, vLLM) or
                "identity", its probability times its input (the training code, SGLang).
            kv_cache_tokens: Tokens there is room for in all sequences together. Default: 1 GiB, at least one context of
                8192 tokens (or the model's, where shorter).
            max_batch_size: Sequences decoded together, default 16; more are queued.
            progress: Show a progress bar while loading.
            gpu_graphs: On a GPU, run steps as graphs; they are captured when a shape of step comes again.

        Raises:
            ConfigError: config.json does not describe a model that can be run, or an argument here does not.
            CheckpointError: The folder or its weights cannot be read.
        """
        device = torch.device(device)
        _check_arguments(dtype, device, skip_expert, kv_cache_tokens, max_batch_size)
        folder = resolve_folder(path_or_hub_id)
        config = ZayaConfig.from_folder(folder)
        if mask_token_id is not None:
            config = config.with_mask_token_id(mask_token_id)
        with Checkpoint(folder, config) as checkpoint:
            adapters = read_adapters(folder, config)
            decoder = Decoder(config, checkpoint, dtype, device, skip_expert == "identity", progress, adapters)
            heads = Heads.read(config, checkpoint, decoder.lm_head, dtype, device)
        tokenizer, costs = _load_tokenizer(folder), CostTable.load(config, dtype, device, folder)
        return cls(config, decoder, tokenizer, dtype, device, kv_cache_tokens, max_batch_size, heads, costs, gpu_graphs)

    def _default_cache_tokens(self) -> int:
        least = min(self.config.max_position_embeddings, 8192)
        return max(least, CACHE_BYTES // Cache.token_bytes(self.config, self.dtype))

    def new_cache(self, tokens: int, slots: int) -> Cache:
        """A cache for `slots` sequences that hold `tokens` tokens together."""
        pages = -(-tokens // 32) + slots  # a sequence's last page is rarely full
        return Cache(self.config, pages, slots, self.dtype, self.device)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced logits, by the kernels and in the chunks that generation uses.

        Args:
            input_ids: ``[B, T]`` integers.
            attention_mask: ``[B, T]``, nonzero for tokens; padding may stand before or after them. Positions count from
                the first token.

        Returns:
            ``[B, T, V]`` float32; zeros at padding.

        Raises:
            RequestError: Wrong shape, an id out of range, or more tokens than the model's context.
        """
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise RequestError(f"input_ids must be integers [B, T], got {input_ids.dtype} {list(input_ids.shape)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise RequestError(f"attention_mask must be {list(input_ids.shape)}, got {list(mask.shape)}")
        out = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for b, (ids, kept) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            tokens = ids[kept].tolist()
            if tokens:
                self.check_tokens(tokens)
                out[b, kept] = self._sequence_logits(tokens)
        return out

    def _sequence_logits(self, tokens: list[int]) -> Tensor:
        return torch.cat([self.decoder.lm_head(x, out_float32=True).cpu() for x in self.hidden_states(tokens)])

    def hidden_states(self, tokens: list[int]) -> Iterator[Tensor]:
        """What the LM head reads, teacher-forced: ``[n, H]`` of each chunk of a sequence, as in `logits`."""
        cache = self.new_cache(len(tokens), 1)
        sequence = cache.allocate(len(tokens))
        for first in range(0, len(tokens), CHUNK):
            chunk = tokens[first : first + CHUNK]
            step = make_step([Block(first, sequence.slot, sequence.pages, chunk)], cache.page_size)
            transaction = cache.begin(step.to(self.device), [sequence])
            yield self.decoder(transaction)
            last = torch.tensor([len(chunk) - 1], dtype=torch.int32, device=self.device)
            transaction.commit([len(chunk)], last)

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises RequestError unless there is a prompt, of ids in range, within the context."""
        V, context = self.config.vocab_size, self.config.max_position_embeddings
        if not tokens:
            raise RequestError("the prompt must have at least one token, got none")
        if len(tokens) > context:
            raise RequestError(f"the prompt must fit the context of {context} tokens, got {len(tokens)}")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < V:
                raise RequestError(f"token ids must be integers in [0, {V - 1}], got {token!r}")

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a string keeps the tokenizer's bos and loses an eos that the tokenizer appends."""
        if not isinstance(prompt, str):
            tokens = list(prompt)
            self.check_tokens(tokens)
            return tokens
        if self.tokenizer is None:
            raise RequestError("a string prompt needs a tokenizer.json beside the weights; pass token ids instead")
        tokens = self.tokenizer.encode(prompt).ids
        plain = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        while tokens and tokens[-1] in self.config.eos_token_ids and plain[-1:] != tokens[-1:]:
            tokens = tokens[:-1]
        self.check_tokens(tokens)
        return tokens

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Generates for all prompts and returns when the last is done.

        Args:
            prompts: Strings or token lists, or one of them.
            params: One for all prompts, or one each. None is greedy, lossless, 128 tokens.

        Returns:
            One output per prompt and sample, in order.

        Raises:
            RequestError: A prompt or parameter that cannot be served; nothing is generated then.
        """
        outputs = [event.output for event in self._run(prompts, params, watched=False) if event.output]
        return sorted(outputs, key=lambda output: (output.request, output.sample))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """As `generate`, but yields an event for each sequence after each forward it took part in."""
        return self._run(prompts, params, watched=True)

    def _run(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        watched: bool,
    ) -> Iterator[StreamEvent]:
        encoded = [self.encode(prompt) for prompt in _as_list(prompts)]
        each = (
            [params or SamplingParams()] * len(encoded)
            if params is None or isinstance(params, SamplingParams)
            else params
        )
        if len(each) != len(encoded):
            raise RequestError(f"params must be one or one per prompt ({len(encoded)}), got {len(each)}")
        return Engine(self).run(encoded, list(each), watched)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [cast(Prompt, prompts)] if single else list(cast(Sequence[Prompt], prompts))


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


def _check_arguments(
    dtype: torch.dtype,
    device: torch.device,
    skip_expert: str,
    kv_cache_tokens: int | None,
    max_batch_size: int | None,
) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    if skip_expert not in ("zero", "identity"):
        raise ConfigError(f"skip_expert must be 'zero' or 'identity', got {skip_expert!r}")
    for name, value in (("kv_cache_tokens", kv_cache_tokens), ("max_batch_size", max_batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be a positive integer or None, got {value!r}")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, device.type)
    missing = [name for name in ops.__all__ if not _has_kernel(name, key)]
    if missing:
        raise ConfigError(f"device {device}: this build has no kernels there for {', '.join(missing)}")


def _has_kernel(name: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"blockdraft::{name}", key)
    except RuntimeError:  # not a dispatch key at all
        return False
