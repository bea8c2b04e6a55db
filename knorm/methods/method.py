"""Method: what a person has that makes a cache smaller, opened on a model in two phases."""

from __future__ import annotations

import inspect
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from knorm.methods.budget import Budget
from knorm.methods.restored import restored
from knorm.methods.watch import Seen, has_windows, watching
from knorm.paths import PACKAGE
from knorm.policy import Policy

# A tokenizer of transformers; some methods read the prompt again in their own words.
Tokenizer = Any


_MODELS = Path(transformers.__file__).parent  # their code runs on what a method gives it


class MethodError(ValueError):
    """Say that a method failed, in its own code: the message names the method, the exception, and the line."""


class Session:
    """Hold a method that is open on `model`: its prompt is read, then the prefill phase is ended, then it decodes.

    Attributes:
        cache: what the model is given as its cache.
        seen: what the queries after the prompt saw.
        tokens: how many tokens the prompt had.
        watched: what the queries see is counted, and each layer gets a mask that fits it; set False before the prompt
            ends where single tokens are decoded and timed, and a method needs no mask of knorm's.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model, self.cache, self.seen, self.tokens = model, cache, Seen(), 0
        self._prefill, self._decode = ExitStack(), ExitStack()
        self.prompted, self.watched = False, True

    def begin_prompt(self, tokens: int) -> None:
        """Note that the prompt, `tokens` long, is about to be read."""
        self.tokens = tokens

    def prompt(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Return the keywords of the call that reads the prompt: `input_ids` and `position_ids`, int64 [batch, T]."""
        self.begin_prompt(input_ids.shape[1])
        return {"input_ids": input_ids, "position_ids": position_ids}

    def end_prompt(self) -> int:
        """End the prefill phase, in which some methods act last, and begin to decode.

        Returns:
            The position of the next token: the prompt's length, or, where a method renumbers what it retains, the
            length of the cache.
        """
        if not self.prompted:
            self.prompted = True
            self._prefill.close()
            self.begin_decoding()
        return self.next_position()

    def begin_decoding(self) -> None:
        """Open what holds while tokens are decoded."""
        if self.watched:
            # Other caches may want the masks that the model would make; a plain one needs none as large as its text.
            masked = type(self.cache) is not DynamicCache or has_windows(self.model)
            self._decode.enter_context(watching(self.model, self.seen, masked=masked))

    def next_position(self) -> int:
        """Return the position of the first token after the prompt."""
        return self.tokens

    def close(self, error: BaseException | None = None) -> None:
        """End both phases, the last one first.

        Args:
            error: what broke the session off, if anything did: what a phase would do at its end is not done then, and
                cannot fail in its place.
        """
        told = (None, None, None) if error is None else (type(error), error, error.__traceback__)
        try:
            self._decode.__exit__(*told)
        finally:
            self._prefill.__exit__(*told)


def _home(code: Any) -> Path | None:
    """Find the file that defines a function or a class, or the folder of its package."""
    try:
        source = inspect.getsourcefile(code if inspect.isroutine(code) or inspect.isclass(code) else type(code))
    except TypeError:
        return None
    file = Path(source or "")
    package = (getattr(code, "__module__", None) or "").partition(".")[0]
    folders = [folder for folder in file.parents if folder.name == package and (folder / "__init__.py").exists()]
    return folders[-1] if folders and package != "transformers" else file


