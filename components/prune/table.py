"""The score table: what is known of each sample in compact columns, and the file that stages and report read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvila.components.contracts.recipe.prune import JUDGED, PruneSettings
from nvila.components.contracts.results.model import PrunedGroup
from nvila.components.data.skipped import Skipped
from nvila.components.prune.decide import BLANK, CATEGORIES, Columns, Decision, categories, decide, ties
from nvila.components.prune.groups import answer_kind

if TYPE_CHECKING:
    import pyarrow

    from nvila.components.prune.groups import Grouping

SCHEMA = {
    "id": "string",
    "source": "string",
    "group": "string",
    "kind": "string",
    "answer_kind": "string",
    "answer_characters": "int32",
    "loss_small": "float64",
    "loss_large": "float64",
    "loss_blank": "float64",
    "tokens_small": "int32",
    "tokens_large": "int32",
    "delta_sum": "float64",
    "delta_mean": "float64",
    "cluster": "int32",
    "score": "float64",
    "category": "string",
    "kept": "bool",
}
"""Columns of `scores.parquet`, a row for each SFT sample. Losses are nats summed over the answer's tokens, of which
there are `tokens_*`; `loss_blank` is the large reference's without the picture. `delta_*` is DeltaLoss summed and per
token. `score` is what its group was ranked by. What was not worked out is null."""
EXAMPLES = 4
"""Samples of each category that are named."""
PLOTS = 16
"""Sources whose histograms are drawn: of 170 side by side the picture is wider than a picture can be."""


@dataclass
class Table:
    """The samples of a step."""

    columns: Columns
    decision: Decision | None = None

    def __len__(self) -> int:
        return len(self.columns.ties)

    @classmethod
    def of(cls, rows: Iterable[pyarrow.Table], grouping: Grouping) -> Table:
        """Groups and kinds of all samples, read batch by batch."""
        codes: dict[str, dict[str, int]] = {"source": {}, "group": {}, "kind": {}}
        parts: dict[str, list[Any]] = {name: [] for name in ("ties", *codes)}
        for batch in rows:
            groups, kinds = grouping.of(batch)
            parts["ties"].append(ties(batch.column("id").to_pylist()))
            for name, values in (("source", batch.column("source").to_pylist()), ("group", groups), ("kind", kinds)):
                known = codes[name]
                parts[name].append(np.array([known.setdefault(v, len(known)) for v in values], dtype=np.int32))
        whole: dict[str, Any] = {
            name: np.concatenate(some) if some else np.zeros(0, np.uint64 if name == "ties" else np.int32)
            for name, some in parts.items()
        }
        return cls(
            Columns(**whole, sources=list(codes["source"]), groups=list(codes["group"]), kinds=list(codes["kind"]))
        )

    def of_kinds(self, kinds: Collection[str]) -> np.ndarray:
        """(n,) bool: the samples of these kinds of question."""
        return np.array([kind in kinds for kind in self.columns.kinds], dtype=bool)[self.columns.kind]

    def fill(self, rows: Iterable[pyarrow.Table], shards: Iterable[Mapping[str, Any]]) -> list[Skipped]:
        """Take the losses and clusters of scored shards, one for each batch of `rows`; the samples skipped there."""
        columns, n = self.columns, len(self)
        usable = columns.usable = np.ones(n, dtype=bool) if columns.usable is None else columns.usable
        skipped, at = list[Skipped](), 0
        for batch, shard in zip(rows, shards, strict=True):
            ids = batch.column("id").to_pylist()
            place = {one: at + i for i, one in enumerate(ids)}
            for name, losses in shard["losses"].items():
                loss = columns.loss.setdefault(name, np.full(n, np.nan))
                for one, (nats, _) in losses.items():
                    loss[place[one]] = nats
                if name != BLANK:
                    tokens = columns.tokens.setdefault(name, np.zeros(n, dtype=np.int32))
                    for one, (_, count) in losses.items():
                        tokens[place[one]] = count
            for one, reason, where in shard["skipped"]:
                usable[place[one]] = False
                skipped.append(Skipped(one, reason, where))
            if shard["clusters"]:
                if columns.cluster is None:
                    columns.cluster = np.full(n, -1, dtype=np.int32)
                for one, cluster in shard["clusters"].items():
                    columns.cluster[place[one]] = cluster
            at += len(ids)
        return skipped

    def decide(self, believed: Collection[str], prune: PruneSettings, seed: int) -> Decision:
        """Choose what stays, and remember it."""
        self.decision = decide(self.columns, believed, prune, seed)
        return self.decision

    def groups(self) -> dict[str, PrunedGroup]:
        """How each unit was parted."""
        columns, decision = self.columns, self._decided
        found = {}
        # Sorted once: a look at all samples for each of many units would take hours.
        places = np.argsort(decision.unit, kind="stable")
        ends = np.cumsum(np.bincount(decision.unit, minlength=len(decision.units)))[:-1]
        parts = np.split(places, ends)
        for name, ranked_by, mine in zip(decision.units, decision.ranked_by, parts, strict=True):
            scores = decision.score[mine]
            known = scores[np.isfinite(scores)]
            kinds = np.unique(columns.kind[mine])
            found[name] = PrunedGroup(
                source=columns.sources[int(columns.source[mine[0]])],
                n=len(mine),
                kept=int(decision.kept[mine].sum()),
                ranked_by=ranked_by,
                kinds=[columns.kinds[int(kind)] for kind in kinds],
                mean_score=round(float(known.mean()), 4) if ranked_by in JUDGED and len(known) else None,
            )
        return dict(sorted(found.items()))

    def categories(self, rows: Iterable[pyarrow.Table]) -> dict[str, tuple[dict[str, int], dict[str, list[str]]]]:
        """By source: how many samples are of each category, and some of their ids, chosen by digest."""
        columns, found = self.columns, {}
        of = categories(columns)
        first: dict[tuple[int, int], list[int]] = {}
        for number in range(len(columns.sources)):
            for category in range(len(CATEGORIES)):
                places = np.flatnonzero((columns.source == number) & (of == category))
                first[number, category] = places[np.argsort(columns.ties[places], kind="stable")[:EXAMPLES]].tolist()
        wanted = {place for places in first.values() for place in places}
        names, at = {}, 0
        for batch in rows:
            ids = batch.column("id")
            names.update({place: ids[place - at].as_py() for place in wanted if at <= place < at + len(batch)})
            at += len(batch)
        for number, source in enumerate(columns.sources):
            counts = np.bincount(of[columns.source == number] + 1, minlength=len(CATEGORIES) + 1)[1:].tolist()
            told = {name: counts[c] for c, name in enumerate(CATEGORIES) if counts[c]}
            some = {name: [names[p] for p in first[number, c]] for c, name in enumerate(CATEGORIES) if first[number, c]}
            found[source] = (told, some)
        return found

    def write(self, rows: Iterable[pyarrow.Table], path: Path) -> None:
        """Write `scores.parquet`, batch by batch."""
        import pyarrow
        import pyarrow.parquet as parquet

        columns, decision = self.columns, self._decided
        of, at = categories(columns), 0
        deltas = {how: columns.delta(how) for how in ("sum", "mean")}
        with parquet.ParquetWriter(path, _schema()) as writer:
            for batch in rows:
                span, answers = slice(at, at + len(batch)), batch.column("answer").to_pylist()
                made = {
                    "id": batch.column("id").combine_chunks(),
                    "source": batch.column("source").combine_chunks(),
                    "group": _named(columns.groups, columns.group[span]),
                    "kind": _named(columns.kinds, columns.kind[span]),
                    "answer_kind": pyarrow.array([answer_kind(answer) for answer in answers], pyarrow.string()),
                    "answer_characters": pyarrow.array(list(map(len, answers)), pyarrow.int32()),
                    **{f"loss_{name}": _floats(values[span]) for name, values in columns.loss.items()},
                    **{f"tokens_{n}": _counts(v[span], v[span] == 0) for n, v in columns.tokens.items()},
                    "score": _floats(decision.score[span]),
                    "category": _named([*CATEGORIES, None], of[span]),
                    "kept": pyarrow.array(decision.kept[span]),
                }
                made |= {f"delta_{how}": _floats(delta[span]) for how, delta in deltas.items()}
                if columns.cluster is not None:
                    made["cluster"] = _counts(columns.cluster[span], columns.cluster[span] < 0)
                writer.write_table(_whole(made, len(batch)))
                at += len(batch)

    @property
    def _decided(self) -> Decision:
        assert self.decision is not None
        return self.decision


def empty(path: Path) -> None:
    """Write a table without rows."""
    import pyarrow.parquet as parquet

    parquet.write_table(_whole({}, 0), path)


def plot(table: Table, path: Path) -> None:
    """Histograms of the score by source: what stayed on what went; of the first sources."""
    from matplotlib.figure import Figure

    columns, decision = table.columns, table.decision
    assert decision is not None
    shown = columns.sources[:PLOTS]
    figure = Figure(figsize=(4 * max(1, len(shown)), 3), layout="constrained")
    for number, source in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        mine = (columns.source == number) & np.isfinite(decision.score)
        scores = [decision.score[mine & decision.kept], decision.score[mine & ~decision.kept]]
        axes.hist(scores, bins=40, stacked=True, label=["kept", "pruned"])
        axes.set(title=source, xlabel="score", ylabel="samples", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=100)


def _schema() -> pyarrow.Schema:
    import pyarrow

    names = {
        "string": pyarrow.string(),
        "float64": pyarrow.float64(),
        "int32": pyarrow.int32(),
        "bool": pyarrow.bool_(),
    }
    return pyarrow.schema([(name, names[kind]) for name, kind in SCHEMA.items()])


def _whole(made: Mapping[str, Any], rows: int) -> pyarrow.Table:
    """All columns; those that are not there are null."""
    import pyarrow

    schema = _schema()
    columns = [made.get(field.name, pyarrow.nulls(rows, field.type)) for field in schema]
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _floats(values: np.ndarray) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(values, mask=np.isnan(values))


def _counts(values: np.ndarray, unknown: np.ndarray) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(values, mask=unknown)


def _named(names: Sequence[str | None], places: np.ndarray) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array([names[place] for place in places.tolist()], type=pyarrow.string())
