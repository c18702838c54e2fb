"""What generation returns: outputs, their statistics, and the events of a stream."""

from dataclasses import dataclass, field


@dataclass
class GenerationStats:
    """What a sample cost.

    Attributes:
        prefill_forwards, draft_forwards, verify_forwards, ar_forwards, denoise_forwards: Forwards it took part in, by
            kind.
        drafted, accepted: Drafts verified and accepted; the anchor is neither.
        committed: Tokens that its decode forwards decided and the output kept.
        acceptance_histogram: Verify forwards by number of accepted drafts.
        verified_by, accepted_by: Verify forwards and accepted drafts by whose the drafts were: "mask", "ngram",
            "callable".
        missed_groups: Verify forwards with mask groups, none of which fitted what was accepted.
        plan: Decode forwards by what was planned: "ar", "draft", "verify", and "verify+R" for R mask groups with it.
        plan_reason: Why the last forward was planned as it was.
        mixed: Emitted tokens that were decided by a mixed law.
        kl, total_variation: Means over the mixed tokens of KL(mixed || AR) in nats and of the total variation between
            the two laws, both before truncation, at the sampling temperature (1 for greedy); None where none was mixed.
        seconds: From the sample's first forward to its last.
        tokens: Emitted tokens.
    """

    prefill_forwards: int = 0
    draft_forwards: int = 0
    verify_forwards: int = 0
    ar_forwards: int = 0
    denoise_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    committed: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    verified_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)
    missed_groups: int = 0
    plan: dict[str, int] = field(default_factory=dict)
    plan_reason: str = ""
    mixed: int = 0
    kl: float | None = None
    total_variation: float | None = None
    seconds: float = 0.0
    tokens: int = 0

    @property
    def decode_forwards(self) -> int:
        return self.draft_forwards + self.verify_forwards + self.ar_forwards + self.denoise_forwards

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per decode forward; prefill is excluded. 0 where there was none."""
        return self.committed / self.decode_forwards if self.decode_forwards else 0.0

    @property
    def tokens_per_verify(self) -> float:
        """Mean of 1 + accepted drafts over the verify forwards. 0 where there was none."""
        return 1 + self.accepted / self.verify_forwards if self.verify_forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def count_verified(self, drafter: str, drafted: int, accepted: int) -> None:
        self.verified_by[drafter] = self.verified_by.get(drafter, 0) + 1
        self.accepted_by[drafter] = self.accepted_by.get(drafter, 0) + accepted
        self.drafted += drafted
        self.accepted += accepted
        self.acceptance_histogram += [0] * (accepted + 1 - len(self.acceptance_histogram))
        self.acceptance_histogram[accepted] += 1

    def count_mixed(self, kl: float, total_variation: float) -> None:
        before, self.mixed = self.mixed, self.mixed + 1
        self.kl = ((self.kl or 0.0) * before + kl) / self.mixed
        self.total_variation = ((self.total_variation or 0.0) * before + total_variation) / self.mixed


@dataclass(frozen=True)
class GenerationOutput:
    """One sample of one prompt.

    Attributes:
        prompt_token_ids: As the model saw them.
        token_ids: Generated tokens, with the eos or stop token that ended them.
        text: Their text without special tokens, cut before a stop string. None without a tokenizer.
        finish_reason: "eos", "stop", "length" (max_tokens) or "context" (the model's or the cache's room is used up).
        logprobs: Log-probability of each token under the model's plain law (softmax of its logits), where asked for.
        drawn_logprobs: The same under the law it was drawn from: processors, mixing, temperature and truncations
            applied; 0 for greedy tokens.
        top_logprobs: For each token the ``logprobs`` most probable ids with their plain log-probabilities.
        seed: Of the noise; given or drawn.
        request, sample: Index of the prompt and of the sample.
        stats: `GenerationStats`.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[float] | None
    seed: int
    request: int
    sample: int
    stats: GenerationStats
    drawn_logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class StreamEvent:
    """What one forward brought one sample.

    Attributes:
        request, sample: Whose it is.
        kind: "prefill", "draft", "verify", "ar" or "denoise".
        drafted: Drafts that the forward verified; the first `accepted` of them hold.
        token_ids: Tokens that are now final, in order; they include the accepted drafts.
        text: Text that is now final (characters and stop strings that are still open are held back).
        provisional: Drafts of mask rows that wait for the next verification, after all final tokens; n-grams may take
            their place in it. In denoising: the block so far, with mask tokens where nothing is revealed yet.
        plan: What the forward was for this sample: rows it verified or decoded, and the accept lengths that a mask
            group was prepared for.
        logprobs: Plain log-probabilities of token_ids, as the kernel gave them.
        draft_logprobs: Of `drafted` under the plain law of the mask rows that drew them; empty for other drafters.
        drafter: Whose drafts `drafted` are: "mask", "ngram" or "callable"; empty without.
        seconds: Duration of the forward, which all samples of the batch share.
        finish_reason, output: Of the sample's last event.
    """

    request: int
    sample: int
    kind: str
    drafted: tuple[int, ...]
    accepted: int
    token_ids: tuple[int, ...]
    text: str
    provisional: tuple[int, ...]
    finish_reason: str | None = None
    output: GenerationOutput | None = None
    plan: tuple[int, tuple[int, ...]] = (1, ())
    logprobs: tuple[float, ...] = ()
    draft_logprobs: tuple[float, ...] = ()
    drafter: str = ""
    seconds: float = 0.0
