"""The rules as Great Expectations suites over four tables, and the quarantine that follows from their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.recipe.data import Validation

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.data_context import EphemeralDataContext
    from great_expectations.expectations import Expectation
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

RECORD = "record"
"""Column that names a row in results: `source/file.json[index]`."""
EXAMPLES_IN_DOCS = 10


def context() -> EphemeralDataContext:
    """A Great Expectations context that lives in memory and reports to nobody."""
    import great_expectations as gx

    made = gx.get_context(mode="ephemeral")
    made.enable_analytics(False)
    made.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    return made


def record_expectations(limits: Validation) -> list[Expectation]:
    """What each conversation record must keep; `meta.reason` is the quarantine's name for a breach."""
    from great_expectations import expectations as gxe

    return [
        gxe.ExpectColumnValuesToBeInSet(
            column="form", value_set=["ok"], notes="A record has the keys, the media and the turns of the format."
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="media_status", value_set=["ok"], notes="Every file is there, within the limits, and decodes whole."
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="side_pixels",
            min_value=limits.min_side_pixels,
            notes="The shorter side of each picture is at least min_side_pixels.",
            meta={"reason": "too_small"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="media_wanted",
            min_value=1,
            notes="A caption or a held-out question is about at least one file.",
            meta={"reason": "no_media"},
        ),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="markers",
            column_B="media_count",
            notes="One marker of the right kind in the questions for each file, none in the answers.",
            meta={"reason": "marker_mismatch"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="shortest_answer_chars",
            min_value=1,
            notes="No answer is empty.",
            meta={"reason": "empty_answer"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_chars",
            max_value=limits.max_text_chars,
            notes="A conversation is not longer than max_text_chars.",
            meta={"reason": "text_too_long"},
        ),
        gxe.ExpectColumnValuesToBeUnique(
            column="id", notes="Each id comes once; the first record of an id stays.", meta={"reason": "duplicate_id"}
        ),
        gxe.ExpectColumnValuesToBeUnique(
            column="content",
            notes="No record equals another in media bytes and conversation; the first one stays.",
            meta={"reason": "duplicate"},
        ),
    ]


def label_expectations() -> list[Expectation]:
    """What each record of `labels.json` must keep."""
    from great_expectations import expectations as gxe

    return [
        gxe.ExpectColumnValuesToBeInSet(
            column="form", value_set=["ok"], notes="A label has the keys and values of the format."
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="media_status", value_set=["ok"], notes="The file is there, within the limits, and decodes whole."
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="box_problem", notes="A box lies inside the picture.", meta={"reason": "bad_box"}
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="frame_problem", notes="The video has that frame.", meta={"reason": "bad_frame"}
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="labels_count", min_value=1, notes="A label says something.", meta={"reason": "empty_labels"}
        ),
    ]


def picture_expectations() -> list[Expectation]:
    """Over one row per distinct file and side (training, heldout): no file is on both sides."""
    from great_expectations import expectations as gxe

    return [
        gxe.ExpectColumnValuesToBeUnique(
            column="sha256", notes="No held-out picture is a training picture.", meta={"reason": "leak"}
        )
    ]


def source_expectations(limits: Validation) -> list[Expectation]:
    """Over one row per source: balance, and how much of it was spoilt."""
    from great_expectations import expectations as gxe

    return [
        gxe.ExpectColumnValuesToBeBetween(
            column="share_of_sft",
            min_value=limits.min_source_share,
            notes="Each source holds at least min_source_share of all good SFT records.",
            meta={"reason": "unbalanced"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="quarantined_beyond",
            max_value=0,
            notes="At most max_quarantined_share of its records, rounded up, are spoilt.",
            meta={"reason": "spoilt"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="quarantined_labels_beyond",
            max_value=0,
            notes="At most max_quarantined_share of its labels, rounded up, are spoilt.",
            meta={"reason": "spoilt_labels"},
        ),
    ]


def check(
    gx_context: EphemeralDataContext, name: str, table: pd.DataFrame, expectations: Sequence[Expectation]
) -> ExpectationSuiteValidationResult:
    """Validate `table`, whose column `record` names its rows; results come in the order of `expectations`."""
    import great_expectations as gx

    for order, expectation in enumerate(expectations):
        expectation.meta = {**(expectation.meta or {}), "order": order}
    suite = gx_context.suites.add(gx.ExpectationSuite(name=name, expectations=list(expectations)))
    asset = gx_context.data_sources.add_pandas(name).add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe(name).get_batch(batch_parameters={"dataframe": table})
    result = batch.validate(
        suite,
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": [RECORD],
            "partial_unexpected_count": EXAMPLES_IN_DOCS,
            "return_unexpected_index_query": False,
        },
    )
    result.results.sort(key=lambda each: configuration(each).meta["order"])
    return result


def configuration(result: ExpectationValidationResult) -> ExpectationConfiguration:
    """The expectation that a result is about; results that `check` made always have one."""
    assert result.expectation_config is not None
    return result.expectation_config


def breaches(result: ExpectationSuiteValidationResult, table: pd.DataFrame) -> dict[str, tuple[str, Any]]:
    """Rows that break an expectation: record -> (reason of the first breach, observed value).

    Of rows that are equal where they must be unique, the first in the table is kept.
    """
    position = {record: index for index, record in enumerate(table[RECORD])}
    found: dict[str, tuple[str, Any]] = {}
    for each in result.results:
        config = configuration(each)
        items = each.result.get("unexpected_index_list") or []
        items = sorted(items, key=lambda item: position[item[RECORD]])
        if config.type == "expect_column_values_to_be_unique":
            items = _later_ones(items, config.kwargs["column"])
        for item in items:
            observed = {key: value for key, value in item.items() if key != RECORD}
            reason = config.meta.get("reason") or str(next(iter(observed.values())))
            found.setdefault(item[RECORD], (reason, observed))
    return found


def _later_ones(items: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """All but the first of the rows that share a value, each with the name of that first one."""
    first: dict[Any, str] = {}
    for item in items:
        first.setdefault(item[column], item[RECORD])
    return [
        {RECORD: item[RECORD], "the same as": first[item[column]]}
        for item in items
        if item[RECORD] != first[item[column]]
    ]
