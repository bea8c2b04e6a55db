"""Tries the laws of engines: the engine that a target names, on windows of the embedded story, in its own process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from knorm.engines.boxed import can_move, model_file, moved_file
from knorm.engines.conditions import EngineTarget, Place, Settings, engine_target
from knorm.engines.cut import states_after_a_cut, states_of_the_last
from knorm.engines.kept import Kept, LentScorer
from knorm.engines.process import EngineLost
from knorm.engines.scorer import Asked, EngineScorer, ModelScorer, closing
from knorm.engines.ways import SMALLER, full_of, with_settings
from knorm.evaluation.windows import cut_windows
from knorm.laws import engine
from knorm.laws.engine_shown import program
from knorm.laws.process.protocol import Request
from knorm.laws.registry import Refuted, Silent, Untested
from knorm.laws.results import Result, judged
from knorm.models import hush, load_model, load_text

FAMILY = "engine"
TEXT = 2000  # characters whose tokens are compared
LONG = {"quick": (2, engine.LONG), "thorough": (4, 1024)}  # windows, and tokens of each


class Beside:
    """Make scorers of the weights that an engine has, in transformers; see laws.engine.EngineSubject.

    Attributes:
        model: a model of transformers.
    """

    model: PreTrainedModel

    def elsewhere(self, cut: tuple[tuple[int, int], ...] = ()) -> ModelScorer:
        """Return a scorer of the same weights in transformers; positions of `cut` leave its cache after the prompt."""
        if not cut:
            return ModelScorer(self.model)
        return ModelScorer(self.model, lambda tokens, prompt: states_after_a_cut(self.model, tokens, prompt, cut))

    def forgetful(self) -> ModelScorer:
        """Return a scorer of the same weights in transformers, where a token sees the last few alone."""
        return ModelScorer(
            self.model, lambda tokens, prompt: states_of_the_last(self.model, tokens, prompt, engine.KEPT)
        )


class Named(Beside):
    """Make scorers of the engine that a target names; see laws.engine.EngineSubject.

    A process with the full cache and one with the target's are started once, and asked again and again.

    Args:
        target: the engine, its model and its settings.
        place: where it runs.
        profile: "quick" or "thorough".

    Raises:
        ValueError: a model that cannot be loaded.
    """

    def __init__(self, target: EngineTarget, place: Place, profile: str) -> None:
        hush()
        self.name, self.target, self.place = target.spec, target, place
        self.model, tokenizer = load_model(target.model)
        self.tokenizer = tokenizer
        story, (count, length) = load_text("narrative"), LONG[profile]
        most = getattr(self.model.config, "max_position_embeddings", None) or length
        self.text = story[:TEXT]
        self.tokens = list(tokenizer(self.text, add_special_tokens=False).input_ids)
        self.long = cut_windows(tokenizer, story, min(length, most), count).input_ids
        self.short = cut_windows(tokenizer, story, engine.SHORT, 2).input_ids
        self.file: Path | None = None
        self.movable = can_move(target.model, target.settings.form)
        self._kept: dict[Settings, Kept] = {}

    def scorer(
        self, which: engine.Which, asked: Asked, *, small: bool = False, moved: bool = False, fresh: bool = False
    ) -> EngineScorer | LentScorer:
        """Ask the engine: a process that runs already, or one of its own.

        Args:
            which: "full" for its full cache, "target" for the condition.
            asked: how it scores.
            small: reads in small batches.
            moved: each weight is moved to the number next to it.
            fresh: nothing was asked of it before.

        Returns:
            The scorer, to be closed.
        """
        assert self.file
        if asked.cut and self.target.settings.no_cut:
            raise Silent(self.target.settings.no_cut)
        target = full_of(self.target) if which == "full" else self.target
        if small:
            target = with_settings(target, target.settings.in_batches_of(SMALLER))
        length, settings = self.long.shape[1], target.settings
        if moved:
            with moved_file(target.model, self.model, settings.form, settings.dtype) as file:  # it is read at the start
                return EngineScorer(target, file, self.place, length, asked)
        if small or fresh or len(asked.companions) >= settings.sequences:
            return EngineScorer(target, self.file, self.place, length, asked)
        kept = self._kept.get(settings)
        if kept is None or not kept.alive:
            kept = Kept(EngineScorer(target, self.file, self.place, length, sequences=settings.sequences))
            self._kept[settings] = kept
        return kept.scorer(asked)

    def close(self) -> None:
        """End the processes that were kept."""
        for kept in self._kept.values():
            kept.close()

    def tokenize(self, text: str) -> list[int]:
        """Cut `text` as the engine does."""
        scorers = [self.scorer("full", Asked())]
        with closing(scorers):
            return scorers[0].tokenize(text, begin=False)

    def program(self, law: str) -> str:
        """Write a program that shows what a `law` refuted, with the engine's own package alone."""
        return program(self.target, self.long[0].tolist(), law)


