"""What a tuned prefix is compared with: PEFT's own prefix tuning and LoRA, on the whole model."""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...modules import OffsitePrefixTuning
from ...modules.language_model import Batch
from ...modules.pretrained import CACHE


class PeftTuning(OffsitePrefixTuning):
    """The model with an adapter of PEFT's; data, loss and figures are those of ``OffsitePrefixTuning``.

    Args:
        source: The whole model.
        method: ``lora``, rank 8 on all projections; ``prefix``, which begins as noise; or ``text-prefix``, which begins, as ours,
            as the keys and values of random tokens.
        length: Virtual tokens of a prefix.
        seed: Of the random tokens.
        settings: Of ``OffsitePrefixTuning``.
    """

    def __init__(
        self, source: str, method: Literal["lora", "prefix", "text-prefix"], length: int, *, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(source, prefix=None, **settings)
        self.method, self.virtual, self.seed = method, length, seed
        self._peft: list[Any] = []

    def setup(self, stage: str) -> None:
        """There is something to train, if no prefix."""

    def _adopt(self, model: PreTrainedModel) -> None:
        import peft

        super()._adopt(model)
        if self.method == "lora":
            peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), model)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
            return
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual)
        wrapped = peft.get_peft_model(model, config)
        if self.method == "text-prefix":
            generator = torch.Generator().manual_seed(self.seed)
            ids = torch.randint(0, int(model.config.vocab_size), (1, self.virtual), generator=generator, device="cpu")
            with torch.no_grad():
                past = model.base_model(input_ids=ids.to(model.device), use_cache=True).past_key_values
            peft.initialize_kv_prefix_from_past_key_values(wrapped, past_key_values=past)
        self.encoder = wrapped.prompt_encoder.float()
        self._peft = [wrapped]

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the final hidden states of a right-padded batch."""
        if self.method == "lora":
            return super().hidden_states(batch)
        assert self.model is not None
        ids = batch["input_ids"]
        past = self._peft[0].get_prompt(batch_size=len(ids))
        positions = torch.arange(self.virtual, self.virtual + ids.shape[1], device=ids.device).expand(len(ids), -1)
        return self.model.base_model(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE: past}).last_hidden_state
