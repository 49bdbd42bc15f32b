"""The log-probs of a forward pass on a CPU: of labelled tokens alone, a pair's prompt read once.

Only where Triton runs does TRL leave out the tokens that are not trained. On a CPU its head projects
every position onto the vocabulary, padding too, and again in the backward pass; and it reads the
prompt of a pair once for each answer. What stands here gives the same numbers. It is used where a
trial on a few tokens says so, and steps aside for TRL's own for any other batch or model.
"""

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig
from trl.trainer.utils import FusedCausalLMOutput

MOST_LOGITS: Final = 4096 * 32_768
"""Kept for the backward pass; as many as TRL holds in one tile, so that memory is as planned."""
AGREES: Final = 1e-3
"""How far a log-prob may lie from TRL's in the trial, in which float32 differs by some 1e-5."""
IGNORED: Final = -100
SCALES: Final = (
    "final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier",
    "logits_scaling",
)  # fmt: skip
"""What TRL reads in a configuration of logits that are more than states times weights."""
TRIAL: Final = ((3, 5, 7, 9, 11, 13, 0), (3, 5, 7, 9, 12, 10, 8))
"""Two rows of ids with a common beginning of four; the first is shorter by one."""


def score_on_cpu(model: Any, *, bf16: bool, pairs: bool) -> bool:
    """Let a model that TRL has given its head (`fused_lm_head=True`) answer by ours; false if it cannot.

    `pairs`: the rows of a batch are chosen answers and then rejected ones, to the same prompts.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(getattr(model, "srt_head", None), _Head):
        return True
    head = _Head(model, model.forward, bf16, pairs and reads_pairs_once(model.config))
    if not head.is_plain() or not head.agrees():
        return False

    @functools.wraps(model.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return head(*args, **kwargs)

    model.srt_head = head
    model.forward = types.MethodType(forward, model)
    return True


def reads_pairs_once(config: PretrainedConfig) -> bool:
    """Whether attention is told to see all that is before a token, in every layer."""
    text: Any = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) | {"full_attention"}
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return len(layers) == 1 and not window


@dataclass
class _Head:
    model: Any
    of_trl: Any
    """The forward pass that TRL left."""
    bf16: bool
    pairs: bool
    """Whether the prompt of a pair is read once for both answers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not self._knows(kwargs):
            return self.of_trl(*args, **kwargs)
        ids, labels = kwargs["input_ids"], kwargs["labels"]
        mask = labels[:, 1:] != IGNORED
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        if not mask.any() or int(mask.sum()) * vocabulary > MOST_LOGITS:
            return self.of_trl(*args, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k not in ("fused_lm_head", "labels")}
        items = rest.pop("num_items_in_batch", None)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            states = self._states(ids, labels, mask, rest)
            weight = self.model.get_output_embeddings().weight
            found: Any = _LogProbs.apply(states, weight, labels[:, 1:][mask])  # type: ignore[no-untyped-call]
        # Scattered, so that what is not labelled is zero, as TRL has it.
        log_probs, entropy, means, tops = (
            each.new_zeros(mask.shape).masked_scatter(mask, each) for each in found
        )
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (mask.sum() if items is None else items),
            log_probs=log_probs, entropy=entropy, mean_logits=means, is_top1=tops, label_mask=mask,
        )  # fmt: skip

    def _knows(self, given: Mapping[str, Any]) -> bool:
        return (
            bool(given.get("fused_lm_head"))
            and given.get("input_ids") is not None
            and given.get("labels") is not None
            and given.get("shift_labels") is None
            and not given.get("output_router_logits")
        )

    def _states(self, ids: Tensor, labels: Tensor, mask: Tensor, rest: dict[str, Any]) -> Tensor:
        """The last layer's states from which the labelled tokens follow, (labelled, hidden)."""
        backbone: Any = self.model.base_model
        joint = None
        if self.pairs and self.model.config._attn_implementation == "sdpa":  # takes any mask
            joint = _joined(ids, labels, rest.get("attention_mask"))
        if joint is None:
            states: Tensor = backbone(**rest | {"use_cache": False}).last_hidden_state
            return states[:, :-1][mask]
        read = backbone(
            input_ids=joint.ids, position_ids=joint.positions, attention_mask=joint.sees,
            use_cache=False,
        )  # fmt: skip
        places = joint.places[:, :-1][mask]
        flat: Tensor = read.last_hidden_state.flatten(0, 1)
        return flat[places]

    def is_plain(self) -> bool:
        """Whether this is a float32 model on a CPU with a plain head."""
        head: Any = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        return (
            all(getattr(config, name, None) is None for name in SCALES)
            and type(head) is nn.Linear and getattr(head, "bias", 0) is None
            and head.weight.device.type == "cpu"
            and head.weight.dtype == torch.float32
        )  # fmt: skip

    def agrees(self) -> bool:
        """Whether a few tokens get the log-probs that TRL gives them; pairs are given up first.

        So what a model's own attention does with masks and positions is found.
        """
        ids = torch.tensor(TRIAL)
        seen = torch.tensor([[1] * 6 + [0], [1] * 7])
        labels = ids.masked_fill(seen == 0, IGNORED)
        labels[:, :4] = IGNORED
        given = {"input_ids": ids, "attention_mask": seen, "labels": labels}
        bf16, was_training = self.bf16, self.model.training
        self.bf16 = False
        self.model.eval()
        try:
            with torch.no_grad():
                wanted = self.of_trl(**given, fused_lm_head=True).log_probs
                for pairs in (True, False) if self.pairs else (False,):
                    self.pairs = pairs
                    found = self(**given, fused_lm_head=True).log_probs
                    if torch.allclose(found, wanted, atol=AGREES, rtol=0):
                        return True
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            pass
        finally:
            self.bf16 = bf16
            self.model.train(was_training)
        return False


