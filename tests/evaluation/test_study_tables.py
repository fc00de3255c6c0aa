"""The tables of a study: headline, contrasts, prompt effects, number of labels, scale and
footprint.
"""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from tiny_study import LABELS, study

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import score
from jaxre.evaluation.metrics.significance import holm, mcnemar, paired_bootstrap
from jaxre.evaluation.report import prompt_effects
from jaxre.evaluation.report.contrasts import (
    cross_domain,
    enumerated_effect,
    matched_shots,
    planned_comparisons,
)
from jaxre.evaluation.report.prompt_effects import prompt_sensitivity, style_factors
from jaxre.evaluation.report.slices import slices
from jaxre.evaluation.report.study_scores import OVERALL, measure
from jaxre.evaluation.report.tables import IN_BOTH, footprint, headline, labels_effect, scaling

DATASETS = {"gids": "general", "conll04": "general", "pg_fiction": "literary"}
THINKS = {"answer": lambda one: "<think>"}


def measured(folder, datasets=DATASETS, resamples=500, **systems):
    return measure(study(folder, datasets, systems), resamples=resamples)


def as_json(table):
    return [json.loads(json.dumps(row.to_json(), allow_nan=False)) for row in table]


def test_published_rows_follow_measured_rows_and_are_marked(tmp_path):
    scores = measured(tmp_path, {**DATASETS, "facts": "general"}, ours={})
    table = headline(scores)
    assert (
        table.groups["general"][:3] == ("gids", "conll04", "facts")
        and len(table.groups[OVERALL]) == 10
    )
    assert table.groups[IN_BOTH] == ("gids", "conll04", "pg_fiction")
    ours, *theirs = table.rows
    assert (
        ours.source == "measured"
        and {row.source for row in theirs} == {"published"}
        and len(theirs) == 36
    )
    assert ours.averages[IN_BOTH].missing == () and "tacred" in ours.averages[OVERALL].missing
    gpt = next(row for row in theirs if row.name == "GPT-5.4")
    assert (
        gpt.averages[IN_BOTH].value == pytest.approx((0.791 + 0.926 + 0.324) / 3)
        and gpt.averages[IN_BOTH].low is None
    )
    assert gpt.cells["gids"].low is None and gpt.averages[OVERALL].missing == ("facts",)
    as_json(table.rows)
    assert headline(scores, with_published=False).rows == (
        dataclasses.replace(ours, averages=headline(scores, False).rows[0].averages),
    )


def test_failed_published_runs_are_shown_and_not_averaged(tmp_path):
    rows = {row.name: row for row in headline(measured(tmp_path, ours={})).rows}
    failed = rows["SmolLM3-3B MixTune 0-shot"]
    assert failed.cells["gids"].f1 == 0 and failed.cells["gids"].broken
    assert (
        failed.averages[OVERALL].value is None and "reasoning" in failed.averages[OVERALL].flags[0]
    )


def test_comparisons_equal_the_plain_tests_and_are_corrected_over_the_table(tmp_path):
    frontier = {"kind": "frontier", "right": 0.6}
    scores = measured(
        tmp_path,
        a={},
        b={"right": 0.55},
        gpt=frontier,
        claude=frontier,
        styled={"style": "shots0"},
        generic={"enumerated": False},
    )
    table = planned_comparisons(scores)
    assert [(row.first, row.second) for row in table[::4]] == [
        ("a", "gpt"),
        ("a", "claude"),
        ("b", "gpt"),
        ("b", "claude"),
    ]
    assert [row.scope for row in table[:4]] == [*DATASETS, OVERALL]
    ours, theirs = scores.cell("a", "gids"), scores.cell("gpt", "gids")
    plain = paired_bootstrap(ours.gold, ours.predicted, theirs.predicted, resamples=500)
    assert (table[0].difference, table[0].first_f1) == pytest.approx(
        (plain.difference, plain.first)
    )
    # Two draws of 500: their 2.5% quantiles differ by about 0.2 standard deviations; the interval
    # is 4 of these wide.
    assert (table[0].low, table[0].high) == pytest.approx(
        (plain.low, plain.high), abs=0.2 * (plain.high - plain.low)
    )
    assert table[0].mcnemar_p == mcnemar(ours.right, theirs.right).p
    pooled = [
        np.concatenate([scores.cell(name, one).right for one in DATASETS]) for name in ("a", "gpt")
    ]
    assert table[3].mcnemar_p == mcnemar(*pooled).p and table[3].examples == 600
    assert table[3].difference == pytest.approx(np.mean([row.difference for row in table[:3]]))
    assert table[3].few_datasets and not table[0].few_datasets
    assert [row.p_holm for row in table] == pytest.approx(holm([row.p for row in table]))
    assert [row.mcnemar_p_holm for row in table] == pytest.approx(
        holm([row.mcnemar_p for row in table])
    )
    assert table[0].at_floor == (table[0].p == pytest.approx(2 / 501))
    as_json(table)


