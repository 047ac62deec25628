"""What an engine has done, counted step by step."""

from dataclasses import asdict, dataclass

from shared.engine.scheduler import StepPlan
from shared.messages.records import Work


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What there is to compute of prompts.

    Args:
        tokens: that have no KV yet.
        pairs: of tokens that attend to each other meanwhile: each of `tokens` with itself and all before it.
    """

    tokens: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, num_tokens: int, num_computed: int = 0) -> "PromptWork":
        """Of one prompt, the first `num_computed` tokens of which are computed already."""
        pairs = (num_tokens * (num_tokens + 1) - num_computed * (num_computed + 1)) // 2
        return cls(num_tokens - num_computed, pairs)

    def __add__(self, other: "PromptWork") -> "PromptWork":
        return PromptWork(self.tokens + other.tokens, self.pairs + other.pairs)


@dataclass(slots=True)
class WorkDone:
    """Sums since the engine was made; `Work` has what each of them is.

    The engine's thread adds, others read: what they get may be one step apart from field to field.
    """

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    prefill_s: float = 0.0
    num_prefilled: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_rows: int = 0
    decode_rows_squared: int = 0
    decode_rows_s: float = 0.0
    rows_beside_prefill: int = 0

    def add(self, plan: StepPlan, seconds: float) -> None:
        """Count a step that took `seconds`, before its sequences are advanced."""
        if plan.prefills:
            self.prefill_s += seconds
            for chunk in plan.prefills:
                num_computed = chunk.sequence.num_computed_tokens
                done = PromptWork.of(num_computed + chunk.num_tokens, num_computed)
                self.prefill_tokens += done.tokens
                self.prefill_pairs += done.pairs
                self.num_prefilled += chunk.num_tokens == chunk.sequence.num_uncomputed_tokens
            self.rows_beside_prefill += len(plan.decodes)
            return
        rows = len(plan.decodes)
        self.decode_steps += 1
        self.decode_s += seconds
        self.decode_rows += rows
        self.decode_rows_squared += rows * rows
        self.decode_rows_s += rows * seconds

    def snapshot(self) -> Work:
        """The sums as of now, for the instance's record."""
        return Work(**asdict(self))
