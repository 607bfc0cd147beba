"""Rules for naming an object from its fused probabilities: which classes are possible, and when a group is named instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..fusion import MetadataPrior

UNKNOWN = "unknown"  # label of an object for which the rules give no class and no group


@dataclass(frozen=True, eq=False)
class ImagePrior:
    """A metadata prior, and the metadata of the images to predict.

    Attributes:
        prior: the prior, for the classes of the model.
        rows: metadata by `str(path)`; an image without any is not corrected.
        digest: SHA-256 of the prior's file.
    """

    prior: MetadataPrior
    rows: Mapping[str, Mapping[str, str]]
    digest: str

    def about(self, name: str | None) -> tuple[str, ...]:
        """Return the values that correct the predictions for an image, by its name."""
        return self.prior.values_of(self.rows.get(name or "", {}))

    def corrected(self, fused: Tensor, names: Sequence[str | None]) -> Tensor:
        """Return corrected log-probabilities of fused logits `[B, classes]` of the images with these names."""
        return self.prior(fused.float(), [self.rows.get(name or "", {}) for name in names])


@dataclass(frozen=True)
class Rules:
    """The classes of a model, and the rules for naming them.

    Attributes:
        labels: class names in the order of the logits.
        classes: the classes that are possible; the others get probability 0. None for all.
        ancestors: the groups of each class, from narrow to broad, e.g. genus and family; "" where it has none.
        rollup: a class below this probability is replaced by the narrowest group that reaches it; None for never.
        abstain: a class below this probability is withheld; None for never.
        prior: corrects the fused probabilities by the metadata of each image; None for no correction.

    >>> rules = Rules(("lion", "leopard", "horse"), ancestors={"lion": ("Felidae",), "leopard": ("Felidae",)}, rollup=0.65)
    >>> rules.group(torch.tensor([0.5, 0.4, 0.1]))[0]
    'Felidae'
    """

    labels: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    ancestors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rollup: float | None = None
    abstain: float | None = None
    prior: ImagePrior | None = None

    def __bool__(self) -> bool:
        """Whether any rule is set."""
        return self != Rules(self.labels)

    @property
    def count(self) -> int:
        """The number of possible classes."""
        return len(self.labels if self.classes is None else self.classes)

    def restricted(self, logits: Tensor) -> Tensor:
        """Return logits `[..., classes]` with minus infinity for the classes that are not possible."""
        if self.classes is None:
            return logits
        excluded = torch.tensor([label not in self.classes for label in self.labels], device=logits.device)
        return logits.masked_fill(excluded, float("-inf"))

    def applied(self, logits: Mapping[str, Tensor], names: Sequence[str | None]) -> dict[str, Tensor]:
        """Return logits `[B, classes]` by output as the rules change them: `fused` is corrected by the prior, all are restricted.

        Args:
            logits: logits `[B, classes]` by output.
            names: names of the B images, for the prior.
        """
        corrected = {} if self.prior is None or "fused" not in logits else {"fused": self.prior.corrected(logits["fused"], names)}
        return {name: self.restricted(z.float()) for name, z in {**logits, **corrected}.items()}

    def group(self, probabilities: Tensor) -> tuple[str, float]:
        """Return the narrowest group whose summed probability reaches `rollup`, and the sum; `unknown` and 0 if none does.

        Args:
            probabilities: `[classes]`.
        """
        assert self.rollup is not None
        values = probabilities.tolist()
        for level in range(max(map(len, self.ancestors.values()), default=0)):
            sums: dict[str, float] = {}
            for label, value in zip(self.labels, values):
                named = self.ancestors.get(label, ())
                if level < len(named) and named[level]:
                    sums[named[level]] = sums.get(named[level], 0.0) + value
            best = max(sums, key=lambda name: sums[name], default="")
            if best and sums[best] >= self.rollup:
                return best, min(sums[best], 1.0)
        return UNKNOWN, 0.0

    def settings(self) -> dict[str, Any]:
        """Return plain values for JSON, from which `of_settings` rebuilds the rules."""
        found: dict[str, Any] = {} if self.classes is None else {"classes": list(self.classes)}
        if self.rollup is not None:
            found |= {"rollup": self.rollup, "ancestors": {label: list(named) for label, named in self.ancestors.items()}}
        found |= {} if self.abstain is None else {"abstain": self.abstain}
        return found if self.prior is None else {**found, "prior": self.prior.digest}

    @classmethod
    def of_settings(cls, labels: Sequence[str], settings: Mapping[str, Any]) -> Rules:
        """Rebuild the rules from the settings in the header of a prediction file."""
        classes = settings.get("classes")
        kept = None if classes is None else tuple(classes)
        return cls(tuple(labels), kept, settings.get("ancestors", {}), settings.get("rollup"), settings.get("abstain"))
