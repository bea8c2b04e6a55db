"""Presses of kvpress, used as their users use them: `with press(model)`, around the prompt or also while decoding."""

from __future__ import annotations

import copy
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from knorm.methods.budget import Budget, NeedsBudget, TakesNoBudget
from knorm.methods.kinds import is_press, signature_of
from knorm.methods.known import TRIED, WEIGHTS, other_version
from knorm.methods.method import Method, Session, Tokenizer
from knorm.model_attention import implementation_of

_DECODING = {"DecodingPress", "PrefillDecodingPress"}  # open while tokens are decoded; DMSPress where it says so
_EAGER = {"ObservedAttentionPress"}
_RENUMBERS = {"KeyRerotationPress", "RestoreKVPress"}  # the next token's position is the cache's length


def _bases(press: Any) -> set[str]:
    kind = press if isinstance(press, type) else type(press)
    return {base.__name__ for base in kind.__mro__}


def acts_while_decoding(press: Any) -> bool:
    """Tell whether kvpress' own pipeline opens `press` while it decodes."""
    return bool(_bases(press) & _DECODING) or bool(getattr(press, "decoding", False))


def lends_tokenizer(press: Any) -> bool:
    """Tell whether `press` looks for a tokenizer in the folder that the model's configuration names."""
    return "KVzipPress" in _bases(press)


def reads_delimiter(press: Any) -> bool:
    """Tell whether `press` wants a delimiter between the context and the question."""
    return "FinchPress" in _bases(press)


def renumbers(press: Any) -> bool:
    """Tell whether `press` turns keys to their places in the cache, so that the next position is its length."""
    return bool(_bases(press) & _RENUMBERS) or (reads_delimiter(press) and bool(press.rerotate_keys))


class PressMethod(Method):
    """Run a press of kvpress; a copy is opened for each run, with its budget set.

    Args:
        name: what tables and errors call it.
        press: an instance, which is left as it is, or a class.
        budget: in place of the press' own; None leaves it as it is.
        options: arguments of the class; for an instance they count for nothing.

    Attributes:
        press: an instance.
        prepare: is called with each copy and the model before it is opened; by default nothing is.

    Raises:
        NeedsBudget: without a budget the press would remove nothing.
        TakesNoBudget: the press takes none, or only one of the other kind.
        ValueError: the class needs more arguments, or its interface is another than that of the version tried.
    """

    kind = "press"
    prepare: Callable[[Any, PreTrainedModel], None] | None = None

    def __init__(self, name: str, press: Any, budget: Budget | None, options: dict[str, Any] | None = None) -> None:
        super().__init__(name, budget, press)
        if source := sys.modules.get(_base(press).__module__):
            folders = Path(source.__file__ or "").parents
            self.home = next((folder for folder in folders if folder.name == "kvpress"), folders[0])
        if isinstance(press, type):
            press = _made(press, budget, options or {})
        self.press = press
        for part in nested(press):
            _check_interface(part)
        if budget is not None:
            _give(name, copy.deepcopy(press), budget, 1000)  # refused now, not in the middle of a run
        elif _compresses_nothing(press):
            raise NeedsBudget(f"{name} removes nothing, at compression_ratio 0: give keep_ratio or keep_tokens")

    def parts(self) -> list[Any]:
        """List the press and those that it wraps."""
        return [*nested(self.press)]

    @property
    def reads_weights(self) -> bool:
        """Tell whether it reads attention weights, which only eager attention has."""
        return any(_bases(press) & _EAGER for press in self.parts())

    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        if self.reads_weights and implementation_of(model.config) != "eager":
            model.set_attn_implementation("eager")
        return _PressSession(self, copy.deepcopy(self.press), model, tokenizer)

    def _blamed(self, error: Exception) -> str | None:
        blamed = super()._blamed(error)
        if blamed is not None:
            blamed += _other()
        weights = next((WEIGHTS[type(x).__name__] for x in nested(self.press) if type(x).__name__ in WEIGHTS), None)
        if blamed is None or weights is None:
            return blamed
        return f"{self.name} reads {weights}; it raised {type(error).__name__}"


