"""Budgets as a TOML file has them: of a project's cases, and of a plan."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from knorm.policy import exact_ratio


class Budgets(BaseModel):
    """Hold budgets of one kind; a single one may stand without brackets.

    Attributes:
        keep_ratio: each a share of the cache, as it is written.
        keep_tokens: each a number of tokens.

    Example:
        >>> Budgets(keep_ratio=0.5).keep_ratio
        ['0.5']
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    keep_ratio: list[str] = Field(default_factory=list)
    keep_tokens: list[int] = Field(default_factory=list)

    @field_validator("keep_ratio", mode="before")
    @classmethod
    def _ratios(cls, given: Any) -> list[str]:
        ratios = _several(given)
        for ratio in ratios:
            if isinstance(ratio, bool) or not isinstance(ratio, int | float | str):
                raise ValueError(f"is {ratio!r}, but should be a number in (0, 1], or several in brackets")
            exact_ratio(ratio)
        return [str(ratio) for ratio in ratios]

    @field_validator("keep_tokens", mode="before")
    @classmethod
    def _tokens(cls, given: Any) -> list[int]:
        tokens = _several(given)
        for number in tokens:
            if type(number) is not int or number < 1:
                raise ValueError(f"is {number!r}, but should be a whole number from 1 up, or several in brackets")
        return tokens

    @model_validator(mode="after")
    def _one_kind(self) -> Budgets:
        if self.keep_ratio and self.keep_tokens:
            raise ValueError("keep_ratio and keep_tokens are two budgets: give one of them")
        budgets = [*self.keep_ratio, *map(str, self.keep_tokens)]
        if twice := next((budget for budget in budgets if budgets.count(budget) > 1), None):
            raise ValueError(f"the budget {twice} stands there twice")
        return self


def _several(given: Any) -> list[Any]:
    if isinstance(given, list):
        if not given:
            raise ValueError("is empty, but should name a budget")
        return given
    return [given]
