"""Wrong usage that can be told from a request alone, before PyTorch is loaded and before the target runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from knorm.laws.names import refuse_unknown
from knorm.laws.process.protocol import Request
from knorm.laws.results import PROFILES
from knorm.laws.targets import KINDS
from knorm.laws.traits import KNORM, Traits, parse_trait, traits_of
from knorm.methods.targets import is_endpoint, is_engine, parse_target


def check_request(request: Request) -> None:
    """Refuse a `request` that no target can make right.

    Raises:
        ValueError: an unknown trait, value of a trait, kind, profile or check, or a target whose file or package does
            not exist.
    """
    engine = is_engine(request.target)
    if engine:
        _check_engine(request)
    promised(request)
    if request.profile not in PROFILES:
        raise ValueError(f"--profile {request.profile}, but should be one of {', '.join(PROFILES)}")
    if request.kind not in (None, *KINDS):
        raise ValueError(f"--as {request.kind}, but should be one of {', '.join(KINDS)}")
    refuse_unknown((name for name, _ in request.expected), engine=engine)
    refuse_unknown(request.select or (), families=True, engine=engine)
    if not is_endpoint(request.target):
        parse_target(request.target)


def _check_engine(request: Request) -> None:
    """Raise ValueError for what is said of an engine, which promises nothing but its own laws."""
    said = {
        "--as": request.kind,
        "--like": request.like,
        "--trait": request.traits,
        "--device": request.device != "cpu",
    }
    if given := [option for option, value in said.items() if value]:
        where = "are the server's own" if is_endpoint(request.target) else "stand in the target"
        raise ValueError(f"{given[0]} is not for an engine such as {request.target}: its settings {where}")


def promised(request: Request) -> Traits | dict[str, Any]:
    """Collect what `request` says that the target promises. Raises ValueError for unknown traits and values."""
    named = dict(map(parse_trait, request.traits))
    traits_of(None, named)
    if request.like is None:
        return named
    if request.like != "knorm":
        raise ValueError(f"--like {request.like}, but should be knorm")
    return replace(KNORM, **named)