def test_encoders_are_compared_with_frontier_systems_too_and_count_for_the_correction(tmp_path):
    scores = measured(
        tmp_path,
        a={},
        roberta={"kind": "encoder"},
        tfidf={"kind": "baseline"},
        gpt={"kind": "frontier", "right": 0.6},
    )
    table = planned_comparisons(scores)
    assert list(dict.fromkeys(row.first for row in table)) == ["a", "roberta"]
    assert [row.p_holm for row in table] == pytest.approx(holm([row.p for row in table]))


def test_a_broken_system_is_in_no_test_and_corrects_no_other(tmp_path):
    table = planned_comparisons(
        measured(tmp_path, a={}, b=THINKS, gpt={"kind": "frontier", "right": 0.6})
    )
    tested, broken = table[:4], table[4:]
    assert (
        all(
            row.p is row.p_holm is row.difference is row.mcnemar_p is None and row.flags
            for row in broken
        )
        and len(broken) == 4
    )
    assert [row.p_holm for row in tested] == pytest.approx(holm([row.p for row in tested]))


def test_systems_are_compared_on_the_examples_that_both_answered(tmp_path):
    def some(one):
        return one.relation if int(one.id.rpartition("/")[2]) >= 150 else None

    scores = measured(tmp_path, a={}, gpt={"kind": "frontier", "answer": some})
    row = planned_comparisons(scores)[0]
    cell = scores.cell("a", "gids")
    assert row.examples == 50 and row.second_f1 == 1
    assert row.first_f1 == pytest.approx(score(cell.gold[150:], cell.predicted[150:]).f1)
    assert "gpt, gids: incomplete: 50 of 200 examples are answered" in row.flags


def test_answers_in_common_labels_are_compared_in_these_and_not_overall(tmp_path):
    place = {
        "born in": "born in",
        "works for": "works for",
        "place of birth": "place",
        "place of death": "place",
        "none": "none",
    }

    def turned(one):
        return (
            one.relation.replace("birth", "death")
            if int(one.id.rpartition("/")[2]) % 3
            else "born in"
        )

    scores = measured(
        tmp_path,
        a={"answer": turned},
        gpt={"kind": "frontier", "right": 0.6, "common_labels": {"gids": place}},
    )
    rows = {row.scope: row for row in planned_comparisons(scores)}
    assert rows[OVERALL].datasets == ("conll04", "pg_fiction")
    ours, theirs = scores.cell("a", "gids"), scores.cell("gpt", "gids")
    predicted = [place[label] for label in ours.predicted]
    plain = paired_bootstrap(theirs.gold, predicted, theirs.predicted, resamples=500)
    assert (rows["gids"].first_f1, rows["gids"].second_f1) == pytest.approx(
        (plain.first, plain.second)
    )
    assert rows["gids"].first_f1 > rows["conll04"].first_f1 + 0.1
    right = np.array(predicted) == np.array(theirs.gold)
    assert (
        rows["gids"].mcnemar_p
        == mcnemar(right, np.array(theirs.predicted) == np.array(theirs.gold)).p
    )


def test_a_study_with_generic_prompts_only_compares_these(tmp_path):
    generic = {"enumerated": False, "train_shots": 0, "prompt_shots": 0}
    frontier = {"kind": "frontier", "right": 0.6}
    scores = measured(tmp_path, a=generic, more={**generic, "prompt_shots": 2}, gpt=frontier)
    assert {row.first for row in planned_comparisons(scores)} == {"a"}


def test_no_common_example_makes_no_row(tmp_path):
    def part(parity):
        return {
            "answer": lambda one: (
                one.relation if int(one.id.rpartition("/")[2]) % 2 == parity else None
            )
        }

    assert (
        planned_comparisons(measured(tmp_path, a=part(0), gpt={"kind": "frontier", **part(1)}))
        == ()
    )