def _compresses_nothing(press: Any) -> bool:
    try:
        return bool(press.compression_ratio == 0)
    except (
        AttributeError,
        AssertionError,
        NotImplementedError,
        ValueError,
    ):  # none, or one that is only known after a run
        return False


def nested_at(press: Any, path: str = "press") -> Iterator[tuple[str, Any]]:
    """Generate `press` and those that it wraps at any depth, each behind where it is, outer ones first.

    The first is at `path`; others are at press.base_press, press.presses[0] and the like.
    """
    yield path, press
    for name, value in vars(press).items():
        many = isinstance(value, (list, tuple))
        for index, inner in enumerate(value if many else [value]):
            if is_press(type(inner)):
                yield from nested_at(inner, f"{path}.{name}" + f"[{index}]" * many)


def nested(press: Any) -> Iterator[Any]:
    """Generate `press` and those that it wraps at any depth, outer ones first."""
    for _, each in nested_at(press):
        yield each


# What knorm uses of a press besides compression_ratio, by its class or one that it is derived from: attributes, and
# methods with the arguments that they are called with.
_ATTRIBUTES = {"DecodingPress": ("target_size",), "CompressionRatioDecodingPress": ("target_compression_ratio",)}
_CALLS: dict[str, dict[str, tuple[str, ...]]] = {
    "BasePress": {"__call__": ("model",)},
    "FinchPress": {"update_model_and_tokenizer": ("model", "tokenizer", "delimiter_token")},
}


def _check_interface(press: Any) -> None:
    """Raise ValueError, in one line, for a press that is not called as those of the version that was tried."""
    kind, bases = type(press), _bases(press)
    said = ""
    for base in sorted(bases & _ATTRIBUTES.keys()):
        said = said or next((f"has no {name}" for name in _ATTRIBUTES[base] if not hasattr(press, name)), "")
    for base in sorted(bases & _CALLS.keys()):
        for name, arguments in _CALLS[base].items():
            signature = signature_of(getattr(press, name)) if hasattr(press, name) else None
            try:
                if signature is None:
                    raise TypeError
                signature.bind(*arguments)
            except TypeError:
                said = said or f"has no {name}({', '.join(arguments)})" + (f", but {name}{signature}" * bool(signature))
    if said:
        other = other_version() or f"kvpress {TRIED} was tried"
        raise ValueError(f"{kind.__name__} {said}: its interface is another than the one that knorm uses; {other}")


def _other() -> str:
    other = other_version()
    return f"; {other}" if other else ""


def _base(press: Any) -> type:
    kind = press if isinstance(press, type) else type(press)
    return next(base for base in kind.__mro__ if base.__name__ == "BasePress")


def _made(press: type, budget: Budget | None, options: dict[str, Any]) -> Any:
    needed = [
        name
        for name, parameter in inspect.signature(press).parameters.items()
        if parameter.default is parameter.empty and name not in options
    ]
    inner = [name for name in needed if name in ("press", "base_press")]
    if inner:
        raise ValueError(f"{press.__name__} wraps a press: write it with one, as {press.__name__}(KnormPress())")
    if needed:
        raise ValueError(f"{press.__name__} needs {', '.join(needed)}: write {press.__name__}({needed[0]}=...)")
    return press(**options)


def setting(name: str, press: Any, budget: Budget, length: int) -> tuple[str, float]:
    """Find how a press is given a budget.

    Args:
        name: what errors call the press.
        press: to be set.
        budget: to be kept.
        length: tokens of the prompt.

    Returns:
        The attribute that holds the budget, and its value.

    Raises:
        TakesNoBudget: the press takes one of the other kind, or none at all.
    """
    if "CompressionRatioDecodingPress" in _bases(press):
        if budget.keep_ratio is None:
            raise TakesNoBudget(f"{name} keeps a share of the tokens seen: give keep_ratio, not keep_tokens")
        return "target_compression_ratio", budget.removed(length)
    if "DecodingPress" in _bases(press):
        if budget.keep_tokens is None:
            raise TakesNoBudget(f"{name} keeps a number of tokens: give keep_tokens, not keep_ratio")
        return "target_size", budget.keep_tokens
    return "compression_ratio", budget.removed(length)


