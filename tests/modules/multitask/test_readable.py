"""Answers that are written token by token."""

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fulgurite.modules.multitask import TransformerBranch
from fulgurite.modules.multitask.readable import readable

from .small import OBJECTIVES, trunk_of


def words(**special):
    """A tokenizer of an encoder's kind: a token a word, between [CLS] and [SEP], and no end of a text."""
    known = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(56))]
    made = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", **special)


class Scripted(TransformerBranch):
    """A branch that writes what it is told, and then its last token for ever."""

    def __init__(self, says):
        super().__init__(0)
        self.says, self.written = says, 0

    def scores(self, trunk, states, view):
        self.written += 1
        chosen = self.says[min(self.written, len(self.says)) - 1]
        return torch.nn.functional.one_hot(torch.tensor([[chosen]]), 60).float()


@pytest.mark.parametrize(
    ("says", "most", "written"),
    [([10, 11, 2, 12], 32, "w6 w7"), ([10], 5, "w6 w6 w6 w6 w6"), ([10], 1000, " ".join(["w6"] * 66))],
)
def test_an_encoders_answer_ends_at_its_separator_at_the_most_tokens_or_with_its_positions(says, most, written):
    trunk, tokenizer = trunk_of("bert"), words()
    ids = torch.tensor([tokenizer("w1 w2").input_ids])
    view = {"mask": "causal", "input_ids": ids, "position_ids": torch.arange(4)[None], "lengths": torch.tensor([4])}
    branch = Scripted(says)
    branch.attach(trunk, OBJECTIVES["next"])
    targets = torch.full((1, 4), -100)
    (row,) = readable(trunk, branch, OBJECTIVES["next"], trunk(view), view, targets, tokenizer, most)
    assert row == {"text": "w1 w2", "prediction": written}  # bert's 70 positions, of which the prompt has 4