def test_each_contrast_pairs_systems_that_differ_in_one_thing(tmp_path):
    shots = {
        "train_shots": 2,
        "prompt_shots": 2,
        "enumerated": True,
        "trained_on": ("gids", "conll04"),
    }
    literary = {**shots, "trained_on": ("pg_fiction",), "regime": "littune"}
    scores = measured(
        tmp_path,
        gen={**shots, "regime": "gentune"},
        gen_generic={**shots, "regime": "gentune", "enumerated": False, "right": 0.5},
        gen_zero={**shots, "regime": "gentune", "prompt_shots": 0, "right": 0.5},
        lit={**literary, "right": 0.9},
        other={**literary, "model": "n-1B"},
        styled={**shots, "regime": "gentune", "prompt_shots": 4, "style": "shots4"},
    )
    generic = enumerated_effect(scores)
    assert [(row.first, row.second, row.scope) for row in generic] == [
        ("gen", "gen_generic", scope) for scope in ("gids", "conll04", OVERALL)
    ]
    assert all(row.difference > 0 and row.p_holm is None for row in generic)
    assert {(row.first, row.second) for row in matched_shots(scores)} == {("gen", "gen_zero")}
    across = cross_domain(scores)
    assert [(row.first, row.second, row.scope) for row in across] == [
        ("gen", "lit", "pg_fiction"),
        ("lit", "gen", "gids"),
        ("lit", "gen", "conll04"),
        ("lit", "gen", OVERALL),
    ]
    as_json([*generic, *across])


def test_datasets_without_training_are_not_mixed_with_trained_ones(tmp_path):
    def answer(one):
        return one.relation if one.dataset != "pg_fiction" or int(one.id[-1]) < 3 else "none"

    general = {"trained_on": ("gids", "conll04"), "answer": answer, "parameters": 10**9}
    scores = measured(tmp_path, gen=general, gpt={"kind": "frontier", "right": 0.5})
    row = headline(scores, with_published=False).rows[0]
    assert row.averages[OVERALL].value == 1 and row.averages[OVERALL].untrained == ("pg_fiction",)
    assert (
        row.averages[OVERALL].datasets == ("gids", "conll04")
        and row.averages[OVERALL].missing == ()
    )
    assert row.averages["literary"].value == row.cells["pg_fiction"].f1 < 0.6 and row.averages[
        "literary"
    ].untrained == ("pg_fiction",)
    assert [row.cells[name].trained for name in DATASETS] == [True, True, False]
    assert [one.scope for one in planned_comparisons(scores)] == ["gids", "conll04", OVERALL]
    assert scaling(scores)[0].points == 2 and [
        one.dataset for one in labels_effect(scores)[0].points
    ] == ["gids", "conll04"]
    assert {
        one.dataset
        for one in slices(scores, "gen")
        if one.status == "hole" and one.level == "dataset"
    } == {"pg_fiction"}


def test_number_of_labels_against_f1_is_spearmans_rho(tmp_path):
    names = ["gids", "conll04", "nyt11", "tacred", "rebel", "semeval2010_task8"]
    record = study(
        tmp_path,
        dict.fromkeys(names, "general"),
        {
            "a": {},
            "b": {"datasets": names[:3]},
            "c": THINKS,
            "zero": {"answer": lambda one: "none"},
        },
    )
    counts = [5, 7, 9, 11, 13, 15]
    datasets = [
        dataclasses.replace(one, labels=(*LABELS, *(f"more {n}" for n in range(count - 5))))
        for one, count in zip(record.datasets, counts, strict=True)
    ]
    scores = measure(dataclasses.replace(record, datasets=tuple(datasets)), resamples=300)
    found = {one.name: one for one in labels_effect(scores)}
    f1 = [scores.cell("a", name).interval.value for name in names]
    assert found["a"].rho == pytest.approx(stats.spearmanr(counts, f1).statistic)
    assert -1 <= found["a"].low < found["a"].high <= 1
    assert (
        found["b"].rho is None
        and found["b"].problem.endswith("datasets here: 3")
        and "c" not in found
    )
    assert found["zero"].rho is None and found["zero"].problem == "F1 is the same on every dataset"
    gpt = found["GPT-5.4"]
    points = [(one.labels, one.f1) for one in gpt.points]
    assert gpt.source == "published" and gpt.rho == pytest.approx(
        stats.spearmanr(*zip(*points, strict=True)).statistic
    )
    as_json(found.values())


def test_scaling_takes_tuned_systems_that_are_not_broken(tmp_path):
    sizes = {"A-1B": 10**9, "A-3B": 3 * 10**9, "B-1B": 10**9, "B-7B": 7 * 10**9}
    systems = {
        name: {"model": name, "parameters": size, "right": 0.1 * np.log10(size) - 0.2}
        for name, size in sizes.items()
    }
    scores = measured(
        tmp_path,
        **systems,
        broken={**THINKS, "model": "A-7B", "parameters": 7 * 10**9},
        gpt={"kind": "frontier"},
    )
    primary = measured(
        tmp_path,
        **systems,
        generic={"enumerated": False, "model": "A-1B", "parameters": 10**9, "right": 0.1},
    )
    assert scaling(primary)[0].points == 12  # what is asked otherwise says nothing of size
    ours, theirs = scaling(scores)
    assert (ours.points, ours.families, ours.carried_by, ours.source) == (
        12,
        ("A", "B"),
        ("A", "B"),
        "measured",
    )
    assert (
        ours.excluded == tuple(f"broken on {name}" for name in DATASETS)
        and ours.low < ours.per_decade < ours.high
    )
    assert theirs.source == "published" and len(theirs.excluded) == 2 and theirs.points == 164
    as_json([ours, theirs])