def _give(name: str, press: Any, budget: Budget, length: int) -> None:
    """Set a press' budget for a prompt of `length` tokens. Raises ValueError for a press that takes none."""
    attribute, value = setting(name, press, budget, length)
    if attribute != "compression_ratio":
        setattr(press, attribute, value)
        return
    kind = type(press)
    field = "compression_ratio" in {f for base in kind.__mro__ for f in vars(base).get("__annotations__", {})}
    settable = isinstance(getattr(kind, "compression_ratio", None), property) or field
    try:
        if not settable or "ComposedPress" in _bases(press):
            raise AttributeError
        press.compression_ratio = value
    except AttributeError:
        raise TakesNoBudget(
            f"{name} takes no compression_ratio: drop keep_ratio and keep_tokens, and write its own budget into the "
            f"target{_other()}"
        ) from None


class _PressSession(Session):
    def __init__(self, method: PressMethod, press: Any, model: PreTrainedModel, tokenizer: Tokenizer | None) -> None:
        super().__init__(model, DynamicCache())
        self.method, self.press, self.tokenizer = method, press, tokenizer
        self._finch = reads_delimiter(press)
        if lends_tokenizer(press):
            self._lend_tokenizer()
        self._delimiter: int | None = None
        if self._finch:
            self._prepare_finch()
        if method.prepare is not None:
            method.prepare(press, model)
        if method.budget is None or method.budget.keep_tokens is None:
            self._open(1000)

    def _lend_tokenizer(self) -> None:
        """Put the tokenizer where these presses look for it, in the folder that the model's configuration names."""
        config = self.model.config
        if self.tokenizer is None or Path(config._name_or_path, "tokenizer_config.json").is_file():
            return
        folder = self._prefill.enter_context(tempfile.TemporaryDirectory(prefix="knorm-"))
        self.tokenizer.save_pretrained(folder)
        config._name_or_path = folder

    def _prepare_finch(self) -> None:
        """Give Finch the delimiter that it wants before the question: a token that the tokenizer has already."""
        if self.tokenizer is None:
            raise ValueError(f"{self.method.name} reads a delimiter token in the prompt: give the model's tokenizer")
        delimiter = self.tokenizer.eos_token or self.tokenizer.bos_token
        self.press.update_model_and_tokenizer(self.model, self.tokenizer, delimiter_token=delimiter)
        self._delimiter = self.press.delimiter_token_id

    def _open(self, length: int) -> None:
        if self.method.budget is not None:
            _give(self.method.name, self.press, self.method.budget, length)
        if "DecodingPress" not in _bases(self.press):
            self._prefill.enter_context(_opened(self.press, self.model))

    def begin_prompt(self, tokens: int) -> None:
        super().begin_prompt(tokens)
        if self.method.budget is not None and self.method.budget.keep_tokens is not None:
            self._open(tokens)

    def prompt(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        self.begin_prompt(input_ids.shape[1])
        if not self._finch:
            # No positions: some presses choose otherwise where they are given, and kvpress gives none.
            return {"input_ids": input_ids}
        if bool((input_ids - (self._delimiter or 0) == 0).any()):
            raise ValueError(f"{self.method.name} wants its delimiter once in the prompt, but the text has it already")
        question = max(1, min(32, self.tokens // 4))
        middle = input_ids.new_full((len(input_ids), 1), self._delimiter or 0)
        return {"input_ids": torch.cat([input_ids[:, :-question], middle, input_ids[:, -question:]], 1)}

    def begin_decoding(self) -> None:
        if acts_while_decoding(self.press):
            self._decode.enter_context(_opened(self.press, self.model))
        super().begin_decoding()

    def next_position(self) -> int:
        return int(self.cache.get_seq_length()) if renumbers(self.press) else self.tokens


@contextmanager
def _opened(press: Any, model: PreTrainedModel) -> Iterator[None]:
    with press(model):
        yield
