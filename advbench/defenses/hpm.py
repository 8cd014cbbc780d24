"""HPM: an l2-reclassifier with Hybrid Prototype Mixing (Wang 2026, arXiv 2606.01746).

Notation: h features (N, D), a = W h + b the logits of the linear head (N, K), D_k the prototypes of
the data set, B_k those of the batch, both (K, D). The values of hyper-parameters, and what is left
open by the abstract, are our reading of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.nn import functional as F

from advbench.backbones.base import Classifier
from advbench.config.roles import Role
from advbench.data.base import Splits
from advbench.defenses.base import Defense, Part, Step, Surrogate, Traits
from advbench.devices import in_company
from advbench.errors import UserError, did_you_mean
from advbench.surgery import buffers_kept, modes_kept, twin

INFERENCE = ("batch", "context")
CONTEXT_SEED = 0  # of the choice of the context images
READ = 250  # images per batch while the training set is read
MEDIAN_SAMPLES = 10_000  # at most so many, evenly spaced, give the first temperature


def one_hot(y: Tensor, classes: int) -> Tensor:
    """(N,) -> (N, K) float32."""
    return (y[:, None] == torch.arange(classes, device=y.device)).float()


def route(a: Tensor, tau: float, soft: bool) -> tuple[Tensor, Tensor]:
    """The share of each row in each class, (N, K), and what it counts there, (N, K).

    Straight-through: q = o + s - sg(s), s = softmax(a / tau), o = onehot(argmax a); it counts o.
    Soft: both are s.
    """
    s = (a / tau).softmax(1)
    if soft:
        return s, s
    o = one_hot(a.argmax(1), a.shape[1]).to(a)
    return o + (s - s.detach()), o


def mixed(prototypes: Tensor, sums: Tensor, n: Tensor, mix: float) -> Tensor:
    """P = mix D + (1 - mix) B, with B_k = sums_k / n_k, and B_k = D_k where n_k = 0.

    Soft counts need not be whole. Below one row, D_k stands in for the part that is missing: with
    whole counts that is the rule above, and in between it has no jump.

    Args:
        prototypes: D, (K, D).
        sums: (..., K, D).
        n: (..., K, 1), >= 0.

    Returns:
        (..., K, D).
    """
    missing = (1 - n).clamp(min=0)
    # The factor takes away the gradient of a straight-through sum without any row.
    batch = (sums * (n > 0) + missing * prototypes) / (n + missing)
    return mix * prototypes + (1 - mix) * batch


def squared_distances(h: Tensor, prototypes: Tensor) -> Tensor:
    """||h_i - P_k||^2: (N, D), (K, D) -> (N, K), without a tensor of N x K x D."""
    centre = prototypes.detach().mean(0)  # what all have in common would cost digits
    h, prototypes = h - centre, prototypes - centre
    return h.square().sum(1, keepdim=True) - 2 * h @ prototypes.T + prototypes.square().sum(1)


@fx.wrap  # a trace of the model keeps the call as it is
def reclassify(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prototypes: Tensor,
    context: Tensor,
    log_temperature: Tensor,
    mix: float,
    tau: float,
    inference: str,
    soft: bool,
) -> Tensor:
    """l_ik = -||h_i - P_k||^2 / T; see ``HPMHead``. (N, D) -> (N, K), in float32 at least."""
    with torch.autocast(h.device.type, enabled=False):
        exact = torch.promote_types(h.dtype, torch.float32)
        h, weight, prototypes = h.to(exact), weight.to(exact), prototypes.to(exact)
        bias = None if bias is None else bias.to(exact)
        a = F.linear(h, weight, bias)
        if inference == "fc":
            return a
        if mix == 1:
            squares = squared_distances(h, prototypes)
        elif inference == "batch":
            q, o = route(a, tau, soft)
            squares = squared_distances(h, mixed(prototypes, q.T @ h, o.sum(0)[:, None], mix))
        else:
            context = context.to(exact)
            hard = one_hot(F.linear(context, weight, bias).argmax(1), len(weight)).to(h)
            sums, n = hard.T @ context, hard.sum(0)[:, None]
            if inference == "frozen":
                squares = squared_distances(h, mixed(prototypes, sums, n, mix))
            else:
                q, o = route(a, tau, soft)
                own = q[:, :, None] * h[:, None]
                points = mixed(prototypes, sums + own, n + o[:, :, None], mix)
                squares = (h[:, None] - points).square().sum(2)
        return -squares / log_temperature.to(exact).exp()


class HPMHead(nn.Module):
    """Logits (N, K) from features (N, D): l_ik = -||h_i - P_k||^2 / T, P = mix D + (1 - mix) B.

    B is made from the linear head's predictions, through a straight-through estimator (``route``):
    B_k = sum_i q_ik h_i / n_k, n_k = sum_i o_ik, and B_k = D_k for a class without any row.

    Args:
        linear: the head that was there.
        mix: in [0, 1]; with 1 there is no B.
        tau: temperature of the router, > 0.
        inference: over which rows the sums run in evaluation mode. "batch": over the batch, as
            always in training mode (there, each device's own). "context": for each row, over the
            context and the row itself. Surrogates know two more: "frozen" (over the context alone)
            and "fc" (the linear head's logits a).

    Attributes:
        prototypes: D, (K, D).
        context: features of fixed clean images, (C, D).
        log_temperature: log T, a scalar.
        soft: shares are s in place of q, and counted as such.
    """

    prototypes: Tensor
    context: Tensor

    def __init__(
        self, linear: nn.Linear, *, mix: float, tau: float, inference: str, eval_batch: int
    ) -> None:
        super().__init__()
        self.linear = linear
        self.mix = mix
        self.tau = tau
        self.inference = inference
        self.soft = False
        like = linear.weight.detach()
        self.register_buffer("prototypes", torch.zeros_like(like))
        self.register_buffer("context", like.new_zeros(eval_batch, linear.in_features))
        self.log_temperature = nn.Parameter(like.new_zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return reclassify(
            h,
            self.linear.weight,
            self.linear.bias,
            self.prototypes,
            self.context,
            self.log_temperature,
            self.mix,
            self.tau,
            "batch" if self.training else self.inference,
            self.soft,
        )


@dataclass(frozen=True)
class HPM(Defense):
    """Replaces the linear head by ``HPMHead``; made to fine-tune an adversarially trained model.

    Two facts decide its evaluation:
    1. For fixed prototypes the l2 head is a linear head, w_k = 2 P_k / T, b_k = -||P_k||^2 / T. So
       mix=1 is static and differentiable, and AutoAttack is valid there: it is a row of its own.
    2. With mix < 1 and inference=batch a prediction depends on the other rows. An attack that
       drops the samples that it fooled and batches the rest anew changes the classifier under its
       own feet, and finds robustness that is not there. So the batches are fixed (``Traits``).

    ``inference``, ``mix`` and ``tau`` may be changed for a trained model; ``eval_batch`` is the
    size of a stored tensor.

    Raises:
        UserError: for values out of range.
    """

    momentum: float = 0.99
    """Momentum of the prototypes, in [0, 1]: D_k <- momentum D_k + (1 - momentum) mean of h over
    the rows of class k, after each step."""
    mix: float = field(default=0.5, metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """lambda, in [0, 1]; with 1 the prototypes of the batch are not used."""
    tau: float = field(default=1.0, metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """Temperature of the router's softmax, above 0."""
    fc_weight: float = 1.0
    """Weight of the linear head's own cross-entropy, at least 0; it keeps the router good."""
    inference: str = field(default="batch", metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """``batch``: prototypes from the test batch; ``context``: from a stored clean batch and the
    sample itself, a function of one sample, such as one would deploy."""
    eval_batch: int = 100
    """Rows of the test batch, and of the stored one."""

    def __post_init__(self) -> None:
        for name in ("momentum", "mix"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"defense.{name}={value:g} is not between 0 and 1")
        if not 0 < self.tau < float("inf"):
            raise UserError(f"defense.tau={self.tau:g} is not a number above 0")
        if not 0 <= self.fc_weight < float("inf"):
            raise UserError(f"defense.fc_weight={self.fc_weight:g} is not a number from 0 on")
        if self.inference not in INFERENCE:
            raise UserError(
                f"defense.inference={self.inference} is not a way to predict"
                f"{did_you_mean(self.inference, INFERENCE)}"
            )
        if self.eval_batch < 1:
            raise UserError(f"defense.eval_batch={self.eval_batch} is not at least 1")

    def traits(self, model: nn.Module) -> Traits:
        if self.mix == 1:
            return Traits()
        together = self.inference == "batch"
        return Traits(
            gradient="straight_through",
            batch_dependent=together,
            batch_size=self.eval_batch if together else None,
        )

    def apply(self, model: Classifier) -> Classifier:
        """Put an ``HPMHead`` in the place of the linear head.

        Raises:
            UserError: for a head that is not one linear layer.
        """
        head = model.head
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"the head of the model is {type(head).__name__}, and HPM needs a linear head "
                "(nn.Linear): choose another backbone, or put no other defense on the head"
            )
        model.head = HPMHead(
            head,
            mix=self.mix,
            tau=self.tau,
            inference=self.inference,
            eval_batch=self.eval_batch,
        ).train(head.training)
        return model

    @torch.no_grad()
    def prepare(self, model: Classifier, data: Splits) -> None:
        """D: class means of the clean training set. T: the median squared distance to the nearest.

        The features are those of training mode, in which the first step sees them: before a net is
        trained, its batch norms know nothing, and T would be orders too small. The order is random,
        for batches of a batch norm that are like those of training.

        Raises:
            UserError: for a class without training samples: it has no prototype.
        """
        head, train = head_of(model), data.train
        counts = torch.bincount(train.labels, minlength=len(head.prototypes))
        if not counts.all():
            missing = int((counts == 0).nonzero()[0])
            raise UserError(
                f"class {missing} has no training samples, and HPM needs a prototype of each: "
                "lower data.val, or leave the class out of the data"
            )
        device = head.prototypes.device
        sums = torch.zeros_like(head.prototypes)
        stride = -(-len(train) // MEDIAN_SAMPLES)
        some: list[Tensor] = []
        everyone = torch.randperm(len(train), generator=torch.Generator().manual_seed(CONTEXT_SEED))
        with _as_in_training(model):
            # Of nearly one size: batch norm can't have a last one with a single image.
            for order in everyone.tensor_split(-(-len(train) // READ)):
                for x, y in train.batches(order, READ, device):
                    h = model.features(x).float()
                    sums += one_hot(y, len(sums)).T @ h
                    some.append(h[(order % stride == 0).to(device)])
        head.prototypes.copy_(sums / counts.to(sums)[:, None])
        nearest = squared_distances(torch.cat(some), head.prototypes).amin(1)
        # Zero where every sample is its own class mean.
        head.log_temperature.copy_(nearest.median().clamp(min=1e-6).log())
        self.after_epoch(model, data)

    @torch.no_grad()
    def after_epoch(self, model: Classifier, data: Splits) -> None:
        """The features of the context images, by the weights as they are now."""
        head, train = head_of(model), data.train
        generator = torch.Generator().manual_seed(CONTEXT_SEED)
        chosen = torch.randperm(len(train), generator=generator)
        chosen = chosen[torch.arange(self.eval_batch) % len(train)]
        batches = train.batches(chosen, READ, head.context.device)
        head.context.copy_(torch.cat([model.features(x).float() for x, _ in batches]))

    def loss_terms(self, model: Classifier, step: Step) -> dict[str, Tensor]:
        a = head_of(model).linear(_trained(step).features)
        return {"fc": self.fc_weight * F.cross_entropy(a.float(), step.labels)}

    @torch.no_grad()
    def after_step(self, model: Classifier, step: Step) -> None:
        prototypes = head_of(model).prototypes
        h, rows = _trained(step).features.float(), one_hot(step.y, len(prototypes))
        # One tensor, so that devices talk once: sums (K, D), and counts in the last column.
        total = torch.cat([rows.T @ h, rows.sum(0)[:, None]], 1)
        if in_company():
            distributed.all_reduce(total)
        sums, counts = total[:, :-1], total[:, -1:]
        moved = prototypes.lerp(sums / counts.clamp(min=1), 1 - self.momentum)
        prototypes.copy_(torch.where(counts > 0, moved, prototypes))

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        def surrogate(loss: str, why: str, **settings: float | str | bool) -> Surrogate:
            other = twin(model)
            head = head_of(other)
            for name, value in settings.items():
                setattr(head, name, value)
            return Surrogate(other, exact=False, loss=loss, why=why)

        surrogates = {
            "fc_head": surrogate(
                "ce", "the linear head on the same features: sensitive, smooth", inference="fc"
            )
        }
        if self.mix == 1:
            return surrogates
        surrogates["static"] = surrogate(
            "margin", "the data set's prototypes alone: a linear head, exact gradients", mix=1.0
        )
        for tau in (1.0, 0.1):
            surrogates[f"soft-{tau:g}"] = surrogate(
                "margin",
                f"soft routing at temperature {tau:g}: its values follow its gradients",
                soft=True,
                tau=tau,
            )
        surrogates["frozen_batch"] = surrogate(
            "margin", "prototypes that no attacked row can move: no routing", inference="frozen"
        )
        return surrogates


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode; afterwards the modes and buffers are as before."""
    with modes_kept(model), buffers_kept(model):
        model.train()
        yield


def head_of(model: nn.Module) -> HPMHead:
    """The HPM head inside a model.

    Raises:
        UserError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, HPMHead):
            return module
    raise UserError(f"{type(model).__name__} has no HPM head: apply the defense first")


def _trained(step: Step) -> Part:
    """The part that the prototypes and the router follow: the adversarial one if there is one."""
    part = step.adversarial or step.clean
    assert part is not None
    return part
