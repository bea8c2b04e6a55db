"""Cells: the independent parts of a plan, each named by the digest of everything that it depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from knorm.engines.conditions import engine_target
from knorm.methods.known import NO_PRESS
from knorm.methods.targets import is_engine
from knorm.sources import MODELS
from knorm.sweep.inputs import code_digest, digest, model_digest, model_type, target_digest, text_digest, versions
from knorm.sweep.plan import MOST_CELLS, Entry, Plan

CONTROL = "full cache, again"  # the method of the cells that show what noise does
ENGINE = "engine"  # the form of a method that an engine runs, on a model of its own
VERSION = 1  # of a result's form


@dataclass(frozen=True)
class Chosen:
    """Hold a method with its budget, as its target is loaded.

    Attributes:
        target: as it is written, no pattern; CONTROL for the full cache.
        kind: as `--as`, where the plan says it.
        keep_ratio: or keep_tokens: the budget; neither where the method has its own.
        policy: fields of the target knorm's policy.
        form: the kind that the target has, one of methods.kinds.KINDS, or ENGINE.
    """

    target: str
    kind: str | None = None
    keep_ratio: str | None = None
    keep_tokens: int | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    form: str = ""

    @property
    def name(self) -> str:
        """Return the target with its policy."""
        fields = ", ".join(f"{name}={value}" for name, value in self.policy.items())
        return f"{self.target}({fields})" if fields else self.target

    @property
    def label(self) -> str:
        """Join the name and the budget, as tables do."""
        budget = self.keep_ratio or (f"{self.keep_tokens} tokens" if self.keep_tokens else None)
        return f"{self.name} {budget}" if budget else self.name


@dataclass(frozen=True)
class Cell:
    """Hold one part of a study: what is measured, on what, and how.

    Attributes:
        measure: "damage", "laws", "counters" or "latency".
        method: with its budget.
        model: and dtype, device, threads: what runs, and on what; empty for laws, which have models of their own.
        text: with its column, cut into windows of `window` tokens; those from `first` to before `last` are the cell's.
        prompt_length: tokens; what follows is scored, or generated.
        batch: windows at a time; how: the way, as asked for.
        seed: of what is drawn.
        profile: of laws; new_tokens: of counters and latency; blocks: of latency.
        limit: seconds, after which the cell is given up; no part of its name.
        inputs: digests of the files, and versions.
    """

    measure: str
    method: Chosen
    device: str
    threads: int
    seed: int
    limit: float
    inputs: Mapping[str, Any]
    model: str = ""
    dtype: str = ""
    text: str = ""
    column: str = ""
    window: int = 0
    first: int = 0
    last: int = 0
    prompt_length: int = 0
    batch: int = 0
    how: str = ""
    profile: str = ""
    new_tokens: int = 0
    blocks: int = 0

    @property
    def setting(self) -> tuple[Any, ...]:
        """Return what cells share that a worker need not load or run again."""
        return self.model, self.dtype, self.text, self.prompt_length, self.first, self.seed

    @property
    def row(self) -> tuple[Any, ...]:
        """Return what the cells share that make one row of the table."""
        method = self.method
        policy = json.dumps(method.policy, sort_keys=True)
        named = (method.target, method.kind, method.keep_ratio, method.keep_tokens, policy)
        return self.measure, self.model, self.dtype, self.text, self.prompt_length, self.window, self.seed, *named

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them; cell_of reads them back."""
        return {**vars(self), "method": {**vars(self.method), "policy": dict(self.method.policy)}}

    def name(self) -> str:
        """Return the digest of everything that the cell's result depends on."""
        fields = self.as_json()
        del fields["limit"], fields["method"]["form"]
        return digest(fields)


def cell_of(fields: Mapping[str, Any]) -> Cell:
    """Return the cell of which Cell.as_json gave `fields`.

    A field that is missing or unknown raises TypeError; a missing method, KeyError.
    """
    return Cell(**{**fields, "method": Chosen(**fields["method"])})