class EngineChecks:
    """Try the laws of engines on what `request` names, in the place of laws.process.supervisor.Supervisor.

    Args:
        request: the target, and which laws to try how long.
        place: where the engine runs.

    Attributes:
        traits: None: an engine promises nothing but the laws.
    """

    traits: Any = None

    def __init__(self, request: Request, place: Place) -> None:
        self.request, self.place = request, place
        self.expected = dict(request.expected)

    def results(self) -> Generator[Result, None, None]:
        """Yield a Result for each law, as they come.

        Raises:
            ValueError: a target that cannot be loaded, or that the engine refuses.
        """
        chosen = chosen_laws(self.request)
        with contextlib.chdir(self.request.folder or "."):
            target = engine_target(self.request.target)
            subject = Named(target, self.place, self.request.profile)
            written = model_file(target.model, subject.model, target.settings.form, subject.tokenizer)
            with written as file, closing([subject]):
                subject.file = file.resolve()
                with contextlib.suppress(EngineLost), closing([subject.scorer("target", Asked())]):
                    pass  # it is installed, and does not refuse; if it dies, a law says so
                yield from self._tried(subject, chosen)

    def _tried(self, subject: Any, chosen: Sequence[Callable[[engine.Trial], int]]) -> Iterator[Result]:
        trial, lost = engine.Trial(subject), ""
        for law in chosen:
            result = _try(law, trial) if not lost else _result(law, "untested", reason=lost)
            died = result.verdict == "refuted" and _names(law)[0] == "survives"
            if died or (result.reason or "").startswith(_DIED):
                lost = _DIED
            if result.verdict == "refuted":
                result = _result(
                    law, "refuted", counterexample=result.counterexample, seconds=result.seconds, examples=1,
                    given=f"{subject.name}, {len(subject.long)} windows of {subject.long.shape[1]} tokens of narrative",
                    snippet=subject.program(_names(law)[0]),
                )  # fmt: skip
            yield judged(result, self.expected)


def chosen_laws(request: Request) -> list[Callable[[engine.Trial], int]]:
    """Return the laws that a `request` selects."""
    return [law for law in engine.LAWS if request.select is None or {*_names(law)} & {*request.select}]


_DIED = "the engine was lost: see survives"


def _names(law: Callable[..., Any]) -> tuple[str, str]:
    return law.__name__.removeprefix("check_"), FAMILY


def _result(law: Callable[..., Any], verdict: Any, **fields: Any) -> Result:
    name, family = _names(law)
    return Result(name, (law.__doc__ or "").strip().splitlines()[0], family, verdict, **fields)


def _try(law: Callable[[engine.Trial], int], trial: engine.Trial) -> Result:
    begin, trial.shown = time.monotonic(), ""
    try:
        count = law(trial)
    except Refuted as refuted:
        return _result(law, "refuted", counterexample=str(refuted), seconds=time.monotonic() - begin)
    except Silent as silent:
        return _result(law, "does not apply", reason=str(silent))
    except Untested as untested:
        return _result(law, "untested", reason=str(untested), seconds=time.monotonic() - begin)
    except EngineLost as lost:
        return _result(law, "untested", reason=f"{_DIED} ({lost})", seconds=time.monotonic() - begin)
    evicted = count if law is engine.check_eviction_equals_transformers else 0
    seconds = time.monotonic() - begin
    fields: Any = {"examples": count, "answered": count, "evicted": evicted, "reason": trial.shown or None}
    return _result(law, "holds", seconds=seconds, **fields)
