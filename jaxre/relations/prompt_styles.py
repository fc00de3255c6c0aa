"""Eight prompt styles that measure the effect of the prompt on the answers: `jaxre predict RUN
--style shots2-task`.

Three factors: the task is defined or not, the labels are defined or only listed, and 0, 2, 4 or 8
demonstrations. Of the 16 combinations these eight are the half in which every level of a factor
meets every level of each other factor equally often, so that the mean over a level measures that
factor's main effect (a half fraction; Box, Hunter & Hunter 2005, chapter 6):

    demonstrations   task and labels
    0, 4             neither, or both
    2, 8             the task alone, or the labels alone

All list the labels. A style changes nothing else in the prompt, and nothing in training.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxre.config import Prompt
from jaxre.errors import InputError
from jaxre.relations.files import nearest


@dataclass(frozen=True)
class Style:
    """Number of demonstrations; `task` and `labels` are True if they are defined."""

    shots: int
    task: bool
    labels: bool

    @property
    def name(self) -> str:
        return f"shots{self.shots}{'-task' * self.task}{'-labels' * self.labels}"


STYLES = {
    style.name: style
    for style in (
        Style(0, task=False, labels=False),
        Style(0, task=True, labels=True),
        Style(2, task=True, labels=False),
        Style(2, task=False, labels=True),
        Style(4, task=False, labels=False),
        Style(4, task=True, labels=True),
        Style(8, task=True, labels=False),
        Style(8, task=False, labels=True),
    )
}


def styled(prompt: Prompt, name: str) -> Prompt:
    """The prompt in a style. Definitions are the prompt's own, else those that ship for the
    dataset. Raises InputError: no such style.
    """
    if name not in STYLES:
        raise InputError(
            f"--style {name}: no such style; the nearest of {', '.join(STYLES)} is"
            f" {nearest(name, STYLES)}"
        )
    style = STYLES[name]
    definitions = (prompt.label_definitions or "shipped") if style.labels else None
    changes = {
        "shots": style.shots,
        "task_definition": style.task,
        "enumerate": True,
        "label_definitions": definitions,
    }
    return prompt.model_copy(update=changes)