class Method(ABC):
    """Open a way to make a cache smaller on a model, in two phases. `knorm.method` makes one.

    Args:
        name: the target as it was written.
        budget: what one compression retains; None where the method has its own.
        code: a function, a class or an object of it, whose errors are the method's own.

    Attributes:
        name: the target as it was written, which tables show.
        kind: one of kinds.KINDS.
        budget: what one compression retains; None where the method has its own.
        policy: the Policy of knorm's own methods, whose runs follow from a schedule; None for all other methods.
        home: the file, or the folder of the package, that holds its code; None where that is not known.

    Example:
        >>> method(Policy(0.5)).policy.keep_ratio
        0.5
    """

    kind: ClassVar[str]
    policy: Policy | None = None

    def __init__(self, name: str, budget: Budget | None, code: Any = None) -> None:
        self.name, self.budget, self.home = name, budget, _home(code)

    @property
    def label(self) -> str:
        """Join the name and the budget, as tables do."""
        return self.name if self.budget is None else f"{self.name} {self.budget}"

    @abstractmethod
    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        """Open the method on a model, ready for the prompt.

        Args:
            model: a causal language model in eval mode.
            length: tokens that the cache will have been fed in the end.
            batch: rows of each call.
            tokenizer: the model's, for methods that read text.

        Returns:
            The session, to be closed by the caller.
        """

    @contextmanager
    def session(
        self, model: PreTrainedModel, *, length: int, batch: int = 1, tokenizer: Tokenizer | None = None
    ) -> Iterator[Session]:
        """Open the method; at the end the model is as it was before, whatever happened.

        Args:
            model: a causal language model in eval mode.
            length: tokens that the cache will have been fed in the end.
            batch: rows of each call.
            tokenizer: the model's, for methods that read text.

        Yields:
            The session.

        Raises:
            MethodError: the method's own code raised an exception; the message says which, and where.
        """
        try:
            with self._opened(model, length, batch, tokenizer) as session:
                yield session
        except MethodError:
            raise
        except Exception as error:
            if (blamed := self._blamed(error)) is None:
                raise
            raise MethodError(blamed) from error

    @contextmanager
    def _opened(
        self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None
    ) -> Iterator[Session]:
        with restored(model):
            session = self.start(model, length, batch, tokenizer)
            try:
                yield session
            except BaseException as error:
                session.close(error)
                raise
            session.close()

    @contextmanager
    def open(
        self,
        model: PreTrainedModel,
        *,
        length: int | None = None,
        batch: int = 1,
        tokenizer: Tokenizer | None = None,
    ) -> Iterator[Cache]:
        """Open the method on a model: the first call is the prompt, each later one decodes.

        Whatever the method's own code raises is raised as it is.

        Args:
            model: a causal language model of transformers in eval mode, which attends by "sdpa" or "eager".
            length: tokens that the cache will have been fed in the end, for caches that are allocated in advance; by
                default as many as the model has positions.
            batch: rows of each call.
            tokenizer: the model's, for methods that read text.

        Yields:
            The cache to give to the model, with explicit position_ids.

        Example:
            >>> model, tokenizer = load_embedded()
            >>> ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
            >>> with method(Policy(0.5)).open(model) as cache:
            ...     _ = model(input_ids=ids, **{knorm.cache_keyword(model): cache})
            ...     cache.layers[0].keys.shape[2] < ids.shape[1]
            True
        """
        most = length or int(getattr(model.config, "max_position_embeddings", 0) or 4096)
        calls, inside = 0, False
        with self._opened(model, most, batch, tokenizer) as session:

            def before(module: Any, args: Any, keywords: dict[str, Any]) -> None:
                nonlocal calls, inside
                if inside:  # a call that the method itself makes while its prefill phase ends
                    return
                inside = True
                try:
                    if calls == 0:
                        ids = keywords.get("input_ids", args[0] if args else None)
                        session.begin_prompt((keywords["inputs_embeds"] if ids is None else ids).shape[1])
                    else:
                        session.end_prompt()
                finally:
                    calls, inside = calls + 1, False

            hook = model.base_model.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield session.cache
            finally:
                hook.remove()

    def _blamed(self, error: Exception) -> str | None:
        """Say that the method failed, if the innermost of its frames or of knorm's is the method's.

        A model that fails on the cache, though it ran on the same tokens without, is told of too.
        """
        frames = traceback.extract_tb(error.__traceback__)
        own = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(PACKAGE)]
        foreign = [i for i, frame in enumerate(frames) if self.owns(frame.filename)]
        said = " ".join(str(error).split()) or "no message"
        if foreign and not (own and own[-1] > foreign[-1]):
            frame = frames[foreign[-1]]
            return (
                f"{self.name} raised {type(error).__name__}: {said} ({Path(frame.filename).name}, line {frame.lineno})"
            )
        inside = frames[own[-1] + 1 :] if own else frames
        if isinstance(error, torch.OutOfMemoryError) or not any(_MODELS in Path(f.filename).parents for f in inside):
            return None
        return f"{self.name}: with its cache the model raised {type(error).__name__}: {said}"

    def owns(self, file: str) -> bool:
        """Tell whether a source file belongs to the method.

        Args:
            file: a path, as a traceback has it.

        Returns:
            True where it lies in the method's home.
        """
        return self.home is not None and Path(file).is_relative_to(self.home)
