"""The report in a headless Chromium: no error, no request, sorting, filters, and no scrolling to
the side.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Browser
from made_study import NASTY, make_study

from jaxre.evaluation.report.findings import collect
from jaxre.evaluation.report.page import SECTIONS, render
from jaxre.evaluation.report.record import read_record
from jaxre.evaluation.report.study_scores import measure

SYSTEMS = (
    "SmolLM2-360M MixTune 2-shot",
    "Qwen2.5-3B MixTune 0-shot",
    "RoBERTa-base",
    "Frontier A <b>",
    "left thinking",
    "always author_of",
)
ROWS = "[...document.querySelectorAll('#headline-table tbody tr')]"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_study(folder, nasty=True, systems=SYSTEMS)
    path = folder / "report.html"
    path.write_text(render(collect(measure(read_record(folder), resamples=100))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def opened(browser, page) -> Browser:
    browser.open(page)
    return browser


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_no_error_and_no_request(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.problems == [] and browser.requests == []
    assert browser.run("document.documentElement.scrollWidth") == width
    # What is wider than the page scrolls inside of its own box; every chart is drawn.
    wide = (
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll') &&"
        " one.getBoundingClientRect().right > innerWidth)"
    )
    assert browser.run(f"{wide}.map(one => one.outerHTML.slice(0, 80))") == []
    assert browser.run(
        "[...document.querySelectorAll('.chart')].every(one => one.querySelector('svg'))"
    )
    paper = "getComputedStyle(document.body).backgroundColor"
    assert browser.run(paper) == ("rgb(19, 23, 27)" if dark else "rgb(255, 255, 255)")


def test_data_that_looks_like_markup_is_text(opened):
    assert opened.run("window.broken === undefined")
    assert opened.run("document.querySelector('h1').textContent") == f"made-up study {NASTY}"
    assert (
        opened.run("document.querySelectorAll('main b > script, main script, #cards b b').length")
        == 0
    )
    assert opened.run("document.querySelectorAll('section').length") == len(SECTIONS)


def columns(browser: Browser) -> list[str]:
    return browser.run(
        "[...document.querySelectorAll('#headline-table thead tr:last-child > *')].map(one =>"
        " one.textContent.trim())"
    )


def test_a_click_on_a_heading_sorts_and_empty_cells_stay_last(opened):
    column = columns(opened).index("Facts")
    values = f"{ROWS}.map(row => row.cells[{column}].dataset.sort)"
    head = f"document.querySelectorAll('#headline-table thead tr:last-child > *')[{column}]"
    for order, reverse in (("descending", True), ("ascending", False)):
        opened.run(f"{head}.querySelector('button').click()")
        found = opened.run(values)
        given = [float(value) for value in found if value]
        assert given == sorted(given, reverse=reverse) and len(given) == len(SYSTEMS)
        assert found[len(given) :] == [""] * (len(found) - len(given)) != []
        assert opened.run(f"{head}.getAttribute('aria-sort')") == order
    assert (
        opened.run(
            "document.querySelectorAll('#headline-table [aria-sort]:not([aria-sort=none])').length"
        )
        == 1
    )


def test_sorting_works_from_the_keyboard_and_sorts_names_as_text(opened):
    opened.run("document.querySelector('#headline-table thead tr:last-child button').focus()")
    opened.press("Enter")
    names = opened.run(f"{ROWS}.map(row => row.cells[0].dataset.sort)")
    assert names == opened.run(
        f"{json.dumps(names)}.sort((a, b) => a.localeCompare(b, undefined, {{numeric: true}}))"
    )
    opened.press("Tab")
    assert opened.run("document.activeElement.textContent") == columns(opened)[1]


def choose(browser: Browser, selector: str, value: str) -> None:
    script = (
        f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.value ="
        f" {json.dumps(value)};"
    )
    browser.run(
        script
        + "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, {bubbles:"
        " true})); })()"
    )


def test_filters_keep_what_they_say(opened):
    shown = (
        f"{ROWS}.filter(row => !row.hidden).map(row => row.dataset.source + ' ' + row.dataset.kind)"
    )
    opened.run("document.querySelector('[data-field=source][value=measured]').click()")
    assert len(opened.run(shown)) == len(SYSTEMS)
    choose(opened, "#results [data-field=kind]", "frontier")
    assert opened.run(shown) == ["measured frontier"]
    opened.run("document.querySelector('[data-field=source][value=published]').click()")
    assert set(opened.run(shown)) == {"published frontier"}
    choose(opened, "#results [data-field=text]", "no such system")
    assert opened.run(shown) == []
    assert opened.run("document.querySelector('#results output').textContent").startswith("0 of ")


def test_examples_are_filtered_by_who_is_right(opened):
    cards = "[...document.querySelectorAll('#cards > .card')].filter(card => !card.hidden)"
    whole = opened.run(f"{cards}.length")
    choose(opened, "#examples [data-field=right]", "frontier")
    assert 0 < opened.run(f"{cards}.length") < whole
    assert opened.run(
        f"{cards}.every(card =>"
        " card.querySelector('dd:nth-of-type(2)').textContent.includes('wrong'))"
    )


def test_slices_open_and_flag_holes(opened):
    tree = "document.querySelector('#slices-tree')"
    assert opened.run(f"{tree}.querySelectorAll(':scope > details').length") == 2
    assert opened.run(
        f"{tree}.textContent.includes('PERSON -> WORK') && {tree}.textContent.includes('author_of')"
    )
    opened.run("document.querySelector('#only-holes').click()")
    names = opened.run(f"[...{tree}.querySelectorAll('li bdi')].map(one => one.textContent)")
    assert "PLACE -> PLACE" in names and "PERSON -> WORK" not in names
    choose(opened, "#slice-system", "left thinking")
    assert opened.run(f"{tree}.textContent") == "No hole in this system's results."


def test_the_confusion_matrix_is_that_of_the_system_and_dataset_chosen(opened):
    choose(opened, "#confusion-system", "always author_of")
    choose(opened, "#confusion-dataset", "pg_fiction")
    cells = (
        "[...document.querySelectorAll('.confusion tbody td')].map(one =>"
        " one.textContent).filter(one => one)"
    )
    total = sum(int(cell) for cell in opened.run(cells))
    assert total == opened.run(
        "JSON.parse(document.querySelector('#findings').textContent).confusions[0].counts.reduce((a,"
        " b) => a + b[2], 0)"
    )
    heads = opened.run(
        "[...document.querySelectorAll('.confusion thead th')].map(one => one.textContent)"
    )
    used = opened.run(
        "[...document.querySelectorAll('.confusion tbody tr')].map(row =>"
        " [...row.cells].slice(1).findIndex(one => one.textContent))"
    )
    assert {heads[place] for place in used if place >= 0} >= {"author_of"}


def test_charts_are_drawn_again_when_the_window_changes(opened):
    wide = opened.run(
        "document.querySelector('#scaling svg:not([aria-hidden])').getAttribute('viewBox')"
    )
    opened.resize(390)
    opened.settle()
    assert (
        opened.run("document.querySelector('#scaling .chart > svg').getAttribute('viewBox')")
        != wide
    )
    choose(opened, "#scaling-group", "literary")
    assert opened.run("document.querySelectorAll('#scaling .chart > svg path').length") > 0
    assert opened.problems == []
