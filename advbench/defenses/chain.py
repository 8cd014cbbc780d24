"""Several defenses on one model, such as an activation inside and a head on top."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.data.base import Splits
from advbench.defenses.base import Defense, PartName, Step, Surrogate, Traits, worst
from advbench.errors import UserError


@dataclass(frozen=True)
class Chain(Defense):
    """Each hook of every member, in the order of the members: inside first, head last.

    Raises:
        UserError: for fewer, and where two members take weights from another run.
    """

    members: tuple[Defense, ...] = ()
    """At least two. Two that replace the head, or the same activations, do not fit on one model,
    and the second one raises."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))  # a config has lists
        if len(self.members) < 2:
            raise UserError(
                f"a chain has at least two members, not {len(self.members)}: "
                "give defense.members=[sparta,hpm]"
            )
        if len(takers := self._takers()) > 1:
            names = " and ".join(type(member).__name__ for member in takers)
            raise UserError(
                f"{names} take weights from another run, and one member may: leave out the others'"
            )

    def _takers(self) -> list[Defense]:
        return [member for member in self.members if _weights(member) is not None]

    @property
    def weights(self) -> str | None:
        """The run from which a member takes weights."""
        return next((_weights(member) for member in self._takers()), None)

    def traits(self, model: nn.Module) -> Traits:
        """The worst of the members' traits.

        Raises:
            UserError: if two members are to be judged in batches of different sizes.
        """
        return worst([member.traits(model) for member in self.members])

    def apply(self, model: Classifier) -> Classifier:
        for member in self.members:
            model = member.apply(model)
        self.traits(model)  # what can't be judged is not worth training
        return model

    def prepare(self, model: Classifier, data: Splits) -> None:
        for member in self.members:
            member.prepare(model, data)

    @property
    def parts(self) -> tuple[PartName, ...]:
        return tuple(dict.fromkeys(part for member in self.members for part in member.parts))

    def before_part(self, model: Any, part: PartName) -> None:
        for member in self.members:
            member.before_part(model, part)

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        """The terms of all members.

        Raises:
            ValueError: if two give their terms one name.
        """
        terms: dict[str, Tensor] = {}
        owners: dict[str, Defense] = {}
        for member in self.members:
            for name, term in member.loss_terms(model, step).items():
                if name in terms:
                    both = f"{type(owners[name]).__name__} and {type(member).__name__}"
                    raise ValueError(f"{both} both have a loss term '{name}'")
                terms[name], owners[name] = term, member
        return terms

    def after_step(self, model: Any, step: Step) -> None:
        for member in self.members:
            member.after_step(model, step)

    def after_epoch(self, model: Any, data: Splits) -> None:
        for member in self.members:
            member.after_epoch(model, data)

    def finish(self, model: Any, data: Splits) -> dict[str, Any]:
        """What the members chose, one after the other; a member's values as ``class.parameter``."""
        chosen = {}
        for member in self.members:
            name = type(member).__name__.lower()
            values = member.finish(model, data)
            chosen |= {f"{name}.{key}": value for key, value in values.items()}
        return chosen

    def adopt(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Hands another run's weights to the member that takes some; UserError if none does."""
        takers = self._takers()
        if not takers:
            super().adopt(model, weights)
        for member in takers:
            member.adopt(model, weights)

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        """Those of all members. Each is the whole model, with one member's part of it changed.

        A name that several members use is preceded by the member's class: ``sparta.base``, and by
        its place in the chain too where a class comes twice: ``sparta2.base``. The noise of the
        other members stays in it.
        """
        classes = [type(member).__name__.lower() for member in self.members]
        labels = [
            name if classes.count(name) == 1 else f"{name}{position}"
            for position, name in enumerate(classes, start=1)
        ]
        noisy = [member.traits(model).stochastic for member in self.members]
        surrogates: list[tuple[str, str, Surrogate]] = []
        for position, member in enumerate(self.members):
            draws = any(noisy[:position] + noisy[position + 1 :])
            for name, surrogate in member.surrogates(model).items():
                drawn = replace(surrogate, stochastic=surrogate.stochastic or draws)
                surrogates.append((labels[position], name, drawn))
        uses = Counter(name for _, name, _ in surrogates)
        named = {
            name if uses[name] == 1 else f"{label}.{name}": surrogate
            for label, name, surrogate in surrogates
        }
        return {**named, **self._together(model)}

    def _together(self, model: Any) -> dict[str, Surrogate]:
        """One target without any of the obstacles, where several members put one in the way.

        Of each such member it takes the first surrogate that is a function of x alone.
        """
        blocking = [
            member
            for member in self.members
            if member.traits(model).stochastic or member.traits(model).gradient != "exact"
        ]
        if len(blocking) < 2:
            return {}
        names, last = [], None
        for member in blocking:
            target = model if last is None else last.model
            plain = {
                name: surrogate
                for name, surrogate in member.surrogates(target).items()
                if not (surrogate.needs_clean_input or surrogate.auxiliary_loss)
            }
            if plain:
                name, last = next(iter(plain.items()))
                names.append(name)
        if last is None:
            return {}
        why = "every obstacle out of the way at once"
        return {"+".join(names): replace(last, exact=False, why=why)}


def _weights(member: Defense) -> str | None:
    """The run that a defense takes weights from, where it has such a parameter."""
    return getattr(member, "weights", None)
