"""What an engine has done, counted step by step."""

from dataclasses import asdict, dataclass

from shared.engine.scheduler import StepPlan
from shared.registry.records import Work


@dataclass(slots=True)
class WorkDone:
    """Sums since the engine was made; `Work` has what each of them is.

    The engine's thread adds, others read: what they get may be one step apart from field to field.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    num_prefilled: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_rows: int = 0
    decode_rows_squared: int = 0
    decode_rows_s: float = 0.0

    def add(self, plan: StepPlan, seconds: float) -> None:
        """Count a step that took `seconds`, before its sequences are advanced."""
        if plan.prefills:
            self.prefill_s += seconds
            for chunk in plan.prefills:
                self.prefill_tokens += chunk.num_tokens
                self.num_prefilled += chunk.num_tokens == chunk.sequence.num_uncomputed_tokens
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
