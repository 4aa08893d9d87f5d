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
import sys

import torch
import transformers

from core import RANK, WORLD
from core.chat import BREAK
from core.models import load_config
from core.parallel import autocast, merge, progress, this_device
from core.rows import fail, in_one_line
from judges.flags import MARKERS

LENGTH = 2048
SOURCE_LENGTH = 1224
TOGETHER = 8  # comparisons a pass


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

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [B] of tokens and attention mask [B, T]."""
        hidden = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        source, *answers = [hidden[ids == getattr(self.config, name)] for name in MARKERS]
        first, second = [self.head_layer(torch.cat([source, h], -1)) for h in answers]
        return (first - second).mean(-1)


def load_pairrm(path: str, device: torch.device) -> tuple:
    """(model, tokenizer). What the weights hold beside the model's own does not matter; what they
    lack ends the program."""
    load_config(path)  # says in one line where there is none
    with in_one_line(f"{path}: cannot load the ranker"):
        model, info = PairRM.from_pretrained(path, dtype=torch.float32, use_safetensors=True,
                                             output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if missing := sorted(info["missing_keys"]):
        fail(f"{path}: {len(missing)} weights are missing ({', '.join(missing[:3])}); --judge "
             "pairrm reads llm-blender/PairRM-hf and what is laid out like it")
    return model.to(device).eval(), tokenizer


def encode(config, tokenizer, texts: tuple[str, str, str]) -> tuple[list[int], bool]:
    """(token ids of source, first and second answer; whether one was cut)."""
    controls = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    ids = []
    room = SOURCE_LENGTH
    is_cut = False
    for k, (name, text) in enumerate(zip(MARKERS, texts)):
        for token in controls:
            text = text.replace(token, token[0] + BREAK + token[1:])
        mark = tokenizer.convert_ids_to_tokens(getattr(config, name))
        part = tokenizer(mark + text).input_ids
        if len(part) > room:
            is_cut = True
            part = [*part[:room - 1], part[-1]]  # [SEP] stays
        ids += part
        if k == 0:
            room = (LENGTH - len(ids)) // 2
    return ids, is_cut


def conversation_text(turns: list[dict]) -> str:
    """What PairRM reads as the instruction: the one message, or all with their speakers."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in turns)


@torch.no_grad()
def pairrm(args, comparisons: list[tuple]) -> list[float]:
    """P(first is better) of every (conversation, first, second); passes split over ranks."""
    device = this_device()
    model, tokenizer = load_pairrm(args.judge_model, device)
    encoded = [encode(model.config, tokenizer, (conversation_text(turns), first, second))
               for turns, first, second in comparisons]
    if RANK == 0 and (shortened := sum(is_cut for _, is_cut in encoded)):
        print(f"note: {args.judge_model} reads {LENGTH} tokens; {shortened} of {len(encoded)} "
              "comparisons are longer and lose the ends of their parts", file=sys.stderr)
    # Alike lengths together.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    passes = [order[start:start + TOGETHER] for start in range(0, len(order), TOGETHER)]
    mine = {}
    for rows in progress(passes[RANK::WORLD], "PairRM", "batch"):
        parts = [torch.tensor(encoded[i][0], device=device) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(parts, True, tokenizer.pad_token_id)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], True)
        with autocast(device, args.precision):
            logits = model(ids, mask)
        mine |= dict(zip(rows, logits.double().sigmoid().tolist()))
    probabilities = merge(mine)
    return [probabilities[i] for i in range(len(comparisons))]
