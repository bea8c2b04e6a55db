"""What each command's --json holds: the fields, their units, and the JSON Schemas under docs/schemas.

A name means the same in all of them: losses are in nats per token, times in seconds, sizes in bytes, shares of 1.
"""

from __future__ import annotations

from knorm.cli.schemas import paged, quality, swept, timing, verdicts
from knorm.cli.schemas.parts import Result

VERSION = 1  # raised where a field changes its name or meaning

FORMS: dict[str, type[Result]] = {  # the name of a schema -> its form
    "knorm-ppl": quality.Curve,
    "knorm-ppl-reported": quality.Reported,
    "knorm-ppl-methods": quality.Methods,
    "knorm-explain": quality.Explanation,
    "knorm-explain-method": quality.MethodExplanation,
    "knorm-bench": timing.Bench,
    "knorm-bench-against": timing.Against,
    "knorm-verify": quality.Verified,
    "knorm-check": verdicts.Checked,
    "knorm-golden-list": verdicts.GoldensListed,
    "knorm-golden-verify": verdicts.GoldensVerified,
    "knorm-golden-record": verdicts.Recorded,
    "knorm-golden-diff": verdicts.Differences,
    "knorm-golden-accept": verdicts.Accepted,
    "knorm-golden-log": verdicts.GoldenLog,
    "knorm-sweep": swept.Swept,
    "knorm-sweep-plan": swept.Planned,
    "knorm-page": paged.Paged,
    "knorm-init": verdicts.Initialised,
}
