"""Labels for requests that name no scenario, and what became of those of each label, for the controller to see."""

from collections import OrderedDict
from collections.abc import Sequence

from services.gateway.scenario_labels import Classifier
from shared.messages.records import LabelTraffic

MAX_LABELS = 64
"""How many are counted; the one that was met longest ago is forgotten first."""
NONE = ""
"""The label of requests that have none."""


class Scenarios:
    """The labels of one gateway."""

    def __init__(self) -> None:
        self._classifier = Classifier()
        self._counts: OrderedDict[str, LabelTraffic] = OrderedDict()

    def label(self, keys: Sequence[int], num_prompt_tokens: int, max_tokens: int) -> str | None:
        """The label of a request that has just arrived; None if it is like no others."""
        return self._classifier.classify(keys, num_prompt_tokens, max_tokens)

    def done(self, label: str | None, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A request of this label has all its tokens."""
        self._classifier.finished(label, num_prompt_tokens, num_output_tokens)
        key = label or NONE
        before = self._counts.pop(key, LabelTraffic())
        self._counts[key] = LabelTraffic(
            num_done=before.num_done + 1,
            prompt_tokens=before.prompt_tokens + num_prompt_tokens,
            output_tokens=before.output_tokens + num_output_tokens,
            shared_prefix_tokens=self._classifier.shared_prefix_tokens(label) if label else 0,
        )
        if len(self._counts) > MAX_LABELS:
            self._counts.popitem(last=False)

    def traffic(self) -> dict[str, LabelTraffic]:
        return dict(self._counts)
