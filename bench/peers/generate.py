"""transformers' `model.generate`: one padded batch, `DynamicCache`, prefill of all prompts in one go."""

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bench.peers.worker import Load, OnStep, serve


class Generate:
    def __init__(self, asked: Load) -> None:
        self.version = transformers.__version__
        torch.set_num_threads(asked.threads)
        dtype = getattr(torch, asked.precision)
        self._model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype, local_files_only=True).eval()
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end-of-text token

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        ids = torch.tensor(prompts)
        criteria = StoppingCriteriaList([_Steps(on_step)])
        mask = torch.ones_like(ids)
        self._model.generate(ids, attention_mask=mask, max_new_tokens=room, stopping_criteria=criteria)


class _Steps(StoppingCriteria):
    """transformers asks after every step whether to stop: that is where the step is reported."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        enough = self._on_step(enumerate(input_ids[:, -1].tolist()))
        return torch.full((input_ids.shape[0],), enough)


if __name__ == "__main__":
    serve(Generate)
