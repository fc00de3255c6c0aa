"""Published figures equal those of the study's tables."""

import json

import numpy as np
import pytest

from jaxre.evaluation.report.published import published


def test_figures_are_those_of_the_source(shared_data):
    source = json.loads((shared_data.parent / "paper" / "results.json").read_text(encoding="utf-8"))
    assert published().labels == source["labels_per_dataset"]
    assert {domain: list(names) for domain, names in published().domains.items()} == source[
        "datasets"
    ]
    tuned = {
        (one.model, one.regime, one.shots): one
        for one in published().systems
        if one.kind == "tuned"
    }
    assert len(tuned) == len(source["slm"]) == 30
    for row in source["slm"]:
        one = tuned[row["model"], row["regime"].lower(), row["shots"]]
        assert one.f1 == {name: f1 for name, f1 in row["f1"].items() if f1 is not None}
        assert one.parameters == pytest.approx(1e9 * row["params_b"]) and bool(one.note) == bool(
            row["note"]
        )
    for name, row in source["frontier_zero_shot"].items():
        one = next(one for one in published().systems if one.name == name)
        assert one.kind == "frontier" and one.f1 == {
            dataset: row[dataset] for names in source["datasets"].values() for dataset in names
        }
    for name, column in (("RoBERTa-base", "roberta_base"), ("RoBERTa-large", "roberta_large")):
        one = next(one for one in published().systems if one.name == name)
        assert one.kind == "encoder" and one.f1 == {
            row["dataset"]: row[column] for row in source["encoder_in_domain"] if row[column]
        }
    adapted = [one for one in published().systems if one.kind == "adapted"]
    figures = [
        {"biographical": row["bio"], "pg_fiction": row["pg"]}
        for row in source["dapt_case_study"]
        if row["dapt"]
    ]
    assert [one.f1 for one in adapted] == figures and [one.regime for one in adapted] == [
        "littune",
        "mixtune",
    ]
    assert len(published().systems) == 30 + 2 + 2 + 2
    for one, row in zip(published().footprint, source["efficiency"], strict=True):
        assert (one.name, one.gpu_ms, one.cpu_ms) == (
            row["config"],
            row["rtx4090_ms_per_extraction"],
            row["cpu_ms_per_extraction"],
        )
        assert (
            one.parameters == pytest.approx(1e9 * row["params_b"])
            and row["size"] == f"~{one.gigabytes} GB"
        )


def test_unweighted_averages_of_the_figures_are_the_published_ones(shared_data):
    source = json.loads((shared_data.parent / "paper" / "results.json").read_text(encoding="utf-8"))
    tuned = {
        (one.model, one.regime, one.shots): one
        for one in published().systems
        if one.kind == "tuned"
    }
    for row in source["slm"]:
        f1 = tuned[row["model"], row["regime"].lower(), row["shots"]].f1
        for domain, names in published().domains.items():
            if row[f"{domain}_avg"] is not None:
                # Their averages are of figures before rounding to four places.
                assert np.mean([f1[name] for name in names]) == pytest.approx(
                    row[f"{domain}_avg"], abs=2e-4
                )


def test_the_two_failed_runs_are_marked():
    assert [one.name for one in published().systems if one.note] == [
        "SmolLM3-3B MixTune 0-shot",
        "Qwen2.5-3B GenTune 0-shot",
    ]
    assert published().source and len({one.name for one in published().systems}) == len(
        published().systems
    )
