"""PairRM (Jiang et al. 2023), read from the layout of llm-blender/PairRM-hf: a DeBERTa encoder and
a head that compares two answers.

    input    <|source|> instruction [SEP] <|candidate1|> y_1 [SEP] <|candidate2|> y_2 [SEP]
             each part encoded alone with its specials, cut to 1 224 tokens and to half of what is
             then left of 2 048
    s_k      head([h_source; h_candidate k]), h the last hidden state at a marker
             head: 2H → H, tanh, H → tasks
    logit    mean over the tasks of s_1 − s_2;  P(y_1 is better) = σ(logit)

The markers' ids stand in config.json. A text that spells one, or any other control token, is broken
by a visible character: only the layout writes them.
"""
import torch
import transformers
from transformers.modeling_outputs import SequenceClassifierOutput

from core.chat import BREAK
from core.models import load_weights
from core.rows import in_one_line
from judges.flags import MARKERS, check_model_of

LENGTH = 2048
SOURCE_LENGTH = 1224


class PairRM(transformers.DebertaV2PreTrainedModel):
    """The encoder `pretrained_model` and the head `head_layer`, named as in the weights."""

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.pretrained_model = transformers.DebertaV2Model(config)
        # Dropout holds the places 0 and 3 in the weights' names; it never acts here.
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(), torch.nn.Linear(2 * width, width), torch.nn.Tanh(),
            torch.nn.Dropout(), torch.nn.Linear(width, getattr(config, "n_tasks", 1)))
        self.post_init()

    def forward(self, ids: torch.Tensor) -> SequenceClassifierOutput:
        """One logit for the tokens [1, T] of a comparison."""
        hidden = self.pretrained_model(input_ids=ids).last_hidden_state
        source, *answers = [hidden[ids == getattr(self.config, name)] for name in MARKERS]
        first, second = [self.head_layer(torch.cat([source, h], -1)) for h in answers]
        return SequenceClassifierOutput(logits=(first - second).mean(-1))


def load_pairrm(path: str, device: torch.device) -> tuple:
    """(model, tokenizer). What the weights hold beside the model's own does not matter; what they
    lack ends the program."""
    model = load_weights(PairRM, path, device, torch.float32)
    check_model_of("pairrm", path)  # one of the hub is on this machine now
    with in_one_line(f"{path}: cannot load the tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return model, tokenizer


def conversation_text(turns: list[dict]) -> str:
    """What PairRM reads as the instruction: the one message, or all with their speakers."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in turns)


def encode_comparison(config, tokenizer, turns: list[dict], first: str,
                      second: str) -> tuple[list[int], bool]:
    """(token ids of a conversation, the first and the second answer; whether one was cut)."""
    controls = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    ids = []
    is_cut = False
    left = SOURCE_LENGTH  # tokens that the part may have
    for name, text in zip(MARKERS, (conversation_text(turns), first, second)):
        for token in controls:
            text = text.replace(token, token[0] + BREAK + token[1:])
        mark = tokenizer.convert_ids_to_tokens(getattr(config, name))
        part = tokenizer(mark + text).input_ids
        if len(part) > left:
            is_cut = True
            part = [*part[:left - 1], part[-1]]  # [SEP] stays
        if not ids:
            left = (LENGTH - len(part)) // 2  # for each of the answers
        ids += part
    return ids, is_cut