class _LogProbs(torch.autograd.Function):
    """Log-prob, entropy, mean logit and "is it the likeliest" of labels, from states and weights.

    States are (labelled, hidden), weights (vocabulary, hidden). The softmax is kept for the backward
    pass instead of being computed again.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else states.dtype
        states, narrow = states.to(dtype), weight.to(dtype)
        with torch.autocast("cpu", enabled=False):  # all but the product in float32
            logits = (states @ narrow.T).float()
            means = logits.mean(-1)
            highest, likeliest = logits.max(-1, keepdim=True)
            logits -= highest
            own = logits.gather(1, labels[:, None])[:, 0]
            shares = logits.exp()
            sums = shares.sum(-1)
            entropy = sums.log() - torch.linalg.vecdot(shares, logits) / sums
        ctx.shares, ctx.sums, ctx.labels = shares, sums, labels
        ctx.save_for_backward(states, narrow)
        tops = likeliest[:, 0] == labels
        ctx.mark_non_differentiable(entropy, means, tops)
        return own - sums.log(), entropy, means, tops

    @staticmethod
    def backward(ctx: Any, towards: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        # Of a log-prob with respect to the logits: one at the label, less the softmax.
        by_logits = ctx.shares.mul_((-towards / ctx.sums)[:, None])
        by_logits[torch.arange(len(towards)), ctx.labels] += towards
        ctx.shares = None
        by_logits = by_logits.to(weight.dtype)
        by_states = by_logits @ weight
        by_weight = by_logits.T @ states if ctx.needs_input_grad[1] else None
        return by_states.float(), None if by_weight is None else by_weight.float(), None


# --- Pairs: prompt, chosen and rejected in one row --------------------------------------------------


@dataclass(frozen=True)
class _Joint:
    """Rows of prompt, chosen and rejected; of the same prompt, as many as there are pairs."""

    ids: Tensor
    """(pairs, tokens)"""
    positions: Tensor
    """(pairs, tokens): a rejected answer's begin behind the prompt again."""
    sees: Tensor
    """(pairs, 1, tokens, tokens): a rejected answer does not see the chosen one."""
    places: Tensor
    """(2 x pairs, tokens of a row): where the token of each row now stands, over all joint rows."""


def _joined(ids: Tensor, labels: Tensor, seen: Tensor | None) -> _Joint | None:
    """The pairs of a batch as joint rows; None where the rows are not pairs to one prompt each."""
    if seen is None or seen.ndim != 2 or len(ids) % 2 or not bool(seen[:, 0].all()):
        return None
    pairs = len(ids) // 2
    prompts = (labels != IGNORED).int().argmax(1).tolist()
    lengths = seen.sum(1).tolist()
    rows = [ids[row, : lengths[row]] for row in range(2 * pairs)]
    for number in range(pairs):
        shared, same = prompts[number], prompts[number] == prompts[pairs + number]
        one, other = rows[number][:shared], rows[pairs + number][:shared]
        if not shared or not same or not torch.equal(one, other):
            return None
    return _lay_out(rows, prompts[:pairs], ids.shape[1])


def _lay_out(rows: Sequence[Tensor], prompts: Sequence[int], width: int) -> _Joint:
    pairs = len(prompts)
    chosen = torch.tensor([len(row) for row in rows[:pairs]])[:, None]  # (pairs, 1)
    shared = torch.tensor(prompts)[:, None]
    joined = [
        torch.cat([rows[number], rows[pairs + number][prompts[number] :]])
        for number in range(pairs)
    ]
    ids = nn.utils.rnn.pad_sequence(joined, batch_first=True)
    tokens = torch.arange(ids.shape[1])[None]  # (1, tokens)
    second = tokens >= chosen  # (pairs, tokens): of the rejected answer, or padding
    positions = torch.where(second, tokens - chosen + shared, tokens)
    of_chosen = (tokens >= shared) & ~second
    causal = tokens[..., None] >= tokens[:, None]
    sees = causal & ~(second[..., None] & of_chosen[:, None])
    own = torch.arange(width)[None]
    moved = torch.where(own < shared, own, own + chosen - shared)
    first = torch.arange(pairs)[:, None] * ids.shape[1]
    places = torch.cat([own + first, moved + first])
    return _Joint(ids, positions, sees[:, None], places)
