from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from smelt.core.data import evaluating, forward, logits_of
from smelt.core.errors import DataError
from smelt.core.method import Objective, Seen
from smelt.core.settings import Ramp, setting


@dataclass(frozen=True)
class Sequence(Objective):
    """Follow the teacher's distribution of every next token, on given texts or on those that the student writes.

    L = alpha L_hard + (1 - alpha) T^2 mean D(p, q) over the positions that count; p of the teacher, q of the student:

        forward  KL(p || q)      covers all that the teacher would say
        reverse  KL(q || p)      says only what the teacher would
        jsd      beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q

    Padding does not count: what `attention_mask` of the inputs leaves out, positions whose label is negative, and, of
    a plain tensor of tokens, those equal to `pad`.  (The label of a position is the token that follows it.)
    With `on_policy`, that share of the batches is replaced: of each text the first `prompt` tokens are kept, the
    student draws the rest, and only what it drew counts; the gradient does not go through the drawing.  Such a batch
    has no hard loss.  (A loop of your own asks `t.prepare` for it before the forward pass.)

    applies to: language models: tokens [n, length] in, logits [n, length, words] out
    needs a pretrained model: yes, as the teacher
    needs data: yes, texts without labels; on-policy, prompts
    needs training: yes
    good at: small language models; on-policy corrects the mistakes that the student really makes
    bad at: long continuations on-policy, which take a forward pass of the student for every token
    source: Agarwal et al. 2024, arXiv:2306.13649, eq. 1 and algorithm 1; reverse: Gu et al. 2024, arXiv:2306.08543
    """

    needs_teacher = True

    divergence: str = setting("forward", "what is compared", choices=("forward", "reverse", "jsd"))
    beta: float | Ramp = setting(0.5, "jsd: share of the teacher in the mixture", low=1e-3, high=0.999)
    temperature: float = setting(1.0, "softens both distributions", low=0.01)
    alpha: float | Ramp = setting(0.0, "share of the hard loss on the labels", low=0, high=1)
    on_policy: float | Ramp = setting(0.0, "share of the batches that the student writes", low=0, high=1)
    prompt: int = setting(8, "on-policy: tokens that are kept of each text", low=1)
    length: int | None = setting(None, "on-policy: tokens drawn at most; else as long as the batch is", low=1)
    sampling: float = setting(1.0, "on-policy: temperature of the drawing; 0 takes the likeliest", low=0)
    stop: int | None = setting(None, "on-policy: token after which a text is over", low=0)
    pad: int | None = setting(None, "token that fills up short texts", low=0)

    def hard_weight(self) -> float:
        assert not isinstance(self.alpha, Ramp)  # the loop resolves it
        return self.alpha

    def loss(self, seen: Seen) -> Tensor:
        if seen.teacher is None:
            raise DataError("distill.sequence needs a teacher; give Job(teacher=...) or training(..., teacher=...)")
        if seen.teacher.shape != seen.outputs.shape:
            raise DataError(
                f"distill.sequence: the outputs are {list(seen.outputs.shape)}, the teacher's "
                f"{list(seen.teacher.shape)}; both need the same words"
            )
        t, counts = self.temperature, self._counts(seen)
        q = (seen.outputs.float() / t).log_softmax(-1)
        p = (seen.teacher.float() / t).log_softmax(-1)
        apart = self._apart(p, q)
        if counts is None:
            return (1 - self.hard_weight()) * t * t * apart.mean()
        return (1 - self.hard_weight()) * t * t * (apart * counts).sum() / counts.sum().clamp_min(1)

    def _apart(self, p: Tensor, q: Tensor) -> Tensor:
        """[...] of log probabilities [..., words]."""
        if self.divergence == "forward":
            return _kl(p, q)
        if self.divergence == "reverse":
            return _kl(q, p)
        assert not isinstance(self.beta, Ramp)
        share = torch.tensor([self.beta, 1 - self.beta]).log().to(p)
        m = torch.logaddexp(p + share[0], q + share[1])
        return self.beta * _kl(p, m) + (1 - self.beta) * _kl(q, m)

    def _counts(self, seen: Seen) -> Tensor | None:
        """Mask of the positions that count; None for all."""
        if seen.counts is not None:
            return seen.counts
        shape, found = seen.outputs.shape[:-1], None
        if isinstance(seen.labels, Tensor) and seen.labels.shape == shape and not seen.labels.is_floating_point():
            found = seen.labels >= 0
        mask = _real(seen.inputs, self.pad)
        if mask is not None and mask.shape == shape:
            found = mask if found is None else found & mask
        return found

    def prepare(self, model: nn.Module, inputs: Any, labels: Any, generator: Generator) -> tuple[Any, Tensor] | None:
        if not self.on_policy or float(torch.rand((), generator=generator)) >= self.on_policy:  # type: ignore[operator]
            return None
        tokens = _tokens(inputs)
        real = _real(inputs, self.pad)
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise DataError("distill.sequence: on-policy needs texts that are padded at their right")
        return self._written(model, inputs, tokens, real, generator)

    def _written(
        self, model: nn.Module, inputs: Any, tokens: Tensor, real: Tensor, generator: Generator
    ) -> tuple[Any, Tensor]:
        """The batch with the student's continuations, and which positions predict what it drew."""
        most = tokens.shape[1] if self.length is None else min(tokens.shape[1], self.prompt + self.length)
        at = real[:, : self.prompt].sum(1).clamp_min(1)  # where the next token of each text goes
        if most <= int(at.min()):
            raise DataError(
                f"distill.sequence.prompt is {self.prompt}, and the texts have {tokens.shape[1]} tokens: none are drawn"
            )
        rows = torch.arange(len(tokens), device=tokens.device)
        places = torch.arange(most, device=tokens.device)
        blank = 0 if self.pad is None else self.pad
        tokens = torch.where(places < at[:, None], tokens[:, :most], blank)
        counts, over = torch.zeros_like(tokens, dtype=torch.bool), at >= most
        with evaluating(model):
            while not bool(over.all()):
                end = int(at[~over].max())
                given = _with(inputs, tokens[:, :end], places[:end] < at[:, None])
                logits = logits_of(forward(model, given))[rows, at.clamp_max(end) - 1].float()
                word = self._draw(logits, generator).to(tokens)
                going = rows[~over]
                tokens[going, at[going]] = word[going]
                counts[going, at[going] - 1] = True
                at = at + (~over).to(at)
                over = over | (at >= most)
                if self.stop is not None:
                    over = over | (word == self.stop)
        return _with(inputs, tokens, places < at[:, None]), counts

    def _draw(self, logits: Tensor, generator: Generator) -> Tensor:
        if not self.sampling:
            return logits.argmax(-1)
        return torch.multinomial((logits / self.sampling).softmax(-1).cpu(), 1, generator=generator)[:, 0]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Of log probabilities, summed over the last dimension; 0 log 0 = 0."""
    return (p.exp() * (p - q).nan_to_num()).sum(-1)


def _tokens(inputs: Any) -> Tensor:
    """The tokens [n, length] in a batch's inputs."""
    found = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(found, Tensor) or found.dim() != 2 or found.is_floating_point():
        raise DataError("distill.sequence: on-policy needs tokens [n, length], alone or as 'input_ids'")
    return found


def _real(inputs: Any, pad: int | None) -> Tensor | None:
    """Mask of what is no padding, where that is known."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor):
        return mask.bool()
    found = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if pad is None or not isinstance(found, Tensor) or found.is_floating_point():
        return None
    return found.ne(pad)


def _with(inputs: Any, tokens: Tensor, real: Tensor) -> Any:
    """Inputs of the same kind for other tokens."""
    if not isinstance(inputs, Mapping):
        return tokens
    made = {"input_ids": tokens}
    if "attention_mask" in inputs:
        made["attention_mask"] = real.to(inputs["attention_mask"].dtype)
    return made