def test_footprint_rows_carry_what_was_measured(tmp_path):
    sizes = {"base": 9, "nf4": 3, "adapter": 1, "merged": 9}
    cut = {
        "limit": 512,
        "examples": 90,
        "cut": 5,
        "answer_gone": 3,
        "answer_cut": 1,
        "longest": 700,
    }
    rows = footprint(
        measured(
            tmp_path,
            ours={"sizes": sizes, "latency_ms": 4.5, "peak_memory_bytes": 12, "truncation": cut},
            plain={},
        )
    )
    assert (rows[0].left_out, rows[0].answers_lost) == (5, 4) and rows[1].left_out is rows[
        1
    ].answers_lost is None
    assert (rows[0].nf4, rows[0].latency_ms, rows[0].peak_memory) == (3, 4.5, 12) and rows[
        0
    ].f1 > 0.5
    assert rows[1].base is None and rows[1].latency_ms is None
    assert {row.source for row in rows[2:]} == {"published"} and rows[2].latency_ms == 18
    as_json(rows)


STYLES = [
    "shots0",
    "shots0-task-labels",
    "shots2-task",
    "shots2-labels",
    "shots4",
    "shots4-task-labels",
    "shots8-task",
    "shots8-labels",
]


def styled(names, **more):
    """The task definition is worth 0.2 of right answers, label definitions nothing, each
    demonstration 0.03.
    """
    right = {name: 0.3 + 0.2 * ("task" in name) + 0.03 * int(name[5]) for name in names}
    return {
        name: {"style": name, "kind": "untuned", "right": right[name], **more} for name in names
    }


def test_main_effects_of_the_eight_styles(tmp_path):
    scores = measured(tmp_path, **styled(STYLES), plain={})
    (table,) = prompt_sensitivity(scores)
    assert [row.style for row in table.rows] == sorted(
        STYLES, key=style_factors
    ) and table.problem == ""
    f1 = {row.style: row.average.value for row in table.rows}
    assert table.spread == pytest.approx(max(f1.values()) - min(f1.values()))
    effects = {one.name: one for one in table.effects}
    with_task = [value for style, value in f1.items() if "task" in style]
    assert effects["task definition"].value == pytest.approx(
        np.mean(with_task) - np.mean([f1[one] for one in f1 if "task" not in one])
    )
    assert (
        effects["task definition"].low > 0.05
        and effects["label definitions"].low < 0 < effects["label definitions"].high
    )
    eight = np.mean([f1["shots8-task"], f1["shots8-labels"]]) - np.mean(
        [f1["shots0"], f1["shots0-task-labels"]]
    )
    assert effects["8 demonstrations"].value == pytest.approx(eight)
    assert list(effects) == [
        "task definition",
        "label definitions",
        *(f"{n} demonstrations" for n in (2, 4, 8)),
    ]
    as_json([table])


@pytest.mark.parametrize(
    ("systems", "problem"),
    [
        (styled(STYLES[:3]), "not balanced"),
        (styled(["shots0"]), "one level only"),
        (
            {**styled(STYLES[:7]), "shots8-labels": {**styled(STYLES)["shots8-labels"], **THINKS}},
            "shots8-labels are broken",
        ),
        ({**styled(STYLES), "again": styled(STYLES)["shots0"]}, "twice"),
        (
            {**styled(STYLES), "shots0": {**styled(STYLES)["shots0"], "datasets": ["gids"]}},
            "not asked of the same",
        ),
    ],
)
def test_styles_without_main_effects_have_a_reason(tmp_path, systems, problem):
    (table,) = prompt_sensitivity(measured(tmp_path, resamples=20, **systems))
    assert problem in table.problem and table.effects == ()
    assert (table.spread is None) == (len(systems) == 1 or "same" in problem)


def test_names_of_styles_are_those_of_the_prompts():
    module = pytest.importorskip("jaxre.relations.prompt_styles")
    assert sorted(module.STYLES) == sorted(STYLES)
    for name, style in module.STYLES.items():
        assert prompt_effects.style_factors(name) == (style.shots, style.task, style.labels)
    with pytest.raises(InputError, match="'plain'"):
        style_factors("plain")