def outcome(
    fields: Mapping[str, Any],
    values: Any = None,
    *,
    failed: str | None = None,
    fault: str | None = None,
    seconds: float = 0.0,
    memory: int = 0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Make what a result file holds.

    Args:
        fields: of Cell.as_json.
        values: what was measured, in the form that its measure has; None where nothing was.
        failed: why the method has no result here; None where it has one.
        fault: the traceback of a fault of knorm's own; None where there was none.
        seconds: wall time that it took.
        memory: the most bytes that the process had, or that were allocated on the GPU; 0 where it is not known.
        environment: versions and the device.

    Returns:
        The fields of table.Result; the values stand under the name of the cell's measure.
    """
    return {
        "form": "knorm-sweep-cell", "version": VERSION, "cell": dict(fields), "failed": failed, "fault": fault,
        fields["measure"]: values, "seconds": seconds, "memory": memory, "environment": dict(environment or {}),
    }  # fmt: skip


def choose(entry: Entry, plan: Plan) -> list[Chosen]:
    """Load the targets of one entry of a plan, and give each its budgets.

    PyTorch is loaded, except for knorm's own method.

    Args:
        entry: a target or a pattern; its own budgets take the place of the plan's.
        plan: whose budgets the others get.

    Returns:
        A method for each target and budget. One that has a budget of its own is there once, with that one; the others
        keep half where neither the entry nor the plan gives a budget.

    Raises:
        ValueError: a target that does not exist, or takes no budget of this kind.
        TypeError: a target that cannot be called as its kind is.
    """
    own = bool(entry.keep_ratio or entry.keep_tokens)
    ratios, tokens = (entry.keep_ratio, entry.keep_tokens) if own else (plan.keep_ratio, plan.keep_tokens)
    if entry.target == "knorm":
        if tokens and not ratios:
            raise ValueError("knorm keeps a share of the cache: give keep_ratio, not keep_tokens")
        return [Chosen("knorm", keep_ratio=ratio, policy=entry.policy, form="policy") for ratio in ratios or ["0.5"]]
    if is_engine(entry.target):
        return [_engine(entry, plan, own)]
    from knorm.methods.door import with_budgets
    from knorm.methods.targets import expanded

    budgets: list[dict[str, Any]] = [{"keep_ratio": ratio} for ratio in ratios]
    budgets += [{"keep_tokens": number} for number in tokens]
    chosen = []
    for target in expanded(entry.target):
        for made in with_budgets(target, entry.kind, budgets, optional=not own or target != entry.target):
            budget = made.budget
            ratio = None if budget is None or budget.keep_ratio is None else str(budget.keep_ratio)
            number = None if budget is None else budget.keep_tokens
            chosen.append(Chosen(target, entry.kind, ratio, number, form=made.kind))
    return chosen


def _engine(entry: Entry, plan: Plan, own: bool) -> Chosen:
    """Choose an engine's cache, whose settings stand in the target. Raises ValueError for what it cannot be given."""
    engine_target(entry.target)
    if own or entry.kind is not None:
        raise ValueError(f"{entry.target} takes no budget and no kind: its settings stand in the target")
    if plan.how == "schedule":
        raise ValueError(f"how is 'schedule', but {entry.target} has none: give 'two calls', 'loop' or 'auto'")
    return Chosen(entry.target, form=ENGINE)


def misfit(chosen: Chosen, model: str) -> str | None:
    """Return why the method `chosen` cannot run on `model`, as far as that is known before anything is loaded.

    None where it fits, and where only loading the model would tell. ValueError where no model has this name.
    """
    if chosen.form == ENGINE:
        return None  # it brings its own
    architecture = model_type(model)
    if chosen.form == "press" and architecture in NO_PRESS:
        return "presses support no GPT-NeoX"
    if chosen.form == "policy" and architecture is not None and architecture not in MODELS:
        return f"knorm's own method runs on {', '.join(MODELS)}"
    return None


@dataclass(frozen=True)
class Study:
    """Hold a plan with its methods loaded.

    Attributes:
        plan: as it was read.
        device: "cpu" or "cuda".
        methods: with their budgets.
        left_out: (method, model, why) of what does not fit.
    """

    plan: Plan
    device: str
    methods: Sequence[Chosen]
    left_out: Sequence[tuple[Chosen, str, str]]

    def cells(self) -> Iterator[Cell]:
        """Generate the cells, those first that many others can learn from: the first windows of every row."""
        measures = self.plan.measure
        if "damage" in measures:
            yield from self._damage()
        if "laws" in measures:
            yield from self._laws()
        for measure in ("counters", "latency"):
            if measure in measures:
                yield from self._generations(measure)

    def rows(self) -> set[str]:
        """Return a name for each row of the table that there will be."""
        plan = self.plan.model_copy(update={"windows": 1})  # one cell tells its row
        return {digest(cell.row) for cell in replace(self, plan=plan).cells()}

    def axes(self) -> dict[str, list[Any]]:
        """Return the plan in words."""
        plan = self.plan
        return {"models": self._models(), "methods": [entry.target for entry in plan.methods], "texts": plan.texts}

    def _models(self) -> list[str]:
        """Return the plan's models, where a method runs on them, and engines with theirs."""
        hosts = dict.fromkeys(engine_target(x.target).host for x in self.methods if x.form == ENGINE)
        plain = any(chosen.form != ENGINE for chosen in self.methods)
        return [*(self.plan.models if plain else ()), *hosts]

    def _fit(self, model: str) -> list[Chosen]:
        if is_engine(model):
            return [x for x in self.methods if x.form == ENGINE and engine_target(x.target).host == model]
        out = {chosen.label for chosen, where, _ in self.left_out if where == model}
        return [x for x in self.methods if x.form != ENGINE and x.label not in out]

    def _shared(self, *, model: str = "", text: str = "") -> dict[str, Any]:
        inputs = {"code": code_digest(), "versions": versions(self.device)}
        if model:
            inputs["model"] = model_digest(model)
        if text:
            inputs["text"] = text_digest(text)
        return inputs

    def _made(self, chosen: Chosen, shared: Mapping[str, Any], **fields: Any) -> Cell:
        inputs = {**shared, "target": "" if chosen.target == CONTROL else target_digest(chosen.target)}
        plan = self.plan
        return Cell(method=chosen, device=self.device, threads=plan.threads, limit=plan.limit, inputs=inputs, **fields)

    def _settings(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Generate what cells of one model, text, prompt length, dtype and seed have in common."""
        plan = self.plan
        for model in self._models():
            for dtype in plan.dtypes[:1] if is_engine(model) else plan.dtypes:
                for text in plan.texts:
                    inputs = self._shared(model=model, text=text)
                    for prompt in plan.prompts:
                        for seed in plan.seeds[:1] if is_engine(model) else plan.seeds:
                            fields = {"model": model, "dtype": dtype, "text": text, "column": plan.column}
                            yield inputs, {**fields, "prompt_length": prompt, "seed": seed}

    def _damage(self) -> Iterator[Cell]:
        plan = self.plan
        for first, last in plan.blocks_of_windows():
            for inputs, fields in self._settings():
                for chosen in (Chosen(CONTROL), *self._fit(fields["model"])):
                    yield self._made(
                        chosen, inputs, measure="damage", window=plan.window, first=first, last=last,
                        batch=plan.batch, how=plan.how, **fields,
                    )  # fmt: skip

    def _laws(self) -> Iterator[Cell]:
        inputs = self._shared()
        for target in {chosen.target: chosen for chosen in self.methods}.values():
            for seed in self.plan.seeds:
                bare = Chosen(target.target, target.kind, form=target.form)
                yield self._made(bare, inputs, measure="laws", seed=seed, profile=self.plan.profile)

    def _generations(self, measure: str) -> Iterator[Cell]:
        blocks = {"blocks": self.plan.blocks} if measure == "latency" else {}
        for inputs, fields in self._settings():
            for chosen in () if is_engine(fields["model"]) else self._fit(fields["model"]):
                yield self._made(
                    chosen, inputs, measure=measure, batch=1, new_tokens=self.plan.new_tokens, **blocks, **fields
                )


def study_of(plan: Plan, device: str, known: dict[str, Any] | None = None) -> Study:
    """Load the methods of a plan, or recall what loading them told, and leave out what does not fit.

    Args:
        plan: of read_plan; paths in it are seen from the current folder.
        device: "cpu" or "cuda".
        known: what earlier loads told, by digest; what is new is put there.

    Returns:
        The study.

    Raises:
        ValueError: a target that does not load, a method that fits none of the models, no or too many cells.
    """
    known = {} if known is None else known
    methods: list[Chosen] = []
    for entry in plan.methods:
        budgets = [plan.keep_ratio, plan.keep_tokens]
        pattern = entry.target.endswith(":*")
        source = "" if entry.target == "knorm" or pattern else target_digest(entry.target)
        key = digest([entry.model_dump(), budgets, source, code_digest(), versions(device)])
        if key not in known:
            try:
                known[key] = [asdict(chosen) for chosen in choose(entry, plan)]
            except TypeError as error:
                raise ValueError(str(error)) from error
        named = {chosen.label for chosen in methods} if pattern else set()
        methods += [chosen for fields in known[key] if (chosen := Chosen(**fields)).label not in named]
    labels = [chosen.label for chosen in methods]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"the plan has {twice} twice")
    out = [(chosen, model, why) for model in plan.models for chosen in methods if (why := misfit(chosen, model))]
    if {*plan.measure} - {"laws"}:
        for chosen in methods:
            reasons = [why for other, _, why in out if other is chosen]
            if len(reasons) == len(plan.models):
                raise ValueError(f"{chosen.label} fits none of the models ({', '.join(plan.models)}): {reasons[0]}")
    study = Study(plan, device, methods, out)
    count = _count(study)
    if count > MOST_CELLS:
        raise ValueError(f"the plan has {count:,} cells, but should have at most {MOST_CELLS:,}: split it")
    return study


def _count(study: Study) -> int:
    """Count the damage cells without making them: a plan may have billions."""
    plan = study.plan
    settings = len(plan.models) * len(plan.dtypes) * len(plan.texts) * len(plan.prompts) * len(plan.seeds)
    return settings * (len(study.methods) + 1) * -(-plan.windows // plan.windows_per_cell)
